"""Parts of `benchmarks/gpu.py` that train, or run commands as a user would.

Each returns its figures, and raises where sides disagree or a command fails. The steps are those of
`benchmarks/steps.py`, on the shape of Qwen3-0.6B.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_parts, steps, train
from benchmarks.gpu_parts import Found, Setting, build, cosine, free, peak, seconds
from benchmarks.texts import read_sentences
from unmasked import LLM2Vec
from unmasked.checkpoint.location import bundled_path
from unmasked.forward.compiling import compile_layers
from unmasked.forward.packing import enable_packing
from unmasked.mask.opening import decoder_of

FEW_STEPS = [
    "mntp.steps=4",
    "simcse.steps=4",
    "mntp.warmup_steps=0",
    "simcse.warmup_steps=0",
    "mntp.batch_size=8",
    "simcse.batch_size=8",
    "mntp.lora.dropout=0",
    "simcse.lora.dropout=0",
]


def step(setting: Setting, stage: str, checkpointing: bool) -> Found:
    """One optimiser step of the 0.6B against stock's, and its memory against the plan's.

    On a GPU our layers are compiled, except where the rival is to checkpoint: that part says what a
    step takes without. A rival for which the memory does not suffice checkpoints as well.
    """
    try:
        return _step(setting, stage, checkpointing, compiles=not checkpointing)
    except torch.OutOfMemoryError:
        free(setting)
        found = _step(setting, stage, True, compiles=not checkpointing)
        return found | {"stock": "checkpointed: it does not fit into the memory without"}


def _step(setting: Setting, stage: str, checkpointing: bool, compiles: bool) -> Found:
    sizes = {"mntp": 32, "simcse": 256, "supervised": 64}
    rows = 2 if setting.tiny else sizes[stage]
    with tempfile.TemporaryDirectory() as work:
        decoder = Path(work) / "decoder"
        config = setting.config("Qwen3-0.6B")
        del config.is_causal
        steps.save_decoder(decoder, str(bundled_path()), config)
        texts = read_sentences(setting.data).english
        sides = steps.STAGES[stage](decoder, texts, rows, checkpointing)
        decoder_model: Any = sides.ours.model
        trunk = getattr(decoder_model, "trunk", None) or decoder_model[0].auto_model
        compiled, begun = False, time.perf_counter()
        with steps.forward_precision():
            enable_packing(decoder_of(trunk))  # what is compared is what will run
            if setting.on_gpu and compiles:
                decoder_of(trunk).enable_input_require_grads()
                compiled = compile_layers(decoder_of(trunk), training=True) is None
        checked = time.perf_counter() - begun
        found = train.measure(sides, 1 if setting.tiny else 8 if setting.on_gpu else 3)
        weights = sum(p.numel() for n, p in trunk.named_parameters() if "embed" not in n)
        flops = 4 * weights * found["tokens_per_second"]
        found |= {
            "compiled": compiled,
            "checking_and_compiling": checked,
            "share_of_peak": flops / peak(setting),
            "planned_bytes": planned(stage, decoder, rows, compiled),
            "profile": gpu_parts.kernels(setting, sides.ours.step),
        }
    return found


def planned(stage: str, decoder: Path, rows: int, compiled: bool) -> int:
    """What `unmasked plan` says that a step adds to the weights."""
    from unmasked.recipe.schema import Recipe
    from unmasked.train.plan.cost import make_plan

    data = decoder.parent / "pairs.jsonl" if stage == "supervised" else decoder.parent / "texts.txt"
    if stage == "supervised":
        data.write_text('{"query": "a", "positive": "b", "negative": "c"}\n' * 64)
    else:
        data.write_text("a sentence of some words, as long as others are\n" * 64)
    given: Found = {"data": str(data), "batch_size": rows}
    if stage == "mntp":
        given |= {"block_length": steps.BLOCK, "micro_batch_tokens": rows * steps.BLOCK}
    model = {"base": str(decoder), "compile": "always" if compiled else "never"}
    recipe = {"name": "plan", "model": model, stage: given}
    memory = make_plan(Recipe.model_validate(recipe)).stages[0].memory
    return memory.total - memory.weights


def demo(setting: Setting) -> Found:
    """The demo as a user starts it; `--quick` where all is tiny."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "unmasked", "demo", "-o", f"{work}/demo"]
        begun = time.perf_counter()
        said = subprocess.run(
            command + (["--quick"] if setting.tiny else []), capture_output=True, text=True
        )
        if said.returncode:
            raise RuntimeError(said.stderr[-2000:])
        return {"seconds": time.perf_counter() - begun}


def vllm(setting: Setting, shape: str) -> Found:
    """VLLM on the same saved folder, where it is installed."""
    if not find_spec("vllm"):
        return {"left_out": "vllm is not installed"}
    from vllm import LLM

    ours, _ = build(setting, shape)
    texts = setting.texts("short", 4096)
    with tempfile.TemporaryDirectory() as folder:
        ours.save(folder)
        expected = ours.encode(texts[:32])
        own = seconds(lambda: ours.encode(texts), setting, 2)
        engine = LLM(folder, runner="pooling", gpu_memory_utilization=0.5)
        found = np.array([out.outputs.embedding for out in engine.embed(texts[:32])])
        theirs = seconds(lambda: engine.embed(texts), setting, 2)
    return {"vs_vllm": theirs / own, "least_cosine": cosine(expected, found)}


def several_devices(setting: Setting, count: int) -> Found:
    """README's commands for many devices, against one process with the same recipe."""
    launchers = {
        "one": [sys.executable, "-m"],
        "torchrun": ["torchrun", f"--nproc-per-node={count}", "-m"],
    }
    if setting.on_gpu:  # accelerate shares weights among accelerators only
        start = ["accelerate", "launch", f"--num_processes={count}"]
        launchers["accelerate, DDP"] = [*start, "--multi_gpu", "-m"]
        launchers["accelerate, FSDP2"] = [*start, "--use_fsdp", "--fsdp_version", "2", "-m"]
    found: Found = {}
    with tempfile.TemporaryDirectory() as work:
        corpus, texts = Path(work) / "texts.txt", read_sentences(setting.data).english[:400]
        corpus.write_text("\n".join(texts), encoding="utf-8")
        files = [f"mntp.data={corpus}", f"simcse.data={corpus}"]
        recipe = ["unmasked", "run", "nano", *files, *FEW_STEPS]
        for name, start in launchers.items():
            output, begun = Path(work) / name.replace(", ", "-"), time.perf_counter()
            command = [*start, *recipe, "-o", str(output)]
            said = subprocess.run(command, capture_output=True, text=True)
            if said.returncode:
                found[name] = {"failed": said.stderr[-1000:]}
                continue
            model = LLM2Vec.from_pretrained(output / "model", dtype="float32")
            found[name] = {
                "seconds": time.perf_counter() - begun,
                "vectors": model.encode(texts[:32]),
            }
    reference = found["one"].pop("vectors", None)
    for figures in found.values():
        if "vectors" in figures:
            figures["least_cosine_to_one"] = cosine(reference, figures.pop("vectors"))
    for figures in found.values():
        if not figures.get("least_cosine_to_one", 1) > 0.999:
            figures["failed"] = "the trained model differs from that of one process"
    if failed := [name for name, figures in found.items() if "failed" in figures]:
        raise RuntimeError(f"{', '.join(failed)}: {found[failed[0]]['failed']}")
    return found
