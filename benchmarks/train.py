"""Training speed and memory: each stage's step against the stock way of doing it.

A step is all of it: forward, backward, clipping, AdamW on the LoRA. `benchmarks/steps.py` says what
the stock way of each stage is; on a GPU both sides run under autocast, as training does.

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
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from benchmarks.encode import SMOLLM_135M, environment
from benchmarks.steps import STAGES, Stage, save_decoder
from benchmarks.texts import read_sentences
from unmasked import LLM2Vec
from unmasked.checkpoint.location import bundled_path

QUICK = {"mntp": 2, "simcse": 14, "supervised": 4}
FULL = {"mntp": 8, "simcse": 128, "supervised": 32}
"""Blocks, sentences and triplets a step. Larger batches pad more: the quick ones favour us less."""

OURS, STOCK = "unmasked", "stock"


LARGEST_DIFFERENCE = {"cpu": 1e-3, "cuda": 1.0}
"""Of the gradients, relative: in float32 on a CPU, and with bfloat16 forwards on a GPU.

There the limit only finds what is unrelated: with random weights all vectors are alike, and the
gradient of a contrastive loss is a small difference of large numbers. The figure is reported.
"""


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
    limit = LARGEST_DIFFERENCE[stage.ours.trained[0].device.type]
    if not difference <= limit or abs(our_loss - stock_loss) > limit:
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
        shape = {**SMOLLM_135M, "num_hidden_layers": options.layers, "tie_word_embeddings": True}
        save_decoder(decoder, options.tokenizer, LlamaConfig(**shape))
        name = f"SmolLM-135M's shape, {options.layers} layers, random weights"
        model = LLM2Vec.from_pretrained(decoder, dtype="float32")
        report["environment"] = environment(model, name, "float32", sentences.source)
        del model
        for key, value in report["environment"].items():
            print(f"- {key}: {value}")
        print(f"\n{HEADER}", flush=True)
        for stage in options.stages:
            given = {"checkpointing": True} if options.checkpointing else {}
            sides = STAGES[stage](decoder, sentences.english, sizes[stage], **given)
            report[stage] = measure(sides, options.rounds or (3 if options.quick else 5))
            print(markdown_row(stage, report[stage]), flush=True)
            del sides
            gc.collect()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
