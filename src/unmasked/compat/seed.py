"""The seed system's two commands: their flags as a recipe, and their result files.

Every flag of `train_mntp.py` and `train_simcse.py` either has its effect or is refused with a
reason; `docs/migrating.md` has the table. Results have the same places: the adapter, a tokenizer
and `llm2vec_config.json` in ``results/NAME-STAGE``, events for TensorBoard in ``logs/NAME-STAGE``.
`unmasked.cli.seed_scripts` runs the recipe.

Cost: the training texts are tokenised once, to count the steps of an epoch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from unmasked.errors import DataError, RecipeError, nearest
from unmasked.files.training_source import training_source
from unmasked.recipe.files import make_recipe
from unmasked.recipe.schema import Recipe

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
"""Schedules of transformers that a recipe has; others are passed to the trainer."""
OWN = {"seed", "weight_decay", "max_steps", "output_dir", "logging_dir"}
"""`TrainingArguments` that are flags or settings of a recipe, and not passed to the trainer."""
SAME = {
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "gradient_checkpointing": "gradient_checkpointing",
    "log_steps": "logging_steps",
}
"""Setting of a stage → the flag that has its value."""
REFUSED = (
    ("trust_remote_code", True, "code from the hub is never run. Fix: leave the flag out."),
    ("do_train", False, "there is nothing to do. Fix: unmasked convert MODEL -o DIR."),
    ("merge_peft", False, "adapters are always merged. Fix: a recipe with lora.start: continue."),
)
"""Flag, the value that is refused, and the reason."""


def parser(stage: str) -> argparse.ArgumentParser:
    """The flags of a command, mostly with the seed system's defaults."""
    about = {
        "mntp": "Masked next token prediction, as the seed system's train_mntp.py.",
        "simcse": "SimCSE on an adapter of MNTP, as the seed system's train_simcse.py.",
    }
    made = argparse.ArgumentParser(
        prog=f"train_{stage}.py",
        allow_abbrev=False,
        description=about[stage],
        epilog="Other arguments of transformers' TrainingArguments are passed on: --NAME VALUE.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def flag(names: Any, help: str, kind: Any = str, default: Any = None, **more: Any) -> None:
        words = [f"--{name}" for name in ([names] if isinstance(names, str) else names)]
        made.add_argument(*words, help=help, type=kind, default=default, **more)

    _model_flags(flag, stage == "simcse")
    _training_flags(flag, stage == "simcse")
    return made


def _model_flags(flag: Callable[..., None], simcse: bool) -> None:
    """Flags of the model and of the texts."""
    flag("model_name", "decoder: hub name or folder", lambda name: name.rstrip("/"), required=True)
    flag("peft_model_name_or_path", "adapter to merge into it first", required=simcse)
    flag("device_map", "where to train", default="auto", choices=["auto", "cuda", "cpu"])
    flag("trust_remote_code", "must be False: code from the hub is never run", truth, False)
    flag("cache_dir", "folder of the hub's cache; None for the usual one")
    flag("torch_dtype", "number type of the weights", default="torch.bfloat16")
    flag(
        "attn_implementation", "attention; None lets transformers choose",
        choices=["eager", "sdpa", "flash_attention_2"],
    )  # fmt: skip
    flag("bidirectional", "open the causal mask", truth, True)
    flag("merge_peft", "must be True: adapters are always merged", truth, True)
    flag("simcse_dropout", "dropout on the attention weights in SimCSE", float, 0.3)
    flag("loss_scale", "factor of the cosines in SimCSE", float, 20.0)
    flag("lora_dropout", "dropout on the input of the adapter", float, 0.05)
    flag("pooling_mode", "how token states become a vector", default="mean")
    flag("data_path", "files of texts; None takes wiki1m_for_simcse.txt of --data_dir", nargs="+")
    flag("data_dir", "folder of the texts, without --data_path", default="data/")
    flag("validation_split_percentage", "share of the texts to evaluate on", float, 0.05)
    flag("mlm_probability", "share of the tokens that are masked", float, 0.2)
    flag(
        "mask_style", "bert masks 80 %% of them, all masks all",
        default="bert", choices=["bert", "all"],
    )  # fmt: skip
    flag(
        "mask_token_type", "what replaces a token if the tokenizer has no mask token",
        default="blank", choices=["blank", "eos", "mask"],
    )  # fmt: skip
    flag("max_seq_length", "tokens per block of MNTP, or per text of SimCSE", int, 4096)
    flag("model_max_length", "tokens per input of the result", int, 512 if simcse else 4096)


def _training_flags(flag: Callable[..., None], simcse: bool) -> None:
    """Flags of the training and of the results."""
    flag("output_dir", "the folder of results is made in it", default="results/")
    flag("logging_dir", "the folder of TensorBoard events is made in it", default="logs/")
    flag("num_train_epochs", "passes over the texts, without --max_steps", float, 1.0)
    flag("max_steps", "optimiser steps; -1 for --num_train_epochs", int, -1)
    flag("per_device_train_batch_size", "rows per batch", int, 16 if simcse else 4)
    flag("gradient_accumulation_steps", "batches per step", int, 4 if simcse else 16)
    flag("learning_rate", "highest learning rate", float, 1e-5)
    flag("lr_scheduler_type", "how the learning rate falls", default="cosine")
    flag("warmup_steps", "steps in which the learning rate climbs", int, 800)
    flag("weight_decay", "weight decay of AdamW", float, 0.0)
    flag("max_grad_norm", "gradients are clipped to this norm", float, 1.0)
    flag("seed", "seed of data, masks, dropout and adapters", int, 42)
    flag("logging_steps", "steps between two lines of metrics", int, 10)
    flag("report_to", "where metrics go", default="tensorboard")
    flag("gradient_checkpointing", "less memory, more time", truth, True)
    each: Any = {"choices": ["no", "steps", "epoch"]}
    flag("save_strategy", "when checkpoints are written", default="steps", **each)
    flag("save_steps", "steps between two checkpoints", int, 20000 if simcse else 500)
    flag("do_train", "must be True", truth, True)
    flag("do_eval", "measure the loss on held-out texts", truth, False)
    names = ["evaluation_strategy", "eval_strategy"]
    flag(names, "when that is measured", default="no", **each)
    flag("eval_steps", "steps between two such losses; None for 100", int)


def truth(text: str) -> bool:
    """Parse ``True`` or ``False`` on a command line."""
    if text.lower() in ("true", "1", "yes", "false", "0", "no"):
        return text.lower() in ("true", "1", "yes")
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False. Fix: write one of them")


def trainer_options(further: Sequence[str]) -> dict[str, Any]:
    """Parse ``--name value`` flags of `TrainingArguments` that a recipe has no setting for.

    Raises:
        RecipeError: `TrainingArguments` has no such argument, or its value is missing or faulty.
    """
    from transformers import TrainingArguments

    allowed = {field.name for field in fields(TrainingArguments)} - OWN
    words = []
    for word in further:  # --name=value is allowed, too; the value may contain further '='
        words += word.split("=", 1) if word.startswith("--") else [word]
    options: dict[str, Any] = {}
    for flag, value in zip(words[::2], [*words[1::2], "--"], strict=False):
        name = flag.removeprefix("--")
        if name not in allowed or not flag.startswith("--"):
            hint = nearest(name, allowed)
            raise RecipeError(f"unknown flag '{flag}'{hint} Fix: correct it, or leave it out.")
        if value.startswith("--"):
            raise RecipeError(f"{flag} has no value. Fix: {flag} VALUE.")
        options[name] = _value(flag, value)
    return options


def _value(flag: str, text: str) -> Any:
    """The value of a flag, as YAML has it; the recipe converts numbers that YAML reads as text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"{flag} {text}: the value is not valid YAML. If it is a text, quote it. "
            f"Fix: {flag} \"'{text}'\"."
        ) from error


def to_recipe(stage: str, flags: Any, options: dict[str, Any], name: str) -> Recipe:
    """The recipe for the flags of a command, as `parser` and `trainer_options` parse them.

    Raises:
        RecipeError: a flag's value cannot be used here.
        DataError: there is no training text.
    """
    for flag, value, reason in REFUSED:
        if getattr(flags, flag) is value:
            raise RecipeError(f"--{flag} {value}: {reason}")
    default = Path(flags.data_dir) / "wiki1m_for_simcse.txt"
    data = [str(path) for path in flags.data_path or [default]]
    length, longest = longest_input(flags.model_name, flags.max_seq_length, flags.model_max_length)
    texts, tokens = count_tokens(flags.model_name, data)
    per_step = flags.per_device_train_batch_size * flags.gradient_accumulation_steps
    epoch = max(1, (tokens // length if stage == "mntp" else texts) // per_step)
    steps = flags.max_steps if flags.max_steps > 0 else max(1, int(epoch * flags.num_train_epochs))
    evaluated = flags.do_eval or flags.evaluation_strategy != "no"
    every = {"no": steps, "epoch": epoch}
    if flags.report_to not in ("tensorboard", "none"):
        options = {"report_to": flags.report_to, **options}
    if (schedule := flags.lr_scheduler_type) not in SCHEDULES:
        options = {"lr_scheduler_type": schedule, **options}
    settings = {setting: getattr(flags, flag) for setting, flag in SAME.items()} | {
        "data": data,
        "held_out": int(texts * flags.validation_split_percentage) if evaluated else 0,
        "steps": steps,
        "schedule": schedule if schedule in ("linear", "cosine") else "constant",
        "warmup_steps": min(flags.warmup_steps, steps - 1),
        "lora": {"rank": 16, "alpha": 32, "dropout": flags.lora_dropout},
        "eval_steps": flags.eval_steps or every.get(flags.evaluation_strategy, 100),
        "save_steps": every.get(flags.save_strategy, flags.save_steps),
        "trainer": options,
    }
    own = {
        "mntp": {
            "block_length": length,
            "mask_token": flags.mask_token_type,
            "mask_style": flags.mask_style,
            "mask_probability": flags.mlm_probability,
        },
        "simcse": {
            "max_length": length,
            "attention_dropout": flags.simcse_dropout,
            "temperature": 1 / flags.loss_scale,
        },
    }
    model = {
        "base": flags.model_name,
        "adapters": [flags.peft_model_name_or_path] if flags.peft_model_name_or_path else [],
        "bidirectional": flags.bidirectional,
        "dtype": flags.torch_dtype.removeprefix("torch."),
        "attention": flags.attn_implementation,
        "pooling": flags.pooling_mode,
        "max_length": longest,
    }
    given = {"name": name, "seed": flags.seed, "model": model, stage: settings | own[stage]}
    return make_recipe(given)


def longest_input(model: str, *lengths: int) -> list[int]:
    """Lengths, limited to the number of a model's positions."""
    from unmasked.checkpoint.loading import load_config

    most = getattr(load_config(model).get_text_config(), "max_position_embeddings", None)
    return [min(length, most or length) for length in lengths]


def count_tokens(model: str, data: Sequence[str]) -> tuple[int, int]:
    """The number of distinct texts in training files, and of their tokens."""
    from unmasked.checkpoint.loading import load_tokenizer
    from unmasked.text.special_tokens import prepare_tokenizer
    from unmasked.text.tokens import TextTokenizer

    for path in data:
        if not Path(path).exists():
            raise DataError(
                f"the training text {path} does not exist. Fix: --data_path FILE, plain text with "
                "one sentence per line (the seed system looked in /data)."
            )
    sources = map(training_source, data)
    texts = list(dict.fromkeys(text for source in sources for _, text, _ in source.records()))
    tokenize = TextTokenizer(prepare_tokenizer(load_tokenizer(model)))
    starts = range(0, len(texts), 4096)  # in chunks, so that few encodings are in memory
    chunks = (tokenize(texts[at : at + 4096], max_length=1 << 30) for at in starts)
    return len(texts), sum(len(row.ids) for chunk in chunks for row in chunk)


def read_environment(file: Path) -> None:
    """Set the ``NAME=value`` lines of a file as environment variables, unless they are set."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8-sig").splitlines():
        name, found, value = line.strip().removeprefix("export ").partition("=")
        if found and not name.startswith("#"):
            os.environ.setdefault(name.strip(), _unquoted(value.strip()))


def _unquoted(value: str) -> str:
    """A value in an environment file without its quotes, or without the comment after it."""
    quoted = re.match(r"""(["'])(.*?)\1\s*(#.*)?$""", value)
    return quoted[2] if quoted else re.split(r"\s+#", value, maxsplit=1)[0]


def prepare_environment(flags: Any) -> None:
    """Set variables that libraries read when they are imported: the cache and the devices."""
    if flags.cache_dir:
        os.environ["HF_HUB_CACHE"] = flags.cache_dir
    if flags.device_map == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def link_logs(events: Path, logs: Path) -> None:
    """Make `logs` a link to the events of a stage, before it starts, if links are possible.

    The link is relative, so that both folders can be moved together.
    """
    logs.parent.mkdir(parents=True, exist_ok=True)
    if not (logs.exists() or logs.is_symlink()):
        with suppress(OSError, ValueError):  # there is no relative path between two drives
            there = os.path.relpath(events.resolve(), logs.parent.resolve())
            logs.symlink_to(there, target_is_directory=True)


def publish(folder: Path, stage: str, base: str, logs: Path) -> None:
    """Copy results to the seed system's places, with the events if they could not be linked."""
    from unmasked.checkpoint.loading import load_tokenizer

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(folder / stage / name, folder / name)
    load_tokenizer(base).save_pretrained(folder)
    shutil.copyfile(folder / "model" / "llm2vec_config.json", folder / "llm2vec_config.json")
    if not logs.exists():
        shutil.copytree(folder / stage, logs, ignore=shutil.ignore_patterns("adapter_*"))
