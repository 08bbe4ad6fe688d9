"""What a recipe will cost, before it is run: steps, tokens, FLOPs, memory, disk and time.

Only the config and the tokenizer are fetched, never weights; sizes come from `shapes`. The time
comes from a probe: models of one layer and of a few layers take real steps on this machine, and the
time of the full depth is extrapolated linearly from both.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import nn

from unmasked.checkpoint import loading
from unmasked.errors import UnmaskedError, first_line
from unmasked.forward import precision
from unmasked.mask.opening import decoder_of
from unmasked.recipe.schema import MNTP, AnyStage, Recipe, SimCSE, Supervised
from unmasked.text.special_tokens import prepare_tokenizer
from unmasked.text.tokens import TextTokenizer
from unmasked.train import devices
from unmasked.train.data.pairs import PairRow, read_rows
from unmasked.train.data.texts import iterate_texts
from unmasked.train.fitting import compiles
from unmasked.train.losses.depth import first_layers
from unmasked.train.losses.mntp import LOGITS_AT_ONCE, micro_batch_rows
from unmasked.train.plan.shapes import (
    DecoderSizes,
    saved_activations,
    saved_by_a_layer,
    trained_trunk,
)
from unmasked.train.plan.teacher_cost import TeacherPlan, plan_teacher, seconds_of

logger = logging.getLogger(__name__)

SAMPLE = 512
"""Number of texts whose mean length is taken as that of all."""


class StageMemory(NamedTuple):
    """Bytes on each device at the peak of a step.

    `teaching` is not part of that peak: it is used before the first step, while a teacher encodes.
    """

    weights: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    teaching: int = 0

    @property
    def total(self) -> int:
        """The peak of the whole stage."""
        return max(sum(self) - self.teaching, self.teaching)


@dataclass(frozen=True)
class StagePlan:
    """The forwards of a stage, and their cost.

    Tokens per step, FLOPs and seconds are for all devices together, memory is for each device.

    Attributes:
        stage, sizes: settings of the stage, and sizes of the decoder.
        rows, length: texts or blocks per forward, and their mean number of tokens.
        forwards: forwards per optimiser step on one device.
        scored: rows of logits per forward.
        twice: whether the batch is embedded twice, first without gradients (GradCache).
        assumed: why no text could be read and the length is assumed; empty if texts were read.
        unread: why a source of texts cannot be read, where the plan needs none of its texts.
        teacher: the cost of a teacher that encodes the texts first, if there is one.
        compiled_on: the device whose layers the stage compiles; None if it does not.
        seconds: duration of the stage; None without a probe.
        taught_seconds: the part of `seconds` in which the teacher encodes.
    """

    name: str
    stage: AnyStage
    sizes: DecoderSizes
    rows: int
    length: int
    forwards: int
    scored: int = 0
    twice: bool = False
    assumed: str = ""
    unread: str = ""
    teacher: TeacherPlan | None = None
    compiled_on: torch.device | None = None
    seconds: float | None = None
    taught_seconds: float = 0.0

    @property
    def depths(self) -> list[int]:
        """Layers of each forward of a batch: all, then those of `matryoshka_layers`."""
        return [self.sizes.layers, *getattr(self.stage, "matryoshka_layers", [])]

    @property
    def steps(self) -> int:
        return self.stage.steps

    @property
    def tokens(self) -> int:
        """Tokens of one forward."""
        return self.rows * self.length

    @property
    def tokens_per_step(self) -> int:
        return self.tokens * self.forwards * devices.world()

    @cached_property
    def model(self) -> nn.Module:
        """The trunk as the stage trains it, on the meta device."""
        return trained_trunk(self.sizes.trunk(), self.stage).train()

    @property
    def trainable(self) -> int:
        """Number of parameters that are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @cached_property
    def memory(self) -> StageMemory:
        """Bytes on each device."""
        sizes, stage = self.sizes, self.stage
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        weights = sum(p.nbytes for p in self.model.parameters())
        if isinstance(stage, MNTP):
            weights += sizes.head * sizes.dtype.itemsize
        if stage.lora.method == "qlora":  # 4 bits per weight, and a float32 scale for every 64
            linear = sizes.parameters - sizes.embedding
            weights += round(linear * (0.5 + 4 / 64)) - linear * sizes.dtype.itemsize
        activations = self._activations()
        if getattr(stage, "attention_dropout", 0.0):
            # Attention with dropout keeps its weights: two float32 copies, and a mask of bytes.
            activations += 9 * self.rows * sizes.heads * self.length**2 * sizes.layers
        if stage.gradient_checkpointing:  # one layer's activations, and the input of every layer
            inputs = self.tokens * sizes.width * sizes.dtype.itemsize
            layers = sum(self.depths)
            activations = activations // layers + layers * inputs
        scored = min(self.scored, max(1, LOGITS_AT_ONCE // sizes.vocabulary))
        # Logits, softmax and gradient in float32 (12 bytes); with a dtype of 2 bytes, also the
        # logits that the head returned.
        logits = scored * sizes.vocabulary * (12 + sizes.dtype.itemsize % 4)
        teaching = weights + self.teacher.memory if self.teacher else 0
        return StageMemory(weights, trained, 2 * trained, activations, logits, teaching)

    def _activations(self) -> int:
        """Bytes that the forwards of one batch keep, at full depth and at each smaller depth."""
        if self.compiled_on is not None:
            try:
                each = saved_by_a_layer(self.sizes, self.stage, self.compiled_on)
                return round(each * self.tokens * sum(self.depths))
            except Exception as error:  # the compiler's errors have no common class
                logger.warning("Memory is counted for plain layers: %s.", first_line(error))
        kept = saved_activations(self.model, self.rows, self.length)
        for layers in self.depths[1:]:
            with first_layers(decoder_of(self.model), layers):
                kept += saved_activations(self.model, self.rows, self.length)
        return kept

    @property
    def disk(self) -> int:
        """Bytes of the result, of two checkpoints (weights and two moments each), of a teacher."""
        return 7 * self.memory.gradients + (self.teacher.disk if self.teacher else 0)

    @property
    def flops(self) -> float:
        """FLOPs of the whole stage.

        Per token, a frozen weight costs 2 forward and 2 backward, as it needs no gradient itself,
        and 2 more for each repeated forward; a weight of the adapter costs 6. Attention over s
        tokens costs 4 s d L forward and twice that backward. Each weight of the head costs 4 per
        scored token. Smaller depths that are trained as well cost their share of all this again,
        and a teacher costs a forward for each text.
        """
        sizes, trainable = self.sizes, self.trainable
        again = int(self.stage.gradient_checkpointing) + int(self.twice)
        frozen = sizes.parameters - sizes.embedding
        if self.stage.lora.method == "full":
            trainable, frozen = frozen, 0
        attention = 4 * self.length * sizes.attention_width * sizes.layers
        per_token = (4 + 2 * again) * frozen + (3 + again) * attention + (6 + 2 * again) * trainable
        per_token *= sum(self.depths) / sizes.layers
        one = float(self.tokens * per_token + self.scored * 4 * sizes.embedding)
        taught = self.teacher.flops if self.teacher else 0.0
        return one * (self.forwards * devices.world()) * self.steps + taught

    def measured(self, device: torch.device) -> StagePlan:
        """This plan with `seconds`, measured on this machine with steps of shallow models."""
        few = min(self.sizes.layers, 4)
        shallow = self._seconds(1, device)
        deeper = self._seconds(few, device) if few > 1 else shallow
        per_layer = max(0.0, deeper - shallow) / max(1, few - 1)
        # The probe repeats no forward, as gradient checkpointing and GradCache do.
        passes = 1 + 0.25 * self.stage.gradient_checkpointing + 0.5 * self.twice
        one = sum(shallow + per_layer * (layers - 1) * passes for layers in self.depths)
        taught = self.teacher.measure(device) if self.teacher else 0.0
        seconds = one * self.forwards * self.steps + taught
        return replace(self, seconds=seconds, taught_seconds=taught)

    def _seconds(self, layers: int, device: torch.device) -> float:
        """Median seconds of a training step of a model with `layers` layers, after a warm-up."""
        model = trained_trunk(self.sizes.trunk(layers, str(device)), self.stage).train()
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        vocabulary = self.sizes.vocabulary
        head = nn.Linear(self.sizes.width, vocabulary, False, device, self.sizes.dtype)
        head.requires_grad_(False)
        ids = torch.randint(vocabulary, (self.rows, self.length), device=device)

        def step() -> None:
            states = model(input_ids=ids, use_cache=False).last_hidden_state
            if self.scored:
                logits = head(states.flatten(0, 1)[: self.scored]).float()
                loss = nn.functional.cross_entropy(logits, ids.flatten()[: self.scored])
            else:
                loss = states.float().mean(dim=1).pow(2).mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        return seconds_of(step)


@dataclass(frozen=True)
class Plan:
    """The cost of a recipe, stage by stage."""

    parameters: int
    devices: int
    dtype: str
    stages: Sequence[StagePlan]
    disk: int
    """Bytes of disk, including the finished encoder."""


def make_plan(recipe: Recipe, probe: bool = False) -> Plan:
    """The plan of a recipe.

    Args:
        recipe: what would be run.
        probe: also measure the time; takes some seconds, and as much memory as a few layers.

    Raises:
        ModelError: the base has no config here or on the hub.
        DataError, RecipeError: as in a run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = precision.pick(recipe.model.dtype, device).dtype
    name, revision = recipe.model.base, recipe.model.revision
    config = loading.load_config(name, recipe.model.layers, revision=revision)
    sizes = DecoderSizes(config, dtype)
    tokenizer = prepare_tokenizer(loading.load_tokenizer(name, revision=revision))
    tokens = TextTokenizer(tokenizer, recipe.model.max_length)
    stages = [
        replace(
            _plan_stage(name, stage, sizes, tokens, device),
            compiled_on=device if compiles(stage, recipe.model.compile, device) else None,
        )
        for name, stage in recipe.stages()
    ]
    if probe:
        stages = [stage.measured(device) for stage in stages]
    disk = sizes.parameters * dtype.itemsize + max((s.disk for s in stages), default=0)
    return Plan(sizes.parameters, devices.world(), str(dtype).removeprefix("torch."), stages, disk)


def _plan_stage(
    name: str, stage: AnyStage, sizes: DecoderSizes, tokens: TextTokenizer, device: torch.device
) -> StagePlan:
    rows = devices.rows_per_device(stage.batch_size, f"{name}.batch_size")
    if isinstance(stage, MNTP):
        part = devices.micro_batch(rows, micro_batch_rows(stage, device))
        scored = round(part * stage.block_length * stage.mask_probability)
        forwards = rows // part * stage.gradient_accumulation
        plan = StagePlan(name, stage, sizes, part, stage.block_length, forwards, scored)
        return replace(plan, unread=_unread(stage))
    unread = f"nothing to train on was given. Fix: {name}.data=FILE."
    try:
        texts, per_row, pairs = _sample(stage)
    except UnmaskedError as error:  # a plan may be made before the texts exist
        texts, pairs, unread = [], [], first_line(error) if stage.data else unread
        per_row = 2 if isinstance(stage, SimCSE) else 2 + stage.hard_negatives
    limit = stage.max_length
    lengths = [len(row.ids) for row in tokens(texts, max_length=limit)] if texts else [limit // 2]
    length = max(1, round(statistics.mean(lengths)))
    together = rows * per_row
    most = (isinstance(stage, Supervised) and stage.mini_batch_tokens) or together * length
    twice = together * length > most
    part = max(1, most // length) if twice else together
    forwards = -(-together // part) * stage.gradient_accumulation
    teacher = plan_teacher(stage, pairs, device) if isinstance(stage, Supervised) else None
    found = StagePlan(name, stage, sizes, part, length, forwards, teacher=teacher)
    without = _unread(stage) if texts and isinstance(stage, SimCSE) else ""
    return replace(found, twice=twice, assumed="" if texts else unread, unread=without)


def _unread(stage: MNTP | SimCSE) -> str:
    """Why one of the sources of texts cannot be read; empty if all can, or none is given."""
    try:
        for source in stage.data:
            next(iterate_texts([source], 1))
    except UnmaskedError as error:
        return first_line(error)
    return ""


def _sample(stage: SimCSE | Supervised) -> tuple[list[str], int, list[PairRow]]:
    """Some texts of a contrastive stage, the number of texts per row, and the rows of pairs."""
    if isinstance(stage, SimCSE):
        return list(iterate_texts(stage.data[:1], SAMPLE)), 2, []
    taught = partial(read_rows, teacher=stage.teacher)
    of_each = SAMPLE // max(1, len(stage.data))
    rows = [
        row
        for number, pairs in enumerate(stage.data)
        for row in islice(taught(pairs, number), of_each)
    ]
    texts = [[r.query, r.positive, *r.negatives[: stage.hard_negatives]] for r in rows]
    return [text for row in texts for text in row], max(map(len, texts), default=2), rows
