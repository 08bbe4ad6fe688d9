"""The recipe: every setting of a run, in one schema.

A recipe is a YAML file with one section per stage. A key that is not in the schema is an error
that names the line, because a misspelt learning rate costs a day of GPU time. Paths in a recipe
are relative to the folder the command runs in, not to the recipe's own.

Defaults are the numbers of the LLM2Vec paper (arXiv 2404.05961) and its published configurations.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from unmasked.errors import RecipeError, nearest

Place = tuple[str | int, ...]
_RECIPES = Path(__file__).parent / "recipes"
_DEEPEST = 3  # mntp.lora.rank


def _number(value: object) -> object:
    """PyYAML reads ``2e-4`` as text, and pydantic takes ``true`` for 1."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    if isinstance(value, str | bool):
        raise ValueError("should be a number")
    return value


def _listed(value: object) -> object:
    """One path stands for a list of one."""
    if isinstance(value, str | os.PathLike):
        value = [value]
    if isinstance(value, list | tuple):
        return [os.fspath(item) if isinstance(item, os.PathLike) else item for item in value]
    return value


Count = Annotated[int, Field(ge=1), BeforeValidator(_number)]
Whole = Annotated[int, Field(ge=0), BeforeValidator(_number)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)]
Share = Annotated[float, Field(gt=0, le=1), BeforeValidator(_number)]
Dropout = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]
Strings = Annotated[list[str], BeforeValidator(_listed)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Model(_Section):
    """The decoder to start from and how it encodes."""

    base: Annotated[str, Field(min_length=1)]
    """A hub name, a folder, or ``nano`` for the bundled decoder."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None is the default branch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; ``auto`` keeps that of the checkpoint where the device can."""
    attention: str | None = None
    """Attention implementation as transformers names it (``sdpa``, ``eager``, ...)."""
    pooling: Literal["mean", "weighted_mean", "last_token", "eos_token", "bos_token"] = "mean"
    """From token states to one vector; the paper finds ``mean`` best without the causal mask."""
    max_length: Annotated[Count, Field(ge=2)] = 512
    """Longest input of the saved encoder, in tokens, instruction included."""
    allow_partial: bool = False
    """Accept a model in which some layers provably stay causal, such as hybrids."""


class Lora(_Section):
    """Low-rank adapters, the only parameters that train."""

    rank: Count = 16
    """Rank of the two matrices."""
    alpha: Count = 32
    """The update is scaled by alpha / rank; the paper uses twice the rank."""
    dropout: Dropout = 0.05
    """Dropout on the adapter's input."""
    targets: Strings | None = None
    """Names of the linear layers; None is every one of attention and MLP, as in the paper."""


class Training(_Section):
    """What the stages have in common: data, optimiser (AdamW), schedule and how often to report."""

    data: Strings = []
    """Files of texts, .txt, .txt.gz or .jsonl; a single path may stand for the list."""
    max_texts: Count | None = None
    """Read no more texts than this; None reads all."""
    held_out: Whole = 200
    """Texts kept out of training to measure the loss on; 0 measures none."""
    steps: Count = 1000
    """Optimiser steps."""
    gradient_accumulation: Count = 1
    """Batches per optimiser step."""
    learning_rate: Positive = 5e-5
    """Highest learning rate, after warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay to zero after warm-up."""
    schedule_steps: Count | None = None
    """Step at which the decay would reach zero; None is ``steps``. The paper decays over three
    epochs and stops at step 1000, when the rate has hardly fallen."""
    warmup_steps: Whole = 0
    """Steps in which the rate climbs from zero."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients longer than this are scaled down to it."""
    lora: Lora = Lora()
    """The adapter this stage trains."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    log_steps: Count = 10
    """Steps between two lines of metrics."""
    eval_steps: Count = 100
    """Steps between two held-out losses."""
    save_steps: Count = 200
    """Steps between two checkpoints, the points an interrupted run continues from."""

    @model_validator(mode="after")
    def _horizon(self) -> Training:
        horizon = self.schedule_steps or self.steps
        if horizon < self.steps and self.schedule != "constant":
            raise ValueError(
                f"schedule_steps {horizon} should be null or at least the {self.steps} steps, "
                "or the learning rate would be zero for the rest"
            )
        if self.warmup_steps >= horizon:
            raise ValueError(f"warmup_steps {self.warmup_steps} should be less than {horizon}")
        return self


class MNTP(Training):
    """Masked next token prediction (paper section 2.1): the state at i-1 predicts token i."""

    batch_size: Count = 32
    """Blocks per batch."""
    block_length: Annotated[Count, Field(ge=2)] = 512
    """Tokens per block, cut from the concatenated texts."""
    mask_token: Literal["blank", "eos", "mask"] = "blank"
    """What stands for a masked token where the tokenizer has no mask token: ``_`` (the paper's),
    the end-of-text token, or a new one."""
    mask_style: Literal["bert", "all"] = "bert"
    """Of the chosen tokens, mask 80 %, replace 10 % and keep 10 % (``bert``), or mask all."""
    mask_probability: Share = 0.2
    """Share of tokens chosen; the paper takes 0.2, and 0.8 with ``all`` for Mistral."""


class SimCSE(Training):
    """Unsupervised contrastive training (paper section 2.1): the same text twice, two dropouts."""

    batch_size: Annotated[Count, Field(ge=2)] = 128
    """Texts per batch; all the others are a text's negatives."""
    max_length: Annotated[Count, Field(ge=2)] = 128
    """Texts are cut to this many tokens."""
    learning_rate: Positive = 3e-5
    """Highest learning rate, after warm-up."""
    temperature: Positive = 0.05
    """Cosines are divided by this before the softmax."""
    attention_dropout: Annotated[Dropout, Field(gt=0)] = 0.3
    """Dropout on the attention weights: the noise that makes the two views differ."""
    log_steps: Count = 50
    """Steps between two lines of metrics."""
    eval_steps: Count = 200
    """Steps between two held-out losses."""


class Evaluate(_Section):
    """What is scored before the first stage and after each."""

    tasks: Strings = []
    """Task files and folders."""
    bootstrap: Whole = 1000
    """Resamples behind every confidence interval; 0 gives none."""


class Recipe(_Section):
    """Every setting of a run. Without a stage the model is converted and evaluated only."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    """Names the run folder: letters, digits, ``.``, ``_`` and ``-``."""
    seed: Whole = 42
    """Seed of data order, masking, dropout and adapter initialisation."""
    model: Model
    """The decoder to start from."""
    mntp: MNTP | None = None
    """First stage; None leaves it out."""
    simcse: SimCSE | None = None
    """Second stage; None leaves it out."""
    evaluate: Evaluate = Evaluate()
    """What is scored."""


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(_RECIPES.glob("*.yaml"))}


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, change single settings, and check the whole.

    Args:
        path_or_name: A YAML file, or the name of a shipped recipe (which wins; write ``./name``
            for a file called so). Paths inside are relative to the current folder.
        overrides: ``section.key=value`` with the value in YAML: ``mntp.steps=50``,
            ``mntp.data=[a.txt, b.txt]``, ``simcse=null`` to leave a stage out.

    Raises:
        RecipeError: No such file, not YAML, an unknown key or an unusable value. The message
            names every such key with the line or override it stands in.
    """
    path = shipped_recipes().get(str(path_or_name), Path(path_or_name))
    data, lines = _parse(_read(path, str(path_or_name)), path.name)
    places = {place: f"{path.name} line {line}" for place, line in lines.items()}
    for override in overrides:
        place = _apply(override, data)
        places = {p: text for p, text in places.items() if p[: len(place)] != place}
        for end in range(1, len(place) + 1):
            places.setdefault(place[:end], f"override '{override}'")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = [_explain(e, places, path.name) for e in error.errors(include_url=False)]
        raise RecipeError("\n".join(problems)) from None


def dump_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the recipe with every default spelt out; ``load_recipe`` reads back an equal one."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def recipe_differences(a: Recipe, b: Recipe) -> list[str]:
    """What changed from ``a`` to ``b``, one line a setting: ``mntp.steps: 100 -> 200``."""

    def walk(old: object, new: object, *keys: str) -> Iterator[str]:
        if isinstance(old, dict) and isinstance(new, dict):
            for key in old:
                yield from walk(old[key], new[key], *keys, key)
        elif old != new:
            shown = ["set" if isinstance(value, dict) else value for value in (old, new)]
            yield f"{'.'.join(keys)}: {shown[0]} -> {shown[1]}"

    return list(walk(a.model_dump(), b.model_dump()))


def _read(path: Path, given: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        shipped = shipped_recipes()
        hint = nearest(path.stem, shipped) or ": no such file."
        message = f"no recipe '{given}'{hint} Shipped recipes: {', '.join(shipped)}."
        raise RecipeError(message) from None
    except UnicodeDecodeError as error:
        message = f"{given} is not UTF-8 text (byte {error.start}). Fix: save it as UTF-8."
        raise RecipeError(message) from None
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {given}: {error.strerror}") from None


def _parse(text: str, name: str) -> tuple[dict[str, Any], dict[Place, int]]:
    """The YAML mapping, and the line of every key in it."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise RecipeError(f"{name}{at} is not YAML: {problem}") from None
    if not isinstance(data, dict) or not isinstance(node, yaml.MappingNode):
        found = "is empty" if data is None else f"holds a {type(data).__name__}, not keys"
        raise RecipeError(f"{name} {found}. The least a recipe says is its name and model.base.")
    lines: dict[Place, int] = {}
    for place, line in _key_lines(node, ()):
        if place in lines:
            key = ".".join(map(str, place))
            raise RecipeError(f"{key}: given twice ({name} lines {lines[place]} and {line})")
        lines[place] = line
    return data, lines


def _key_lines(node: yaml.MappingNode, above: Place) -> Iterator[tuple[Place, int]]:
    for key, value in node.value:
        place = (*above, key.value)
        yield place, key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode) and len(place) < _DEEPEST:
            yield from _key_lines(value, place)


def _apply(override: str, data: dict[str, Any]) -> Place:
    """Set what ``section.key=value`` says; returns the place it was set at."""
    dotted, equals, text = override.partition("=")
    place = tuple(dotted.strip().split("."))
    if not equals or not all(place):
        raise RecipeError(f"override '{override}' should look like mntp.steps=500")
    section = data
    for depth, key in enumerate(place[:-1], 1):
        inner = section.get(key) or {}
        if not isinstance(inner, dict):
            raise RecipeError(f"{'.'.join(place[:depth])} has no keys (override '{override}')")
        section[key] = section = dict(inner)  # a copy: an alias may stand in several places
    try:
        section[place[-1]] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise RecipeError(f"override '{override}': the value is not YAML; quote it") from None
    return place


def _explain(error: Any, places: dict[Place, str], name: str) -> str:
    """One of pydantic's findings as a line: key, value given, what is allowed, where."""
    place: Place = error["loc"]
    nearby = (places.get(place[:end]) for end in range(len(place), 0, -1))
    where = next(filter(None, nearby), name)
    key, given = ".".join(map(str, place)), error["input"]
    if error["type"] == "extra_forbidden":
        allowed = _keys(place[:-1])
        hint = nearest(str(place[-1]), allowed) or f". Allowed: {', '.join(allowed)}."
        return f"{key}: unknown key{hint} ({where})"
    if error["type"] == "missing":
        return f"{key}: missing ({where})"
    message = re.sub(r"^(Value error, |Input |String )", "", error["msg"])
    if error["type"] == "literal_error":
        message += nearest(str(given), re.findall(r"'([^']+)'", message))
    elif error["type"] == "model_type":
        message = f"should be a section with keys: {', '.join(_keys(place))}"
    elif error["type"] == "string_type" and isinstance(given, int | float):
        message += ": put it in quotes"
    shown = "" if isinstance(given, dict) else f"{given!r} "
    return f"{key}: {shown}{message} ({where})"


def _keys(place: Place) -> list[str]:
    """The keys of the section at ``place``."""
    section: type[BaseModel] = Recipe
    for key in place:
        annotation = section.model_fields[str(key)].annotation
        section = next(t for t in (annotation, *get_args(annotation)) if isinstance(t, type))
    return list(section.model_fields)
