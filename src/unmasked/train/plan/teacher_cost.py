"""The cost of a teacher, which encodes the texts of a stage once, before the stage trains.

As for the base, only its config and its tokenizer are fetched. Cost: a pass over the pairs to count
them; of a data set on the hub only the sample is read.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.utils.benchmark import Timer

from unmasked.checkpoint import adapters, loading
from unmasked.checkpoint.folder import SETTINGS_NAME
from unmasked.checkpoint.location import Location, locate
from unmasked.errors import UnmaskedError
from unmasked.files.hub import HUB
from unmasked.files.source import find_files
from unmasked.forward import precision
from unmasked.forward.batches import token_budget
from unmasked.recipe.schema import Supervised
from unmasked.recipe.teaching import Teacher
from unmasked.text.special_tokens import prepare_tokenizer
from unmasked.text.templates import PLAIN
from unmasked.text.tokens import TextTokenizer
from unmasked.train.data.mixing import Input, inputs_of
from unmasked.train.data.pairs import KINDS, PairRow, read_rows
from unmasked.train.plan.shapes import DecoderSizes, saved_activations

LONGEST = 512
"""Maximum number of tokens of a teacher's input, if its folder does not say it."""
_PART = 4096  # texts whose vectors are in memory before they are written


@dataclass(frozen=True)
class TeacherPlan:
    """A teacher's forwards, and their cost on the one device that runs them.

    Attributes:
        sizes: sizes of the teacher.
        texts: upper bound of the number of different texts.
        length: mean number of tokens of a text.
        rows: texts per forward.
        converted: whether its weights are converted to another type after they are read on a CPU,
            where both copies are in the same memory.
    """

    sizes: DecoderSizes
    texts: int
    length: int
    rows: int
    converted: bool = False

    @cached_property
    def memory(self) -> int:
        """Peak bytes: weights, and a layer's activations with the vectors, or converted weights."""
        one = saved_activations(self.sizes.trunk(1), self.rows, self.length)
        vectors = 4 * self.sizes.width * min(self.texts, _PART)
        weights: int = self.sizes.parameters * self.sizes.dtype.itemsize
        return weights + max(one + vectors, weights if self.converted else 0)

    @property
    def disk(self) -> int:
        """Bytes of the vectors and of the keys of their texts, while the stage trains."""
        return (4 * self.sizes.width + 8) * self.texts

    @property
    def flops(self) -> float:
        """2 for each weight and token, and for attention over s tokens 4 s d L per token."""
        sizes = self.sizes
        weights = 2 * (sizes.parameters - sizes.embedding)
        attention = 4 * self.length * sizes.attention_width * sizes.layers
        return float(self.texts * self.length * (weights + attention))

    def measure(self, device: torch.device) -> float:
        """Seconds on this machine, measured with forwards of shallow models."""
        few = min(self.sizes.layers, 4)
        shallow = self._seconds(1, device)
        deeper = self._seconds(few, device) if few > 1 else shallow
        per_layer = max(0.0, deeper - shallow) / max(1, few - 1)
        return (shallow + per_layer * (self.sizes.layers - 1)) * self.texts / self.rows

    def _seconds(self, layers: int, device: torch.device) -> float:
        model = self.sizes.trunk(layers, str(device)).eval()
        ids = torch.zeros(self.rows, self.length, dtype=torch.int64, device=device)

        def forward() -> None:
            with torch.inference_mode():
                model(input_ids=ids, use_cache=False)

        return seconds_of(forward)


def seconds_of(step: Callable[[], None]) -> float:
    """Median seconds of a step, after a warm-up."""
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return timer.adaptive_autorange().median


def plan_teacher(
    stage: Supervised, rows: Sequence[PairRow], device: torch.device
) -> TeacherPlan | None:
    """The plan of a stage's teacher; None if it has none, or if the rows have its scores.

    Args:
        stage: the settings of the stage; its data are counted.
        rows: some of its rows, perhaps none.
        device: where the teacher encodes.

    Raises:
        ModelError: the teacher has no config here or on the hub.
    """
    if stage.teacher is None or stage.teacher.model is None:
        return None
    place = locate(stage.teacher.model).require()
    while adapters.is_adapter(place):
        base = adapters.read_adapter_config(place).base_model_name_or_path
        place = locate(str(base)).require()
    config = loading.load_config(place.name)
    sizes = DecoderSizes(config, precision.pick("auto", device, config).dtype)
    inputs = [
        item
        for row in rows
        for item in inputs_of(stage.data, [row._asdict()], stage.hard_negatives)
    ]
    length = _mean_length(place, inputs) if inputs else max(1, stage.max_length // 2)
    of_each = len(set(inputs)) / len(rows) if rows else 2 + stage.hard_negatives
    texts = max(1, round(of_each * _count_rows(stage, stage.teacher)))
    together = max(1, min(texts, token_budget(device, sizes.dtype) // length))
    converted = device.type == "cpu" and getattr(config, "dtype", sizes.dtype) != sizes.dtype
    return TeacherPlan(sizes, texts, length, together, converted)


def _mean_length(place: Location, inputs: Sequence[Input]) -> int:
    """Mean number of tokens of the inputs in the teacher's tokenizer."""
    most = place.read_json(SETTINGS_NAME).get("max_length") or LONGEST
    tokens = TextTokenizer(prepare_tokenizer(loading.load_tokenizer(place.name)), most)
    prompts = [PLAIN.join(item.instruction) if item.instruction else "" for item in inputs]
    rows = tokens([item.text for item in inputs], prompts)
    return max(1, round(statistics.mean(len(row.ids) for row in rows)))


def _count_rows(stage: Supervised, teacher: Teacher) -> int:
    """Number of rows; if they cannot be counted, the number that the stage trains on."""
    try:
        if not any(find_files(pairs.path, KINDS)[0].startswith(HUB) for pairs in stage.data):
            return sum(1 for pairs in stage.data for _ in read_rows(pairs, teacher=teacher))
    except UnmaskedError:
        pass  # a run reports what is wrong with them
    return stage.steps * stage.batch_size * stage.gradient_accumulation
