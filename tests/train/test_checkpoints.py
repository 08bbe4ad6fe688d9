"""What a checkpoint holds, when it counts, and what the callback keeps in it."""

from __future__ import annotations

import errno
import json
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from transformers import AutoModelForCausalLM, Trainer

from unmasked.checkpoint import adapters
from unmasked.errors import OutputError, RecipeError
from unmasked.mask.opening import open_config
from unmasked.recipe.schema import Recipe
from unmasked.train import checkpoints
from unmasked.train.callback import StageCallback
from unmasked.train.losses.mntp import MaskedNextTokenModel
from unmasked.train.run import Run
from unmasked.train.trainer import ContrastiveTrainer, StageTrainer


def test_trainers_replace_public_methods_only():
    for trainer in (StageTrainer, ContrastiveTrainer):
        replaced = {name for name in vars(trainer) if hasattr(Trainer, name)}
        assert replaced >= {"compute_loss"}
        assert not {name for name in replaced if name.startswith("_") and name[:2] != "__"}


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_the_state_dict_has_what_is_trained_and_each_weight_once(method):
    """Also where head and embedding are one weight, which safetensors would refuse."""
    torch.manual_seed(0)
    config = open_config(tiny.config("llama", tie_word_embeddings=True))
    trunk = adapters.attach(tiny.model(config), rank=2, method=method)
    model = MaskedNextTokenModel(trunk, AutoModelForCausalLM.from_config(config))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    before = model.state_dict()
    with checkpoints.trained_weights_only(model):
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        assert kept.keys() == trained
        assert all("lora_" in name for name in kept) == (method != "full")
        for weight in model.parameters():
            weight.data.add_(1)
        model.load_state_dict(kept)
    after = model.state_dict()
    assert after.keys() == before.keys()  # the hooks are gone
    for name, value in kept.items():
        assert torch.equal(after[name], value)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(kept)
    if method == "full":
        assert torch.equal(after["head.lm_head.weight"], kept["trunk.embed_tokens.weight"])


def test_a_checkpoint_that_lacks_a_trained_weight_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    with checkpoints.trained_weights_only(model), pytest.raises(RuntimeError, match=r"0\.bias"):
        model.load_state_dict({"0.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("every", [{"log_steps": 2}, {"log_steps": 50, "save_steps": 3}, {}])
def test_a_training_that_has_diverged_ends_before_it_saves_anything(tiny_decoder, tmp_path, every):
    (tmp_path / "texts.txt").write_text("\n".join(f"a text of some words {i}" for i in range(60)))
    stage = {
        "data": str(tmp_path / "texts.txt"), "steps": 6, "batch_size": 4, "max_length": 8,
        "held_out": 0, "learning_rate": 1e30, "lora": {"rank": 2}, **every,
    }  # fmt: skip
    recipe = Recipe.model_validate(
        {"name": "t", "model": {"base": str(tiny_decoder)}, "simcse": stage}
    )
    said = "up to step %d: training has diverged. Fix: .* a lower simcse.learning_rate or a longer"
    for _ in range(2):
        with pytest.raises(RecipeError, match=said % min([*every.values(), 6])):
            Run(recipe, tmp_path / "run").run()
        assert not list((tmp_path / "run" / "simcse").glob("checkpoint-*"))
        assert not list((tmp_path / "run" / "simcse").glob("adapter*"))


def test_a_run_saves_the_adapter_alone_and_marks_it_last(tiny_decoder, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(f"a text of some words {i}" for i in range(60)))
    stage = {
        "data": str(tmp_path / "texts.txt"), "steps": 3, "batch_size": 4, "block_length": 8,
        "held_out": 0, "save_steps": 2, "log_steps": 10, "lora": {"rank": 2},
    }  # fmt: skip
    recipe = Recipe.model_validate(
        {"name": "t", "model": {"base": str(tiny_decoder)}, "mntp": stage}
    )
    found = {}

    class Kept(StageCallback):
        def on_save(self, args, state, control, **given):
            folder = tmp_path / "run" / "mntp" / f"checkpoint-{state.global_step}"
            assert checkpoints.last_checkpoint(folder.parent) is None or state.global_step > 2
            super().on_save(args, state, control, **given)
            found[state.global_step] = {path.name: path for path in folder.iterdir()}
            weights = load_file(folder / "model.safetensors")
            assert all("lora_" in name for name in weights)
            saved = json.loads((folder / "trainer_state.json").read_text())
            assert saved["stateful_callbacks"]["Kept"]["attributes"]["since"] == 0
            assert checkpoints.last_checkpoint(folder.parent) == (state.global_step, folder)
            assert len(list(folder.parent.glob("checkpoint-*"))) == 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unmasked.train.fitting.StageCallback", Kept)
        Run(recipe, tmp_path / "run").run()
    assert sorted(found) == [2, 3]
    for files in found.values():
        assert {"complete", "optimizer.pt", "rng_state.pth"} <= files.keys()


def test_what_is_not_complete_does_not_count_and_is_removed(tmp_path):
    for step, whole in ((2, True), (10, True), (11, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / checkpoints.COMPLETE).touch()
    assert checkpoints.last_checkpoint(tmp_path) == (10, tmp_path / "checkpoint-10")
    assert checkpoints.remove_incomplete(tmp_path)
    assert not checkpoints.remove_incomplete(tmp_path)
    checkpoints.complete(tmp_path / "checkpoint-10")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


@pytest.mark.parametrize("begun", [True, False])
def test_only_the_failure_to_save_is_told_as_one(begun, tmp_path):
    folder = tmp_path / "checkpoint-4"
    if begun:
        folder.mkdir()
    expected = OutputError if begun else RuntimeError
    with pytest.raises(expected) as raised, checkpoints.told_if_unsaved(tmp_path):
        raise RuntimeError("PytorchStreamWriter failed\nmore")
    if begun:
        told = "PytorchStreamWriter failed). There is none before it. Fix: make room"
        assert told in str(raised.value) and "more" not in str(raised.value)
        assert not folder.exists()


def test_a_place_in_the_source_of_torch_is_not_told(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(OutputError) as raised, checkpoints.told_if_unsaved(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    assert "enforce" not in str(raised.value) and "(the file was cut short)" in str(raised.value)


def test_a_folder_that_cannot_be_made_is_a_failure_to_save(tmp_path):
    refused = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "checkpoint-4"))
    with (
        pytest.raises(OutputError, match="No space left"),
        checkpoints.told_if_unsaved(tmp_path),
    ):
        raise refused


def step(callback: StageCallback, number: int, *losses: torch.Tensor) -> None:
    """One optimizer step of some forwards, as a trainer makes it."""
    args = SimpleNamespace(device=torch.device("cpu"), fp16=False)
    state = SimpleNamespace(global_step=number)
    control = SimpleNamespace(should_log=False, should_save=False, should_training_stop=False)
    callback.on_step_begin(args, state, control)
    for loss in losses:
        size = torch.tensor(8)
        callback.add(loss=loss, tokens=size, places=2 * size, forwards=torch.tensor(1), other=loss)
    callback.on_step_end(args, state, control)


def logged(callback: StageCallback, number: int) -> dict:
    args = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    state = SimpleNamespace(global_step=number, is_world_process_zero=True)
    logs = {"loss": 0.0, "grad_norm": 1.0, "learning_rate": 0.1, "epoch": 0.5}
    callback.on_log(args, state, None, logs)
    return logs


def test_sums_that_went_through_a_checkpoint_are_the_same_to_the_bit(tmp_path):
    """Whatever step it was saved at; and the order of a line's keys is fixed."""
    losses = torch.randn(7, 2) * 1e-3 + 5
    whole = StageCallback(7, tmp_path / "whole.jsonl")
    for number, pair in enumerate(losses, start=1):
        step(whole, number, *pair)
    expected = logged(whole, 7)
    mean = losses.flatten()[0]
    for loss in losses.flatten()[1:]:
        mean = mean + loss
    assert expected["loss"] == mean.item() / 7
    assert expected["padding"] == 0.5
    assert expected["other"] == mean.item() / 14
    for cut in range(1, 7):
        first, second = (StageCallback(7, tmp_path / f"{cut}.jsonl") for _ in range(2))
        for number in range(1, cut + 1):
            step(first, number, *losses[number - 1])
        saved = {"StageCallback": json.loads(json.dumps(first.state()))}
        begun = SimpleNamespace(
            stateful_callbacks=saved, is_world_process_zero=True, global_step=cut
        )
        second.on_train_begin(SimpleNamespace(seed=0), begun, None)
        for number in range(cut + 1, 8):
            step(second, number, *losses[number - 1])
        found = logged(second, 7)
        for name in ("loss", "padding", "other"):
            assert found[name] == expected[name]
        line = json.loads((tmp_path / f"{cut}.jsonl").read_text())
        told = ["step", "loss", "grad_norm", "learning_rate", "padding", "other", "epoch"]
        assert list(line) == [*told, "machine"]


def test_ctrl_c_is_caught_once_and_no_longer_after_a_failure(tmp_path):
    callback = StageCallback(1, tmp_path / "metrics.jsonl")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), callback.catching_interrupts():
        signal.raise_signal(signal.SIGINT)
        assert callback.interrupted
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(ValueError, match="any"), callback.catching_interrupts():
        raise ValueError("any")
    assert signal.getsignal(signal.SIGINT) is before
