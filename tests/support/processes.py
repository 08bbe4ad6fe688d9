"""What `test_devices` does in one process, or in several that know of each other as torchrun's do.

The processes come from a fork server that has the libraries loaded.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import BatchSampler, RandomSampler
from transformers import TrainerCallback, TrainingArguments, default_data_collator, set_seed

from unmasked import LLM2Vec
from unmasked.checkpoint import adapters, loading
from unmasked.errors import RecipeError
from unmasked.recipe.schema import MNTP, Pairs, Recipe, SimCSE, Supervised
from unmasked.train import checkpoints, devices
from unmasked.train.callback import Listener, StageCallback
from unmasked.train.data.mixing import PairCollator
from unmasked.train.losses.mntp import BlockData, MaskedNextTokenModel, Masking
from unmasked.train.losses.simcse import TwoViewsLoss
from unmasked.train.losses.supervised import RankingLoss
from unmasked.train.run import Run
from unmasked.train.trainer import ContrastiveTrainer, StageTrainer, stage_arguments

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["unmasked.train.run"])

SETTINGS = {"steps": 2, "batch_size": 8, "log_steps": 1, "learning_rate": 1e-2, "eval_steps": 100}
WORDS = ["cat", "sat", "mat", "looked", "another", "dog", "near", "tree", "while", "rain"]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def environment(rank: int, count: int, port: str) -> dict[str, str]:
    """What torchrun tells a process; nothing where it is alone."""
    if count == 1:
        return {}
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip


def together(count: int, work: Callable[..., None], *given: object, **more: str) -> None:
    """The same work in several processes, with more in their environment."""
    port = free_port()
    started = [
        PROCESSES.Process(
            target=_as_rank, args=(environment(rank, count, port) | more, work, *given)
        )
        for rank in range(count)
    ]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(200)
        assert [process.exitcode for process in started] == [0] * count
    finally:
        for process in started:
            process.kill()  # one that waits for another that failed


def _as_rank(variables: dict[str, str], work: Callable[..., None], *given: object) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest in the background ignores it
    os.environ |= {**variables, "CUDA_VISIBLE_DEVICES": ""}
    if "ACCELERATE_TORCH_DEVICE" in variables:
        _take_cpus_for_accelerators()
    devices.join()
    work(*given)
    devices.leave()


def _take_cpus_for_accelerators() -> None:
    """accelerate shares weights (FSDP) among accelerators only, though torch can on CPUs too."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_XPU)


# --- gradients --------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """Keeps the gradient that each optimiser step is made of."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seen: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        weights = [p for p in trained(model).parameters() if p.requires_grad]
        grads = [p.grad.full_tensor() if isinstance(p, DTensor) else p.grad for p in weights]
        cut = sum(isinstance(module, FSDPModule) for module in model.modules())
        self.seen.append(torch.cat([grad.flatten() for grad in grads]))
        torch.save({"gradients": self.seen, "cut": cut}, f"{self.file}-{devices.rank()}.pt")


def encoder_of(decoder: str) -> LLM2Vec:
    """With a LoRA without dropout whose B is not zero, so that every gradient counts."""
    encoder = LLM2Vec.from_pretrained(decoder, device="cpu")
    set_seed(0)
    peft_model = adapters.attach(encoder.backbone.auto_model, rank=4, dropout=0.0)
    for name, weight in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    encoder.backbone.auto_model = peft_model
    return encoder


def trained(model: torch.nn.Module) -> torch.nn.Module:
    """The trunk inside the model of a stage."""
    return model.trunk if hasattr(model, "trunk") else model.backbone.auto_model


def mntp_trainer(decoder: str, folder: Path, callbacks: list) -> StageTrainer:
    encoder = encoder_of(decoder)
    head = loading.load_causal_lm(decoder, torch.float32)
    ids = np.random.default_rng(0).integers(10, 300, (32, 24))
    settings = MNTP.model_validate({**SETTINGS, "block_length": 24})
    return StageTrainer(
        callback=callbacks[0],
        model=MaskedNextTokenModel(encoder.backbone.auto_model, head),
        args=TrainingArguments(
            **stage_arguments(settings, folder, 0, most_rows=2),
            remove_unused_columns=False,
            label_names=["labels"],
        ),
        data_collator=default_data_collator,
        train_dataset=BlockData(ids, Masking(5, 300, (0, 1)), 0),
        others=callbacks[1:],
    )


def simcse_trainer(decoder: str, folder: Path, callbacks: list) -> ContrastiveTrainer:
    encoder = encoder_of(decoder)
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, draw.integers(2, 12))) for _ in range(64)]
    settings = SimCSE.model_validate({**SETTINGS, "max_length": 24})
    return contrastive_trainer(
        settings, folder, callbacks, encoder, TwoViewsLoss(encoder, 0.05),
        lambda texts: {f"text_{k}": v for k, v in encoder.preprocess(texts, max_length=24).items()},
        texts,
    )  # fmt: skip


def supervised_trainer(decoder: str, folder: Path, callbacks: list) -> ContrastiveTrainer:
    """On several processes in forwards of few tokens, of which one has more than another."""
    encoder = encoder_of(decoder)
    settings = Supervised.model_validate(
        {**SETTINGS, "warmup_steps": 0, "data": ["none.jsonl"], "max_length": 24}
    )
    return contrastive_trainer(
        settings, folder, callbacks, encoder,
        RankingLoss(encoder, 0.05, None if devices.world() == 1 else 40),
        PairCollator(encoder.preprocess, [Pairs(path="none.jsonl")], 1, 24),
        Dataset.from_list(pairs(64)),
    )  # fmt: skip


def contrastive_trainer(
    settings, folder: Path, callbacks: list, encoder, loss, collate, rows
) -> ContrastiveTrainer:
    arguments = stage_arguments(settings, folder, 0, label_names=[], ddp_broadcast_buffers=False)
    size = arguments["per_device_train_batch_size"]
    order = RandomSampler(rows, generator=torch.Generator().manual_seed(0))
    return ContrastiveTrainer(
        callback=callbacks[0],
        loss=loss,
        batches=(BatchSampler(order, size, drop_last=True), None),
        model=encoder,
        args=TrainingArguments(**arguments),
        data_collator=collate,
        train_dataset=rows,
        others=callbacks[1:],
    )


def pairs(count: int) -> list[dict]:
    """Rows whose texts are of very different lengths."""
    draw = np.random.default_rng(0)

    def text(i: int, most: int) -> str:
        return " ".join(draw.choice(WORDS, draw.integers(1, most))) + f" {i}"

    return [
        {"query": text(i, 6), "positive": text(i, 20), "negatives": [f"no {i}"], "source": 0,
         "number": i}
        for i in range(count)
    ]  # fmt: skip


TRAINERS = {"mntp": mntp_trainer, "simcse": simcse_trainer, "supervised": supervised_trainer}


def record(kind: str, decoder: str, folder: Path, name: str) -> None:
    """Train two steps of a kind, and save the gradient of each."""
    callback = StageCallback(2, folder / f"{name}.jsonl")
    trainer = TRAINERS[kind](decoder, folder / name, [callback, Recorder(folder / name)])
    trainer.args.max_grad_norm = 1e9  # the norm is taken, nothing is clipped
    devices.prepare_sharding(trainer, trained(trainer.model), kind)
    with checkpoints.trained_weights_only(trainer.model):
        trainer.train()


# --- runs -------------------------------------------------------------------------------------


def run_once(recipe: dict, folder: Path) -> None:
    """A run whose processes have all weights each."""
    Run(Recipe.model_validate(recipe), folder / "unshared").run()


def run_twice(recipe: dict, folder: Path) -> None:
    """A run with shared weights left alone, and one that Ctrl-C stops once in each stage."""
    checked = Recipe.model_validate(recipe)
    Run(checked, folder / "left_alone").run()
    for name, _ in checked.stages():
        at = []

        def stop(step: int, steps: int, measured: dict, name: str = name, at: list = at) -> None:
            if at[-1:] == [name] and step == 2:
                at.append("stopped")
                os.kill(os.getpid(), signal.SIGINT)  # the first process alone

        with suppress(KeyboardInterrupt):
            Run(checked, folder / "stopped", None, Listener(stage=at.append, step=stop)).run()
        saved = (folder / "stopped" / name).glob("checkpoint-*/optimizer.bin")
        assert len(list(saved)) == 1, f"{name} was not stopped, or its weights not shared"
    Run(checked, folder / "stopped").run()


def refused_on_cpus() -> None:
    wanted = "ACCELERATE_USE_FSDP" not in os.environ  # else the launcher was asked
    with pytest.raises(RecipeError, match="no accelerator"):
        devices.check_sharding(wanted, "mntp.trainer.fsdp")
