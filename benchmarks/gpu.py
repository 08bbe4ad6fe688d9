"""One command that says whether all of this is right and fast on a GPU.

Each part compares before it times; a part that fails is reported, and the rest goes on. No network
is used and weights are random. On one H100 it takes some eight minutes; a part that would begin
after `--minutes` is left out, and says so.

    python -m benchmarks.gpu --json gpu.json
    python -m benchmarks.gpu --device cpu --tiny     # does the script itself work?
    python -m benchmarks.gpu --devices 2             # README's commands for many devices, alone
    python -m benchmarks.gpu --parts environment encode:Llama-3-8B
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import gpu_parts, gpu_runs
from benchmarks.gpu_parts import SHAPES, Found, Setting
from benchmarks.steps import STAGES

NOT_SHOWN = ("varlen_attn", "note")


def parts(setting: Setting, devices: int | None) -> dict[str, Callable[[], Found]]:
    """The parts by name, in order; what matters most comes first."""
    if devices is not None:
        return {
            "environment": partial(gpu_parts.environment, setting),
            "devices": partial(gpu_runs.several_devices, setting, devices),
        }
    found: dict[str, Callable[[], Found]] = {
        "environment": partial(gpu_parts.environment, setting),
        "tests": partial(gpu_parts.gpu_tests, setting),
    }
    for shape in SHAPES:
        found[f"encode:{shape}"] = partial(gpu_parts.encode, setting, shape)
    for stage in STAGES:
        found[f"step:{stage}"] = partial(gpu_runs.step, setting, stage, checkpointing=False)
    found["demo"] = partial(gpu_runs.demo, setting)
    for stage in STAGES:
        name = f"step:{stage}, stock checkpointed"
        found[name] = partial(gpu_runs.step, setting, stage, checkpointing=True)
    found["vllm:Qwen3-0.6B"] = partial(gpu_runs.vllm, setting, "Qwen3-0.6B")
    return found


def run(chosen: dict[str, Callable[[], Found]], setting: Setting, minutes: float) -> Found:
    """Every part's figures, or why it has none."""
    report: Found = {}
    begun = time.monotonic()
    for name, part in chosen.items():
        if time.monotonic() - begun > minutes * 60:
            report[name] = {"left_out": f"{minutes:g} minutes were over"}
            continue
        started = time.monotonic()
        try:
            report[name] = part()
        except (Exception, SystemExit) as error:  # whatever it is, the other parts are wanted
            traceback.print_exc()
            report[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        report[name]["took"] = time.monotonic() - started
        gpu_parts.free(setting)
        print(f"{name}: {report[name]['took']:.0f} s", flush=True)
    return report


def markdown(report: Found) -> str:
    """A table of all figures, a row for each part, or for each mix of one."""
    rows = ["| part | what | figures |", "|---|---|---|"]
    for name, found in report.items():
        plain = {k: v for k, v in found.items() if not isinstance(v, dict) and k not in NOT_SHOWN}
        inner = {k: v for k, v in found.items() if isinstance(v, dict)}
        for what, figures in [("", plain), *inner.items()]:
            said = ", ".join(f"{key} {_shown(value)}" for key, value in figures.items())
            rows.append(f"| {name} | {what} | {said} |".replace("\n", " "))
    return "\n".join(rows)


def _shown(value: Any) -> str:
    return (
        f"{value:,.0f}"
        if isinstance(value, float) and value >= 100
        else (f"{value:.4g}" if isinstance(value, float) else str(value))
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Everything about speed on a GPU, in one run.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="two layers, few texts")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these, by their names")
    parser.add_argument("--minutes", type=float, default=8, help="no part begins after so many")
    parser.add_argument("--devices", type=int, metavar="N", help="the commands for N devices alone")
    parser.add_argument("--data", type=Path, help="folder with text/enwiki_sentences.txt.gz")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts and print their table; ends with 1 if one failed."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU. Fix: --device cpu --tiny tries the script without one.")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    setting = Setting(torch.device(options.device), options.tiny, options.data)
    every = parts(setting, options.devices)
    if unknown := set(options.parts or ()) - every.keys():
        raise SystemExit(f"no part {', '.join(unknown)}. Allowed: {', '.join(every)}.")
    report = run({n: every[n] for n in options.parts or every}, setting, options.minutes)
    print(f"\n{markdown(report)}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2, default=str) + "\n", "utf-8")
    if failed := [name for name, found in report.items() if "failed" in found]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
