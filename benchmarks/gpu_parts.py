"""Parts of `benchmarks/gpu.py` that encode: each returns figures, and raises where sides disagree.

Weights are random, of the shapes of Qwen3-0.6B and Llama-3-8B: speed does not depend on them, and
nothing has to be fetched. Rivals get the very same weights and texts, and their best batch size.
"""

from __future__ import annotations

import copy
import gc
import inspect
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, LlamaConfig, PretrainedConfig, Qwen3Config

from benchmarks.encode import gemm_peak, useful_flops
from benchmarks.texts import build_mixes, read_sentences
from unmasked import LLM2Vec
from unmasked.checkpoint.location import bundled_path
from unmasked.forward.compiling import is_compiled

SHAPES: dict[str, PretrainedConfig] = {
    "Qwen3-0.6B": Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "Llama-3-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 8192, "layer_types": None,
}  # fmt: skip
RIVAL_BATCHES = (32, 128, 512)
LEAST_COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.98}
"""Between ours and the rival's vectors; a deep random model in bfloat16 drifts by itself."""
LONGEST_KERNELS = 12
"""Kernels that a profile names."""
GPU_TESTS = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/forward"]

Found = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where the parts run, and how large they are.

    Attributes:
        device: of the models.
        tiny: two layers and few texts: does the script work?
        data: folder of texts; None uses the docstrings of the installed packages.
    """

    device: torch.device
    tiny: bool = False
    data: Path | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether there is something to measure."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def config(self, shape: str) -> PretrainedConfig:
        """The shape's config, or a tiny one of its family; the mask is open."""
        config = copy.deepcopy(SHAPES[shape])
        fields = config.to_dict() | (TINY if self.tiny else {}) | {"is_causal": False}
        return type(config)(**{k: v for k, v in fields.items() if v is not None})

    def texts(self, mix: str, count: int) -> list[str]:
        """Different texts of a mix of `benchmarks/texts.py`."""
        words = AutoTokenizer.from_pretrained(bundled_path())
        found = read_sentences(self.data)
        made = build_mixes(found, {mix: count}, lambda text: len(words.tokenize(text)))[mix]
        return [f"{number} {text}" for number, text in enumerate(made)]


def environment(setting: Setting) -> Found:
    """Versions, the device, signatures that differ from one torch to the next, and the peak."""
    import sentence_transformers
    import transformers

    import unmasked

    found: Found = {
        "unmasked": unmasked.__version__, "torch": torch.__version__, "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "sentence-transformers": sentence_transformers.__version__,
        "device": setting.device.type, "peak_tflops": peak(setting) / 1e12,
    }  # fmt: skip
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(setting.device)
        found |= {"device": properties.name, "memory_gib": properties.total_memory / 2**30}
        found["capability"] = torch.cuda.get_device_capability(setting.device)
    try:
        from torch.nn.attention.varlen import varlen_attn

        found["varlen_attn"] = str(inspect.signature(varlen_attn))
    except ImportError as error:
        found["varlen_attn"] = str(error)
    libraries = ("flash_attn", "liger_kernel", "cut_cross_entropy", "torchao", "vllm", "triton")
    return found | {"installed": [name for name in libraries if find_spec(name)]}


def gpu_tests(setting: Setting) -> Found:
    """The tests that need a GPU; without one they are collected, and skip themselves."""
    root = Path(__file__).parents[1]
    command = [sys.executable, *GPU_TESTS, *([] if setting.on_gpu else ["--collect-only"])]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    if said.returncode not in (0, 5):
        raise RuntimeError(said.stdout[-2000:])
    return {"tests": said.stdout.strip().splitlines()[-1]}


def peak(setting: Setting) -> float:
    """FLOP/s of a large matrix product, measured now."""
    return gemm_peak(setting.dtype, setting.device)


def build(setting: Setting, shape: str, **options: Any) -> tuple[LLM2Vec, SentenceTransformer]:
    """Ours, and stock sentence-transformers with a copy of the same trunk, attention by sdpa."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        trunk = AutoModel.from_config(setting.config(shape), dtype=setting.dtype).eval()
    copied = copy.deepcopy(trunk)
    words = AutoTokenizer.from_pretrained(bundled_path())
    ours = LLM2Vec(trunk, words, doc_max_length=None, device=str(setting.device), **options)
    with tempfile.TemporaryDirectory() as folder:  # a stock encoder of the same tokenizer
        small = type(trunk.config)(**(trunk.config.to_dict() | TINY | {"layer_types": None}))
        LLM2Vec(AutoModel.from_config(small), words, doc_max_length=None, device="cpu").save(folder)
        stock = SentenceTransformer(folder, device=str(setting.device))
    copied.set_attn_implementation("sdpa")
    stock[0].model = copied
    return ours, stock


def seconds(run: Callable[[], Any], setting: Setting, rounds: int) -> float:
    """The median of some runs, to the end of the device's work."""
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        if setting.on_gpu:
            torch.cuda.synchronize(setting.device)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """The least one over (N, D) vectors."""
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (first, second))
    return float((a * b).sum(axis=1).min())


def encode(setting: Setting, shape: str) -> Found:
    """Short and mixed texts against stock at its best batch size; then one long job.

    On a GPU the layers are compiled, and compared with themselves as they were as well.
    """
    ours, stock = build(setting, shape)
    ours.compiles = "never"
    many = 40 if setting.tiny else 16384 if "0.6B" in shape else 2048
    few = many if setting.tiny else many // 4
    found: Found = {}
    for mix in ("short", "mixed"):
        texts = setting.texts(mix, many)
        some = texts[:few]
        ours.encode(texts[: many // 2])  # warms up
        plain = None
        if setting.on_gpu and not is_compiled(ours.backbone.auto_model):
            plain = seconds(lambda some=some: ours.encode(some), setting, 1)
            ours.compiles, begun = "always", time.perf_counter()
            ours.encode(texts[:64])
            found["compiling"] = time.perf_counter() - begun
            ours.encode(texts[: many // 2])
        least = cosine(ours.encode(texts[:64]), stock.encode(texts[:64], batch_size=8))
        if not least >= LEAST_COSINE[setting.dtype]:
            raise RuntimeError(f"vectors differ from stock's (least cosine {least:.5f})")
        figures = speed(setting, ours, texts) | {"least_cosine": least}
        figures["compiled"] = bool(getattr(ours.backbone.auto_model, "layers_compiled", False))
        own = seconds(lambda some=some: ours.encode(some), setting, 1)
        rivals = {
            size: seconds(lambda s=size, t=some: stock.encode(t, batch_size=s), setting, 1)
            for size in RIVAL_BATCHES
        }
        if plain is not None:
            figures["vs_plain"] = plain / own
        best = min(rivals, key=lambda size: rivals[size])
        figures |= {"stock_best_batch": best, "vs_stock": rivals[best] / own}
        found[mix] = figures | {f"vs_stock_{size}": t / own for size, t in rivals.items()}
    if "0.6B" in shape:
        found["long"] = speed(
            setting, ours, setting.texts("short", 200 if setting.tiny else 100_000), 1
        )
    return found | ({"busy": busy(setting, ours, texts[:few])} if setting.on_gpu else {})


def speed(setting: Setting, model: LLM2Vec, texts: list[str], rounds: int = 3) -> Found:
    """Tokens a second, their share of the product's peak, and the time that the device waited."""
    lengths = [len(row.ids) for row in model.backbone.tokenize_inputs(texts)]
    clock = model.backbone.device_time
    before, worked = clock.passed, clock.worked
    took = seconds(lambda: model.encode(texts), setting, rounds)
    share = useful_flops(model, lengths) / took / peak(setting)
    waited = max(0.0, 1 - (clock.worked - worked) / (clock.passed - before))
    return {"texts": len(texts), "mean_tokens": statistics.mean(lengths),
            "tokens_per_second": sum(lengths) / took, "share_of_peak": share,
            "waited": waited}  # fmt: skip


def busy(setting: Setting, model: LLM2Vec, texts: list[str]) -> Found:
    """By the profiler: time in kernels over wall time; and calls that waited for the device."""
    import warnings

    found = kernels(setting, lambda: model.encode(texts))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            model.encode(texts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sorted(
        {f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchron" in str(w.message)}
    )
    return found | {"waits_at": waits}


def kernels(setting: Setting, run: Callable[[], Any]) -> Found:
    """By the profiler: time in kernels over wall time, how many there were, and the longest."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if setting.on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as measured:
        took = seconds(run, setting, 1)
    events: Any = measured.key_averages()
    spent = {
        e.key: e.self_device_time_total if setting.on_gpu else e.self_cpu_time_total for e in events
    }
    longest = sorted(spent, key=lambda name: -spent[name])[:LONGEST_KERNELS]
    return {
        "kernels_over_wall": sum(spent.values()) / 1e6 / took,
        "kernels": sum(event.count for event in events),
        "longest_ms": "; ".join(f"{spent[name] / 1e3:.1f} {name[:50]}" for name in longest),
    }


def free(setting: Setting) -> None:
    """Give back what a part has used."""
    gc.collect()
    if setting.on_gpu:
        torch.cuda.empty_cache()
