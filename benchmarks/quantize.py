"""8-bit weights on a CPU: ours against the libraries' and against full precision.

Random weights of Llama's architecture at three widths, the same texts, packed alike; the ways take
turns, and the median of five rounds of CPU time counts, on one thread. Beside the speed stand the
least cosine to float32 vectors, and the least one between a text alone and among the others: with
one scale for all tokens of a forward, a vector depends on its batch.

    python -m benchmarks.quantize            # torchao takes its turn where it is installed
    python -m benchmarks.quantize --exports onnx openvino   # with 8-bit weights as well
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, LlamaConfig

from benchmarks.encode import SMOLLM_135M
from benchmarks.texts import read_sentences
from unmasked import LLM2Vec
from unmasked.checkpoint.location import bundled_path
from unmasked.export.engines import engine_of
from unmasked.export.exporting import export_model
from unmasked.forward.quantization import quantize

SHAPES = {
    256: {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6},
    576: {"num_hidden_layers": 10},
    2048: {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2},
}
HEADS = {256: (4, 4), 576: (9, 3), 2048: (32, 8)}
FULL = "bfloat16"
ALONE = 16  # texts that are also encoded by themselves


def encoder(width: int, dtype: torch.dtype) -> LLM2Vec:
    """A random encoder of a width; the same weights each time."""
    heads, shared = HEADS[width]
    shape = {**SMOLLM_135M, **SHAPES[width]}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": shared}
    torch.manual_seed(0)
    model = AutoModel.from_config(LlamaConfig(**shape, is_causal=False), dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(bundled_path())
    return LLM2Vec(model.to(dtype), words, doc_max_length=None, device="cpu")


def ours(model: LLM2Vec) -> None:
    """What `quantize="int8"` does."""
    quantize(model, model.backbone.auto_model, "int8")


def dynamic(model: LLM2Vec) -> None:
    """Torch's own, deprecated; it wants a float32 trunk."""
    trunk = model.backbone.auto_model
    torch.ao.quantization.quantize_dynamic(trunk, {nn.Linear}, torch.qint8, inplace=True)


def torchao(model: LLM2Vec) -> None:
    """Dynamic int8 of torchao, without `torch.compile`."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model.backbone.auto_model, Int8DynamicActivationInt8WeightConfig())


WAYS: dict[str, tuple[torch.dtype, Callable[[LLM2Vec], None] | None]] = {
    FULL: (torch.bfloat16, None),
    "float32": (torch.float32, None),
    "unmasked": (torch.bfloat16, ours),
    "quantize_dynamic": (torch.float32, dynamic),
    "torchao": (torch.bfloat16, torchao),
}


class Export:
    """An encoder of a width, exported with 8-bit weights; texts of like length share a batch."""

    def __init__(self, width: int, kind: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            encoder(width, torch.float32).save(folder)
            output = Path(folder, kind)
            export_model(folder, kind, output, "int8", accept=True)
            self._vectors = engine_of(output).vectors

    def encode(self, texts: str | list[str]) -> np.ndarray:
        """As `LLM2Vec.encode`."""
        if isinstance(texts, str):
            return self._vectors([("", texts)])[0]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        return self._vectors([("", texts[i]) for i in order])[np.argsort(order)]


def least_cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Over (N, D) vectors."""
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (first, second))
    return float((a * b).sum(axis=1).min())


def measure(width: int, texts: list[str], rounds: int, exports: Sequence[str]) -> list[str]:
    """A row of the table for each way."""
    models: dict[str, Any] = {}
    for name, (dtype, change) in WAYS.items():
        if name != "torchao" or find_spec("torchao"):
            models[name] = encoder(width, dtype)
            if change is not None:
                change(models[name])
    models |= {f"{kind} int8": Export(width, kind) for kind in exports}
    vectors = {name: model.encode(texts) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            begun = time.process_time()
            model.encode(texts)
            seconds[name].append(time.process_time() - begun)
    rows = []
    for name, model in models.items():
        alone = np.stack([model.encode(text) for text in texts[:ALONE]])
        pairs = zip(seconds[FULL], seconds[name], strict=True)
        rows.append(
            f"| {width} | {SHAPES[width]['num_hidden_layers']} | {name} "
            f"| {median(full / this for full, this in pairs):.2f}× "
            f"| {least_cosine(vectors[name], vectors['float32']):.4f} "
            f"| {least_cosine(alone, vectors[name][:ALONE]):.4f} |"
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--exports", nargs="+", default=[], choices=("onnx", "openvino"))
    parser.add_argument("--data", type=Path, help="folder with text/enwiki_sentences.txt.gz")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    texts = read_sentences(options.data).english[: options.texts]
    print(f"| width | layers | way | vs {FULL} | least cosine to float32 | alone and in a batch |")
    print("|---|---|---|---|---|---|")
    for width in options.widths:
        for row in measure(width, texts, options.rounds, options.exports):
            print(row, flush=True)


if __name__ == "__main__":
    main()
