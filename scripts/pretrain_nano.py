"""Train the bundled decoder, `unmasked/nano`: a causal language model small enough to ship.

Reads lines of plain text (``--text``, .txt or .txt.gz, with a share each) and the docstrings of
the installed packages, except those of held-out modules, which the demo evaluates on. Learns a
byte-level BPE, then trains a Llama-shaped model with Muon on the matrices and AdamW on the rest,
and writes the folder with a model card that states the held-out perplexity it measured.

    python scripts/pretrain_nano.py --text enwiki.txt.gz=0.5 --text kowiki.txt.gz=0.12 \
        --docstrings 0.38 --tokens 11000000 -o src/unmasked/nano

About 3,000 tokens a second on two cores with hardware bf16: 11 M tokens take about an hour.
Run again with the same arguments to continue from the last checkpoint in ``--work``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unmasked.files.docstrings import collect

VOCABULARY, CONTEXT = 8192, 512
LONG_SHARE = 0.25  # last steps, at full context; those before see half of it, a third faster
SPECIALS = ["<pad>", "<s>", "</s>"]
HELD_OUT_LINES = 500  # of each source, from its end


def read_lines(path: Path) -> list[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]


def load_sources(args: argparse.Namespace) -> dict[str, tuple[float, list[str]]]:
    """Name → (share of the training tokens, shuffled texts)."""
    sources = {}
    for item in args.text:
        name, _, share = item.rpartition("=")
        sources[Path(name).name] = (float(share), read_lines(Path(name)))
    if args.docstrings:
        texts = [d.text for d in collect() if not d.held_out]
        sources["docstrings"] = (args.docstrings, texts)
    for _, texts in sources.values():
        random.Random(0).shuffle(texts)
    return sources


def learn_tokenizer(sources: dict[str, tuple[float, list[str]]], bytes_read: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def sample():
        for share, texts in sources.values():
            left = share * bytes_read
            for text in texts:
                if (left := left - len(text.encode())) < 0:
                    break
                yield text

    tokenizer.train_from_iterator(sample(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """`<s> text </s>` of every text, one after the other, as one row of ids."""
    ids: list[int] = []
    for start in range(0, len(texts), 4096):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 4096]):
            ids += encoding.ids
            ids.append(2)
    return np.array(ids, dtype=np.uint16)


def mix_blocks(streams: dict[str, tuple[float, np.ndarray]], tokens: int) -> np.ndarray:
    """Blocks of CONTEXT ids, each from one source, drawn in proportion to the shares.

    The first n blocks do not depend on `tokens`, so a run may be continued with another length
    as long as its learning rate has not begun to fall.
    """
    shares = np.array([share for share, _ in streams.values()])
    draws = np.random.default_rng(0).choice(
        len(shares), size=tokens // CONTEXT, p=shares / shares.sum()
    )
    mixed = np.empty((len(draws), CONTEXT), dtype=np.uint16)
    for source, (_, stream) in enumerate(streams.values()):
        usable = len(stream) // CONTEXT
        whole = stream[: usable * CONTEXT].reshape(usable, CONTEXT)
        whole = whole[np.random.default_rng(1).permutation(usable)]
        rows = np.flatnonzero(draws == source)
        mixed[rows] = whole[np.arange(len(rows)) % usable]
    return mixed


def build_model(init_seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(init_seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
        )
    )


def build_optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.model.layers.named_parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, momentum=0.95)
    return [muon, torch.optim.AdamW(others, lr=rate * 0.2, betas=(0.9, 0.95), weight_decay=0.0)]


def schedule(step: int, steps: int, warmup: int = 50, decay_share: float = 0.4) -> float:
    """Warm up, hold, then fall linearly to 2 % over the last part."""
    if step < warmup:
        return (step + 1) / warmup
    return min(1.0, max(0.02, (steps - step) / (steps * decay_share)))


def batch_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, stream: np.ndarray) -> float:
    usable = len(stream) // CONTEXT
    blocks = torch.from_numpy(stream[: usable * CONTEXT].astype(np.int64)).view(-1, CONTEXT)
    losses = [batch_loss(model, part).item() * len(part) for part in blocks.split(8)]
    return math.exp(sum(losses) / len(blocks))


def train(args: argparse.Namespace, blocks: np.ndarray, work: Path) -> LlamaForCausalLM:
    model = build_model()
    optimizers = build_optimizers(model, args.rate)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    compiled = torch.compile(model) if args.compile else model
    first, checkpoint = 0, work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first = saved["step"]
    steps = len(blocks) // args.batch
    started, log = time.perf_counter(), (work / "log.jsonl").open("a")
    running = 0.0
    for step in range(first, min(steps, args.stop or steps)):
        part = blocks[step * args.batch : (step + 1) * args.batch].astype(np.int64)
        length = CONTEXT if step >= steps * (1 - LONG_SHARE) else CONTEXT // 2
        ids = torch.from_numpy(part).view(-1, length)
        for micro in ids.split(args.micro // length):
            loss = batch_loss(compiled, micro) * len(micro) / len(ids)
            loss.backward()
            running += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            speed = (step + 1 - first) * args.batch * CONTEXT / (time.perf_counter() - started)
            line = {"step": step + 1, "of": steps, "loss": round(running / 10, 4)}
            log.write(json.dumps(line | {"tokens_per_second": round(speed)}) + "\n")
            log.flush()
            running = 0.0
        if (step + 1) % 100 == 0 or step + 1 == steps:
            states = [optimizer.state_dict() for optimizer in optimizers]
            aside = checkpoint.with_suffix(".tmp")
            saved = {"model": model.state_dict(), "optimizers": states, "step": step + 1}
            torch.save(saved, aside)
            aside.replace(checkpoint)
    return model


CARD = """# nano

A causal language model of {parameters:.1f} million parameters (Llama shape: hidden 256, 6 layers,
8 heads, 4 key-value heads, context 512, {vocabulary}-piece byte-level BPE, bf16), bundled with
`unmasked` for its demo and its tests. It is not meant for generation.

Trained from scratch by `scripts/pretrain_nano.py` on {tokens:.1f} M tokens:

| source | share of training tokens | texts read | perplexity per token, held-out texts |
|---|---|---|---|
{rows}

The docstrings are those of the Python packages on the machine where it was trained, without a fifth
of all modules, which are held out (`unmasked.files.docstrings.Docstring.held_out`). Wikipedia text
is CC BY-SA 3.0.
"""


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, card: str, folder: Path) -> None:
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", action="append", default=[], metavar="FILE=SHARE")
    parser.add_argument("--docstrings", type=float, default=0.0, metavar="SHARE")
    parser.add_argument("--tokens", type=int, default=11_000_000)
    parser.add_argument("--batch", type=int, default=16, help="blocks a step")
    parser.add_argument("--micro", type=int, default=2048, help="tokens a forward")
    parser.add_argument("--rate", type=float, default=0.02, help="Muon's; AdamW gets a fifth")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--stop", type=int, help="stop after this step, for a trial")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain-nano"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    sources = load_sources(args)
    vocabulary = args.work / "tokenizer.json"
    if not vocabulary.exists():
        learn_tokenizer(sources, bytes_read=30_000_000).save(str(vocabulary))
    tokenizer = Tokenizer.from_file(str(vocabulary))
    streams, held_out = {}, {}
    for name, (share, texts) in sources.items():
        held_out[name] = encode_documents(tokenizer, texts[-HELD_OUT_LINES:])
        streams[name] = (share, encode_documents(tokenizer, texts[:-HELD_OUT_LINES]))
        print(f"{name}: {len(texts)} texts, {len(streams[name][1])} tokens", file=sys.stderr)
    blocks = mix_blocks(streams, args.tokens)
    del streams
    model = train(args, blocks, args.work)
    rows = "\n".join(
        f"| {name} | {share:.0%} | {len(texts)} | {perplexity(model, held_out[name]):.1f} |"
        for name, (share, texts) in sources.items()
    )
    card = CARD.format(
        parameters=model.num_parameters() / 1e6,
        vocabulary=VOCABULARY,
        tokens=blocks.size / 1e6,
        rows=rows,
    )
    save(model, tokenizer, card, args.output)
    print(rows)


if __name__ == "__main__":
    main()
