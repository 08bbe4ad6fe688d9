"""What a recipe will cost, before it is run: steps, tokens, FLOPs, memory, disk and time.

Only the config and the tokenizer are fetched, never weights; sizes come from `shapes`. Time comes
from a probe: a model of one and of a few layers takes real steps on this machine, and the rest
follows in a line.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from unmasked.checkpoint import loading
from unmasked.errors import UnmaskedError
from unmasked.files.source import Source
from unmasked.forward import precision
from unmasked.recipe.schema import MNTP, Recipe, SimCSE, Supervised
from unmasked.text.tokens import TextTokenizer, prepare_tokenizer
from unmasked.train import devices
from unmasked.train.data.pairs import read_rows
from unmasked.train.losses.mntp import LOGITS_AT_ONCE, micro_batch_rows
from unmasked.train.plan.shapes import Base, Stage, attach, saved_activations

SAMPLE = 512
"""Texts whose length stands for all."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the fullest moment of a step."""

    weights: int
    gradients: int
    optimiser: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.activations + self.logits


@dataclass(frozen=True)
class Shape:
    """What one forward of a stage is given.

    Attributes:
        rows, length: texts or blocks of a forward, and the tokens of each (their mean).
        forwards: of an optimiser step on one device.
        scored: rows of logits of a forward.
        twice: embedded a second time, without gradients first (GradCache).
        assumed: lengths are assumed, as no text could be read.
    """

    rows: int
    length: int
    forwards: int
    scored: int = 0
    twice: bool = False
    assumed: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class StagePlan:
    """One stage: counts are of the whole stage and all devices unless said otherwise."""

    name: str
    steps: int
    tokens_per_step: int
    trainable: int
    flops: float
    memory: Memory
    disk: int
    shape: Shape
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """A recipe's stages, and what holds for all of them."""

    parameters: int
    devices: int
    dtype: str
    disk: int
    stages: list[StagePlan] = field(default_factory=list)

    @property
    def seconds(self) -> float | None:
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if known and len(known) == len(self.stages) else None


def make_plan(recipe: Recipe, probe: bool = False) -> Plan:
    """The plan of a recipe.

    Args:
        recipe: what would be run.
        probe: also measure how long; takes some seconds, and as much memory as a few layers.

    Raises:
        ModelError: the base has no config here or on the hub; DataError, RecipeError: as in a run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = precision.pick(recipe.model.dtype, device).dtype
    name, revision = recipe.model.base, recipe.model.revision
    base = Base(loading.load_config(name, revision=revision), dtype)
    tokens = _tokens(loading.load_tokenizer(name, revision=revision), recipe.model.max_length)
    stages = []
    for stage_name, stage in recipe.stages():
        shape = stage_shape(stage, stage_name, tokens, device)
        plan = _plan_stage(stage_name, stage, shape, base)
        if probe:
            seconds = measure_step(stage, shape, base, device) * stage.steps
            plan = replace(plan, seconds=seconds)
        stages.append(plan)
    disk = base.parameters * dtype.itemsize + max((s.disk for s in stages), default=0)
    return Plan(base.parameters, devices.world(), str(dtype)[6:], disk, stages)


def stage_shape(stage: Stage, name: str, tokens: TextTokenizer, device: torch.device) -> Shape:
    """What a forward of a stage is given on one device."""
    rows = devices.rows_per_device(stage.batch_size, f"{name}.batch_size")
    if isinstance(stage, MNTP):
        part = devices.micro_batch(rows, micro_batch_rows(stage, device))
        scored = round(part * stage.block_length * stage.mask_probability)
        forwards = rows // part * stage.gradient_accumulation
        return Shape(part, stage.block_length, forwards, scored)
    texts, per_row = _sample(stage)
    limit = stage.max_length
    lengths = [len(row.ids) for row in tokens(texts, max_length=limit)] if texts else [limit // 2]
    length = max(1, round(statistics.mean(lengths)))
    together = rows * per_row
    most = getattr(stage, "mini_batch_tokens", None)
    twice = most is not None and together * length > most
    part = max(1, most // length) if most is not None and twice else together
    forwards = -(-together // part) * stage.gradient_accumulation
    return Shape(part, length, forwards, twice=twice, assumed=not texts)


def _plan_stage(name: str, stage: Stage, shape: Shape, base: Base) -> StagePlan:
    attached = attach(base.trunk(), stage)
    trained = [p for p in attached.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in trained)
    bytes_trained = sum(p.numel() * p.itemsize for p in trained)
    memory = Memory(
        weights=_weight_bytes(stage, base, attached),
        gradients=bytes_trained,
        optimiser=2 * bytes_trained,
        activations=_activation_bytes(stage, shape, base),
        logits=_logit_bytes(shape, base),
    )
    forwards = shape.forwards * devices.world()
    flops = step_flops(stage, shape, base, trainable) * forwards * stage.steps
    disk = 7 * bytes_trained  # the result, and two checkpoints of weights and two moments
    tokens = shape.tokens * forwards
    return StagePlan(name, stage.steps, tokens, trainable, flops, memory, disk, shape)


def _weight_bytes(stage: Stage, base: Base, attached: nn.Module) -> int:
    weights = sum(p.numel() * p.itemsize for p in attached.parameters())
    if isinstance(stage, MNTP):
        weights += base.head * base.dtype.itemsize
    if stage.lora.method == "qlora":  # half a byte, and a scale for every 64
        linear = (base.parameters - base.embedding) * base.dtype.itemsize
        weights += round((base.parameters - base.embedding) * (0.5 + 4 / 64)) - linear
    return weights


def _activation_bytes(stage: Stage, shape: Shape, base: Base) -> int:
    whole = saved_activations(stage, shape.rows, shape.length, base, base.layers)
    if not stage.gradient_checkpointing:
        return whole
    inputs = shape.tokens * int(base.text.hidden_size) * base.dtype.itemsize
    return whole // base.layers + base.layers * inputs  # one layer whole, of the others the input


def _logit_bytes(shape: Shape, base: Base) -> int:
    """Of a chunk: the logits in float32, their softmax and its gradient, and as they came."""
    vocabulary = int(base.text.vocab_size)
    rows = min(shape.scored, max(1, LOGITS_AT_ONCE // vocabulary))
    return rows * vocabulary * (12 + base.dtype.itemsize % 4)


def step_flops(stage: Stage, shape: Shape, base: Base, trainable: int) -> float:
    """FLOPs of a forward of a stage and its backward.

    The frozen weights cost 2 a token forward and 2 backward, as they need no gradient themselves,
    and 2 more where a forward is run again; attention over s tokens costs 4 s d L forward and twice
    that backward; the LoRA 6; logits 4 for each weight of the head and scored token.
    """
    again = int(stage.gradient_checkpointing) + int(shape.twice)
    weights = base.parameters - base.embedding
    if stage.lora.method == "full":
        trainable, weights = weights, 0
    attention = 4 * shape.length * base.attention_width * base.layers
    a_token = (4 + 2 * again) * weights + (3 + again) * attention + (6 + 2 * again) * trainable
    return float(shape.tokens * a_token + shape.scored * 4 * base.embedding)


def measure_step(stage: Stage, shape: Shape, base: Base, device: torch.device) -> float:
    """Seconds of an optimiser step on this machine, from steps of shallow models."""
    few = min(base.layers, 4)
    shallow = _time_forward(stage, shape, base, 1, device)
    if few == 1:
        return shallow * shape.forwards
    deeper = _time_forward(stage, shape, base, few, device)
    a_layer = max(0.0, deeper - shallow) / (few - 1)
    passes = 1 + 0.25 * stage.gradient_checkpointing + 0.5 * shape.twice
    return (shallow + a_layer * (base.layers - 1) * passes) * shape.forwards


def _time_forward(
    stage: Stage, shape: Shape, base: Base, layers: int, device: torch.device
) -> float:
    model = attach(base.trunk(layers, str(device)), stage).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    vocabulary = int(base.text.vocab_size)
    head = nn.Linear(int(base.text.hidden_size), vocabulary, False, device, base.dtype)
    head.requires_grad_(False)
    ids = torch.randint(vocabulary, (shape.rows, shape.length), device=device)

    def step() -> None:
        states = model(input_ids=ids, use_cache=False).last_hidden_state
        if shape.scored:
            logits = head(states.flatten(0, 1)[: shape.scored]).float()
            loss = nn.functional.cross_entropy(logits, ids.flatten()[: shape.scored])
        else:
            loss = states.float().mean(dim=1).pow(2).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return _median_seconds(step, device)


def _median_seconds(step: Callable[[], None], device: torch.device, times: int = 3) -> float:
    measured = []
    for _ in range(times + 1):  # the first one warms up
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        measured.append(time.perf_counter() - begun)
    return statistics.median(measured[1:])


def _sample(stage: SimCSE | Supervised) -> tuple[list[str], int]:
    """Some texts of a contrastive stage, and how many of them a row of a batch has."""
    texts: list[str] = []
    try:
        if isinstance(stage, SimCSE):
            for path in stage.data[:1]:
                records = Source(str(path), skip_blank=True).records()
                texts += [text for _, text, _ in islice(records, SAMPLE)]
            return texts, 2
        per_row = 2
        for index, pairs in enumerate(stage.data):
            for row in islice(read_rows(pairs, index), SAMPLE // max(1, len(stage.data))):
                hard = row.negatives[: stage.hard_negatives]
                per_row = max(per_row, 2 + len(hard))
                texts += [row.query, row.positive, *hard]
        return texts, per_row
    except UnmaskedError:
        return [], 2 if isinstance(stage, SimCSE) else 2 + stage.hard_negatives


def _tokens(tokenizer: PreTrainedTokenizerBase, max_length: int) -> TextTokenizer:
    return TextTokenizer(prepare_tokenizer(tokenizer), max_length)
