"""Training speed and memory: each stage's step against the stock way of doing it.

A step is all of it: forward, backward, clipping, AdamW on the LoRA. The rivals are built from stock
transformers and sentence-transformers on the same saved decoder with the same adapter, the mask
open, attention by sdpa:

* mntp: the causal LM's own loss, which computes the logits of every token, with gradient
  checkpointing, as the original scripts set it;
* simcse: the two views as two padded passes, with gradient checkpointing, as in the original;
* supervised: what the stock sentence-transformers trainer runs, padded passes (queries, then
  documents) without gradient checkpointing (`--checkpointing` gives it that too).

Ratios inside one process: the sides take turns, every round gives one ratio, the median counts.
Before anything is timed both sides' losses and gradients are compared without dropout: a fast wrong
step is no result. Memory is the peak of what torch allocated during a step, from its profiler; the
logits part is the peak of head and loss, forward and backward, on given states.

    python -m benchmarks.train --quick               # five minutes on two cores
    python -m benchmarks.train --stages mntp --json results/train.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks.encode import SMOLLM_135M, environment
from benchmarks.texts import read_sentences
from unmasked import LLM2Vec
from unmasked.checkpoint import adapters, loading
from unmasked.checkpoint.location import bundled_path
from unmasked.files import docstrings
from unmasked.recipe.schema import Pairs
from unmasked.text.tokens import TextTokenizer
from unmasked.train.data.mixing import PairCollator
from unmasked.train.data.texts import Blocks, token_file
from unmasked.train.losses.mntp import MaskedNextTokenModel, Masking
from unmasked.train.losses.simcse import TwoViewsLoss
from unmasked.train.losses.supervised import RankingLoss

BLOCK, MASKED, DROPOUT, TEMPERATURE = 512, 0.2, 0.3, 0.05
QUICK = {"mntp": 2, "simcse": 14, "supervised": 4}
FULL = {"mntp": 8, "simcse": 128, "supervised": 32}
"""Blocks, sentences and triplets a step. Larger batches pad more: the quick ones favour us less."""

LONGEST = 256  # tokens of a supervised text

OURS, STOCK = "unmasked", "stock"
LARGEST_DIFFERENCE = 1e-3  # of the gradients, relative; both sides are float32


@dataclass
class Side:
    """One way of taking a step.

    Attributes:
        model: what trains.
        backward: forward and backward; the loss.
        head: the logits part alone, forward and backward; MNTP only.
    """

    model: nn.Module
    backward: Callable[[], Tensor]
    head: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0)

    def step(self) -> None:
        """One optimiser step, in train mode."""
        self.model.train()
        self.optimizer.zero_grad()
        self.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    def gradient(self) -> tuple[float, Tensor]:
        """Loss and gradient without dropout."""
        self.model.eval()
        self.optimizer.zero_grad()
        loss = self.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        return float(loss.detach()), torch.cat([g.flatten() for g in grads])


@dataclass
class Stage:
    """Both sides of a stage, and what a step of each computes."""

    ours: Side
    stock: Side
    tokens: int
    padded: int
    note: str


def save_decoder(folder: Path, tokenizer: str, layers: int) -> None:
    """SmolLM-135M's shape with random weights, head tied, as a causal LM."""
    torch.manual_seed(0)
    shape = {**SMOLLM_135M, "num_hidden_layers": layers}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, tie_word_embeddings=True))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def attach(trunk: Any, checkpointing: bool = False) -> Any:
    """The paper's LoRA, with a B that is not zero, so that every gradient can be compared."""
    model = adapters.attach(trunk)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.01)
        elif "lora_A" in name:
            nn.init.kaiming_uniform_(weight, a=5**0.5)
    if checkpointing:
        trunk.activation_checkpointing_enable({"use_reentrant": False})
        trunk.enable_input_require_grads()
    return model


def mntp_stage(decoder: Path, texts: list[str], rows: int, checkpointing: bool) -> Stage:
    """Blocks of 512, a fifth of the tokens scored."""
    encoder = LLM2Vec.from_pretrained(decoder, dtype="float32")
    tokens: TextTokenizer = encoder.backbone.tokens
    corpus = decoder.parent / "corpus.txt"
    corpus.write_text("\n".join(texts), encoding="utf-8")
    file = token_file([corpus], None, tokens, decoder.parent)
    blocks = Blocks(file, np.arange(len(texts)), BLOCK)
    ids = torch.from_numpy(np.stack([blocks[i] for i in range(rows)])).to(encoder.device)
    vocabulary = SMOLLM_135M["vocab_size"]
    masking = Masking(5, vocabulary, (0, 1), MASKED)
    batch = masking(ids.cpu(), torch.Generator().manual_seed(0))
    batch = {name: value.to(encoder.device) for name, value in batch.items()}
    head: Any = loading.load_causal_lm(decoder, torch.float32).to(encoder.device)
    ours = MaskedNextTokenModel(attach(encoder.backbone.auto_model), head)
    stock: Any = loading.load_causal_lm(decoder, torch.float32, "sdpa").to(encoder.device)
    stock.requires_grad_(False)
    stock.model = attach(stock.model, checkpointing=True)
    states = torch.randn(*ids.shape, SMOLLM_135M["hidden_size"], device=ids.device)

    def score(rows_only: bool) -> Tensor:
        given = states.clone().requires_grad_()
        if rows_only:
            return ours.score(given, batch["labels"])["loss"]
        logits = stock.lm_head(given)
        return stock.loss_function(logits, batch["labels"], vocabulary)

    return Stage(
        Side(ours, _backward(lambda: ours(**batch)["loss"]), _backward(lambda: score(True))),
        Side(
            stock,
            _backward(lambda: stock(**batch, use_cache=False).loss),
            _backward(lambda: score(False)),
        ),
        tokens=ids.numel(),
        padded=ids.numel(),
        note=f"{rows} blocks of {BLOCK}, {MASKED:.0%} masked",
    )


def simcse_stage(decoder: Path, texts: list[str], rows: int, checkpointing: bool) -> Stage:
    """Two dropout views of sentences."""
    ours, stock = LLM2Vec.from_pretrained(decoder, dtype="float32"), _stock(decoder)
    ours.backbone.auto_model = attach(ours.backbone.auto_model)
    stock[0].auto_model = attach(stock[0].auto_model, checkpointing=True)
    batch = random.Random(0).sample(texts, rows)
    features = ours.preprocess(batch, max_length=128)
    theirs = [_stock_features(stock, batch, 128) for _ in range(2)]
    two_views = TwoViewsLoss(ours, TEMPERATURE)
    two_passes = MultipleNegativesRankingLoss(stock, scale=1 / TEMPERATURE)
    return Stage(
        Side(ours, _noisy(ours, lambda: two_views([dict(features)], None))),
        Side(stock, _noisy(stock, lambda: two_passes([dict(f) for f in theirs], None))),
        tokens=2 * int(features["attention_mask"].sum()),
        padded=sum(f["input_ids"].numel() for f in theirs),
        note=f"{rows} sentences, two views",
    )


def supervised_stage(decoder: Path, texts: list[str], rows: int, checkpointing: bool) -> Stage:
    """A summary has to find its docstring; another docstring is the hard negative."""
    ours, stock = LLM2Vec.from_pretrained(decoder, dtype="float32"), _stock(decoder)
    ours.backbone.auto_model = attach(ours.backbone.auto_model)
    stock[0].auto_model = attach(stock[0].auto_model, checkpointing)
    found = docstrings.pairs(docstrings.collect(limit=4000))
    chosen = random.Random(0).sample(found, 2 * rows)
    answers, negatives = chosen[:rows], [d.body for d in chosen[rows:]]
    collate = PairCollator(ours.preprocess, [Pairs(path="docstrings")], 1, LONGEST)
    batch = collate(
        [
            {"query": d.summary, "positive": d.body, "negatives": [n], "source": 0, "number": i}
            for i, (d, n) in enumerate(zip(answers, negatives, strict=True))
        ]
    )
    features = {
        key.removeprefix("text_"): value.to(ours.device)
        for key, value in batch.items()
        if key.startswith("text_")
    }
    columns = [[d.summary for d in answers], [d.body for d in answers], negatives]
    theirs = [_stock_features(stock, column, LONGEST) for column in columns]
    loss = RankingLoss(ours, TEMPERATURE)
    stock_loss = MultipleNegativesRankingLoss(stock, scale=1 / TEMPERATURE)
    return Stage(
        Side(ours, _backward(lambda: loss([dict(features)], batch["label"]))),
        Side(stock, _backward(lambda: stock_loss([dict(f) for f in theirs], None))),
        tokens=int(features["attention_mask"].sum()),
        padded=sum(f["input_ids"].numel() for f in theirs),
        note=f"{rows} docstring triplets, one hard negative",
    )


STAGES = {"mntp": mntp_stage, "simcse": simcse_stage, "supervised": supervised_stage}


def _backward(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        value = loss()
        value.backward()
        return value

    return run


def _noisy(model: Any, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """With SimCSE's attention dropout, which acts in train mode only."""
    trunk = model[0].auto_model

    def run() -> Tensor:
        with _set_dropout(trunk):
            value = loss()
            value.backward()
        return value

    return run


@contextmanager
def _set_dropout(trunk: nn.Module) -> Iterator[None]:
    modules = [m for m in trunk.modules() if hasattr(m, "attention_dropout")]
    for module in modules:
        module.attention_dropout = DROPOUT
    try:
        yield
    finally:
        for module in modules:
            module.attention_dropout = 0.0


def _stock(decoder: Path) -> SentenceTransformer:
    """The saved encoder as stock sentence-transformers loads it."""
    with tempfile.TemporaryDirectory() as work:
        LLM2Vec.from_pretrained(decoder, dtype="float32").save(work)
        return SentenceTransformer(work, model_kwargs={"attn_implementation": "sdpa"})


def _stock_features(model: SentenceTransformer, texts: list[str], length: int) -> dict[str, Any]:
    model.max_seq_length = length
    features = model.preprocess(texts, prompt=model.prompts[model.default_prompt_name or ""])
    return {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in features.items()}


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes that torch allocated at most, beyond what was there before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        run()
    events: Any = measured.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(accumulate(size for _, size in sorted(sizes, key=lambda pair: pair[0])), default=0)


def check(stage: Stage) -> float:
    """Relative difference of the gradients; stops where the sides disagree. Warms up as well."""
    (our_loss, ours), (stock_loss, stock) = stage.ours.gradient(), stage.stock.gradient()
    difference = float((ours - stock).norm() / stock.norm())
    if not difference <= LARGEST_DIFFERENCE or abs(our_loss - stock_loss) > 1e-3:
        raise SystemExit(
            f"gradients differ by {difference:.1e} (losses {our_loss:.5f}, {stock_loss:.5f}): "
            "nothing is timed"
        )
    return difference


def measure(stage: Stage, rounds: int) -> dict[str, Any]:
    """Check, time in turns, then one step of each for the memory."""
    difference = check(stage)
    sides = {OURS: stage.ours, STOCK: stage.stock}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            begun, used = time.perf_counter(), time.process_time()
            side.step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            wall[name].append(time.perf_counter() - begun)
            cpu[name].append(time.process_time() - used)
    for side in sides.values():
        side.optimizer.zero_grad()
    memory = {name: peak_memory(side.step) for name, side in sides.items()}
    found = {
        "note": stage.note,
        "tokens": stage.tokens,
        "padded_over_real": stage.padded / stage.tokens,
        "gradient_difference": difference,
        "speed_ratio": median(b / a for a, b in zip(wall[OURS], wall[STOCK], strict=True)),
        "cpu_time_ratio": median(b / a for a, b in zip(cpu[OURS], cpu[STOCK], strict=True)),
        "tokens_per_second": stage.tokens / median(wall[OURS]),
        "stock_tokens_per_second": stage.tokens / median(wall[STOCK]),
        "peak_bytes": memory[OURS],
        "stock_peak_bytes": memory[STOCK],
        "memory_ratio": memory[OURS] / memory[STOCK],
    }
    if stage.ours.head and stage.stock.head:
        logits = peak_memory(stage.ours.head), peak_memory(stage.stock.head)
        found |= {"logits_bytes": logits[0], "stock_logits_bytes": logits[1]}
        found["logits_memory_ratio"] = logits[0] / logits[1]
    return found


HEADER = (
    "| stage | a step | padded / real | tokens/s | vs stock, wall / CPU time "
    "| peak memory, ours / stock | logits part |\n|---|---|---|---|---|---|---|"
)


def markdown_row(name: str, found: dict[str, Any]) -> str:
    """A stage as a row below `HEADER`."""
    logits = f"{found['logits_memory_ratio']:.2f}" if "logits_memory_ratio" in found else ""
    memory = f"{found['peak_bytes'] / 2**30:.2f} / {found['stock_peak_bytes'] / 2**30:.2f} GiB"
    return (
        f"| {name} | {found['note']}: {found['tokens']} tokens | {found['padded_over_real']:.2f} "
        f"| {found['tokens_per_second']:.0f} "
        f"| **{found['speed_ratio']:.2f}×** / {found['cpu_time_ratio']:.2f}× "
        f"| {memory} | {logits} |"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Training steps against the stock way.")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--layers", type=int, default=SMOLLM_135M["num_hidden_layers"])
    parser.add_argument("--rounds", type=int, help="default: 3 when quick, else 5")
    parser.add_argument("--checkpointing", action="store_true", help="for stock supervised, too")
    parser.add_argument("--tokenizer", default=str(bundled_path()))
    parser.add_argument("--data", type=Path, help="folder with text/enwiki_sentences.txt.gz")
    parser.add_argument("--quick", action="store_true", help="small batches, three rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    options = parse(arguments)
    transformers.utils.logging.disable_progress_bar()
    sentences = read_sentences(options.data)
    sizes = QUICK if options.quick else FULL
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        decoder = Path(work) / "decoder"
        save_decoder(decoder, options.tokenizer, options.layers)
        name = f"SmolLM-135M's shape, {options.layers} layers, random weights"
        model = LLM2Vec.from_pretrained(decoder, dtype="float32")
        report["environment"] = environment(model, name, "float32", sentences.source)
        del model
        for key, value in report["environment"].items():
            print(f"- {key}: {value}")
        print(f"\n{HEADER}", flush=True)
        for stage in options.stages:
            sides = STAGES[stage](decoder, sentences.english, sizes[stage], options.checkpointing)
            report[stage] = measure(sides, options.rounds or (3 if options.quick else 5))
            print(markdown_row(stage, report[stage]), flush=True)
            del sides
            gc.collect()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
