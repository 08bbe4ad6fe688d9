"""One training step of each stage, ours and the stock way, on the same decoder and data.

The rivals are built from stock transformers and sentence-transformers on the same saved decoder
with the same adapter, the mask open, attention by sdpa:

* mntp: the causal LM's own loss, which computes the logits of every token, with gradient
  checkpointing, as the original scripts set it;
* simcse: the two views as two padded passes, with gradient checkpointing, as in the original;
* supervised: what the stock sentence-transformers trainer runs, padded passes (queries, then
  documents), without gradient checkpointing unless asked.

Both sides compute what real training computes: in float32 on a CPU; on a GPU with weights of
bfloat16, adapters of float32, and products under autocast to bfloat16.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from unmasked import LLM2Vec
from unmasked.checkpoint import adapters, loading
from unmasked.files import docstrings
from unmasked.files.docstrings import Docstring
from unmasked.forward import precision
from unmasked.recipe.schema import Pairs
from unmasked.text.tokens import TextTokenizer
from unmasked.train.data.mixing import PairCollator
from unmasked.train.data.texts import Blocks, token_file
from unmasked.train.losses.mntp import MaskedNextTokenModel, Masking
from unmasked.train.losses.simcse import TwoViewsLoss
from unmasked.train.losses.supervised import RankingLoss

BLOCK, MASKED, DROPOUT, TEMPERATURE = 512, 0.2, 0.3, 0.05
LONGEST = 256  # tokens of a supervised text


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
        # Fused, as transformers' trainer has it by default.
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0, fused=True)

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
    lengths: list[int]


def save_decoder(folder: Path, tokenizer: str, config: PretrainedConfig) -> None:
    """A decoder with random weights and its tokenizer, as a causal LM."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
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


def mntp_stage(decoder: Path, texts: list[str], rows: int, checkpointing: bool = True) -> Stage:
    """Blocks of 512, a fifth of the tokens scored; the rival alone has `checkpointing`."""
    encoder = LLM2Vec.from_pretrained(decoder, dtype=weights())
    tokens: TextTokenizer = encoder.backbone.tokens
    corpus = decoder.parent / "corpus.txt"
    corpus.write_text("\n".join(texts), encoding="utf-8")
    file = token_file([corpus], None, tokens, decoder.parent)
    blocks = Blocks(file, np.arange(len(texts)), BLOCK)
    ids = torch.from_numpy(np.stack([blocks[i % len(blocks)] for i in range(rows)]))
    ids = ids.to(encoder.device)
    config = AutoConfig.from_pretrained(decoder)
    vocabulary = config.vocab_size
    masking = Masking(5, vocabulary, (0, 1), MASKED)
    batch = masking(ids.cpu(), torch.Generator().manual_seed(0))
    batch = {name: value.to(encoder.device) for name, value in batch.items()}
    head_dtype = getattr(torch, weights())
    head: Any = loading.load_causal_lm(decoder, head_dtype).to(encoder.device)
    ours = MaskedNextTokenModel(attach(encoder.backbone.auto_model), head)
    stock: Any = loading.load_causal_lm(decoder, head_dtype, "sdpa").to(encoder.device)
    stock.requires_grad_(False)
    stock.model = attach(stock.model, checkpointing)
    states = torch.randn(*ids.shape, config.hidden_size, device=ids.device, dtype=head_dtype)

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
        lengths=[BLOCK] * rows,
    )


def simcse_stage(decoder: Path, texts: list[str], rows: int, checkpointing: bool = True) -> Stage:
    """Two dropout views of sentences."""
    ours, stock = LLM2Vec.from_pretrained(decoder, dtype=weights()), _stock(decoder)
    ours.backbone.auto_model = attach(ours.backbone.auto_model)
    stock[0].model = attach(stock[0].model, checkpointing)
    batch = random.Random(0).sample(texts, rows)
    features = _moved(ours.preprocess(batch, max_length=128), ours.device)
    theirs = [_stock_features(stock, batch, 128) for _ in range(2)]
    two_views = TwoViewsLoss(ours, TEMPERATURE)
    two_passes = MultipleNegativesRankingLoss(stock, scale=1 / TEMPERATURE)
    return Stage(
        Side(ours, _noisy(ours, lambda: two_views([dict(features)], None))),
        Side(stock, _noisy(stock, lambda: two_passes([dict(f) for f in theirs], None))),
        tokens=2 * int(features["attention_mask"].sum()),
        padded=sum(f["input_ids"].numel() for f in theirs),
        note=f"{rows} sentences, two views",
        lengths=2 * features["attention_mask"].sum(dim=1).tolist(),
    )


def supervised_stage(
    decoder: Path, texts: list[str], rows: int, checkpointing: bool = False
) -> Stage:
    """A summary has to find its docstring; another docstring is the hard negative."""
    ours, stock = LLM2Vec.from_pretrained(decoder, dtype=weights()), _stock(decoder)
    ours.backbone.auto_model = attach(ours.backbone.auto_model)
    stock[0].model = attach(stock[0].model, checkpointing)
    found = _pairs()
    chosen = random.Random(0).sample(found, 2 * rows)
    answers, negatives = chosen[:rows], [d.body for d in chosen[rows:]]
    collate = PairCollator(ours.preprocess, [Pairs(path="docstrings")], 1, LONGEST)
    batch = collate(
        [
            {"query": d.summary, "positive": d.body, "negatives": [n], "source": 0, "number": i}
            for i, (d, n) in enumerate(zip(answers, negatives, strict=True))
        ]
    )
    own = {k.removeprefix("text_"): v for k, v in batch.items() if k.startswith("text_")}
    features, labels = _moved(own, ours.device), batch["label"].to(ours.device)
    columns = [[d.summary for d in answers], [d.body for d in answers], negatives]
    theirs = [_stock_features(stock, column, LONGEST) for column in columns]
    loss = RankingLoss(ours, TEMPERATURE)
    stock_loss = MultipleNegativesRankingLoss(stock, scale=1 / TEMPERATURE)
    return Stage(
        Side(ours, _backward(lambda: loss([dict(features)], labels))),
        Side(stock, _backward(lambda: stock_loss([dict(f) for f in theirs], None))),
        tokens=int(features["attention_mask"].sum()),
        padded=sum(f["input_ids"].numel() for f in theirs),
        note=f"{rows} docstring triplets, one hard negative",
        lengths=features["attention_mask"].sum(dim=1).tolist(),
    )


@cache
def _pairs() -> list[Docstring]:
    return docstrings.pairs(docstrings.collect(limit=4000))


STAGES = {"mntp": mntp_stage, "simcse": simcse_stage, "supervised": supervised_stage}


def _backward(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with forward_precision():
            value = loss()
        value.backward()
        return value

    return run


def weights() -> str:
    """The type of the weights that training picks where it runs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return str(precision.pick("auto", device).dtype).removeprefix("torch.")


def forward_precision() -> AbstractContextManager[Any]:
    """What training computes forwards in: bfloat16 on a GPU, by autocast; float32 on a CPU."""
    if torch.cuda.is_available():
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def _noisy(model: Any, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """With SimCSE's attention dropout, which acts in train mode only."""
    trunk = model[0].auto_model if isinstance(model, LLM2Vec) else model[0].model

    def run() -> Tensor:
        with _set_dropout(trunk):
            return _backward(loss)()

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
        LLM2Vec.from_pretrained(decoder, dtype=weights()).save(work)
        options = {"attn_implementation": "sdpa", "dtype": getattr(torch, weights())}
        return SentenceTransformer(work, model_kwargs=options)


def _stock_features(model: SentenceTransformer, texts: list[str], length: int) -> dict[str, Any]:
    model.max_seq_length = length
    features = model.preprocess(texts, prompt=model.prompts[model.default_prompt_name or ""])
    return _moved(features, model.device)


def _moved(features: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in features.items()}
