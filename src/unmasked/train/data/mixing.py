"""Which rows share a batch, and what the model is given of them.

A batch is of one data set, on all devices: documents of another set would be told apart by their
style, and one instruction stands for a set. All texts of a batch, queries and documents, go through
the model as one, behind the preprocessing that `encode` has. The samplers of sentence-transformers
know neither a weight per data set nor devices whose batches must be of the same one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from sentence_transformers.base.sampler import SetEpochMixin
from torch.utils.data import BatchSampler

from unmasked.errors import DataError
from unmasked.recipe.schema import Pairs
from unmasked.text.templates import PLAIN
from unmasked.train.data.texts import folded, text_key


@dataclass(eq=False)
class OneSourceBatches(SetEpochMixin, BatchSampler):
    """Batches of one data set each, drawn anew in every epoch.

    `processes` batches in a row are of the same set, which is how accelerate deals them to the
    devices. Which rows meet depends on seed and epoch alone, so an interrupted run continues
    with the batches it would have had. An incomplete last batch is left to another epoch.

    Attributes:
        sources: (N,) the data set of each row.
        batch_size: rows per batch.
        weights: passes over each data set in an epoch; 0 leaves it out.
        processes: devices that take one batch each.
        seed: of the order.

    Raises:
        DataError: a data set does not fill one batch on every device.
    """

    sources: np.ndarray
    batch_size: int
    weights: Sequence[float]
    processes: int = 1
    seed: int = 0
    epoch = 0
    drop_last = True

    def __post_init__(self) -> None:
        self.together = self.batch_size * self.processes
        self.counts = []  # of each data set, batches for all devices in an epoch
        for number, weight in enumerate(self.weights):
            rows = int((self.sources == number).sum())
            if weight and rows < self.together:
                raise DataError(
                    f"data set {number + 1} of supervised.data has {rows} rows to train on, fewer "
                    f"than one batch of {self.together}. "
                    "Fix: a smaller batch_size or held_out, or more rows."
                )
            self.counts.append(max(1, int(rows * weight / self.together)) if weight else 0)

    def __len__(self) -> int:
        return sum(self.counts) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        draw = np.random.default_rng([self.seed, self.epoch])
        batches: list[np.ndarray] = []
        for number, count in enumerate(self.counts):
            rows = np.flatnonzero(self.sources == number)
            drawn: list[np.ndarray] = []
            while len(drawn) < count:  # a weight above 1 passes more than once
                order = draw.permutation(rows)
                whole = order[: len(order) // self.together * self.together]
                drawn += list(whole.reshape(-1, self.together))
            batches += drawn[:count]
        for index in draw.permutation(len(batches)):
            yield from batches[index].reshape(self.processes, -1).tolist()


def measuring_batches(
    sources: np.ndarray, batch_size: int, processes: int = 1
) -> OneSourceBatches | None:
    """Batches of held-out rows, no larger than the largest data set among them fills.

    Returns:
        None if none has two rows for every device; data sets that do not fill one are left out.
    """
    counts = np.bincount(sources.astype(np.int64), minlength=1)  # an empty array is of floats
    size = min(batch_size, int(counts.max()) // processes)
    weights = [float(count >= size * processes) for count in counts]
    return OneSourceBatches(sources, size, weights, processes) if size >= 2 else None


class Input(NamedTuple):
    """A text of a batch, whether it asks or answers, and what stands before it."""

    is_query: bool
    instruction: str
    text: str


Taught = Callable[[Sequence[dict[str, Any]], Sequence[Input]], torch.Tensor]
"""What a teacher says of rows and of their inputs, in the order of `inputs_of`: (R, W) vectors, or
(B, 1 + K) scores."""


def inputs_of(
    data: Sequence[Pairs], rows: Sequence[dict[str, Any]], hard_negatives: int
) -> list[Input]:
    """The texts of a batch: queries, then positives, then each rank of negatives.

    Rows that have fewer negatives than others show their positive again.
    """
    count = min(hard_negatives, max(len(row["negatives"]) for row in rows))
    inputs = [Input(True, _instruction(data, row, True), row["query"]) for row in rows]
    for rank in range(1 + count):
        for row in rows:
            documents = [row["positive"], *row["negatives"]]
            text = documents[rank] if rank < len(documents) else row["positive"]
            inputs.append(Input(False, _instruction(data, row, False), text))
    return inputs


def _instruction(data: Sequence[Pairs], row: dict[str, Any], is_query: bool) -> str:
    """What stands before a text of a row."""
    pairs = data[row["source"]]
    on_query = is_query or pairs.symmetric
    if own := row.get("query_instruction" if on_query else "document_instruction"):
        return str(own)
    chosen = pairs.instruction if on_query else pairs.document_instruction
    return chosen[row["number"] % len(chosen)] if chosen else ""


@dataclass
class PairCollator:
    """Rows to the features of one forward: queries, then positives, then each rank of negatives.

    Rows of a batch that have fewer negatives than others show their positive again, which the loss
    leaves out.

    Attributes:
        preprocess: of the model, for ``[instruction, text]`` pairs.
        data: the data sets, for their instructions.
        hard_negatives: maximum number of a row's own negatives.
        max_length: longest input in tokens, instruction included.
        taught: what a teacher says of a batch; None without one.
    """

    preprocess: Callable[..., dict[str, torch.Tensor]]
    data: Sequence[Pairs]
    hard_negatives: int
    max_length: int
    taught: Taught | None = None
    valid_label_columns: ClassVar[Sequence[str]] = ()

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Features of all R = (1 + 1 + K) * B texts, and which of them are the same text.

        Returns:
            ``text_`` before each of: the features of `preprocess`, longest text first;
            ``place`` (R,), where each stands among queries, positives and negatives; ``key`` (R,),
            a number of each text, alike in any case and white space, in that order.
            ``label`` (B,), whose length says how many rows there are. With a teacher,
            ``taught``, in the order of `inputs_of`.
        """
        inputs = inputs_of(self.data, rows, self.hard_negatives)
        features = self.preprocess(
            [[i.instruction, i.text] for i in inputs], max_length=self.max_length
        )
        features.pop("prompt_length", None)  # one number, where all else is of each text
        order = features["attention_mask"].sum(dim=1).argsort(descending=True, stable=True)
        keys = [int.from_bytes(text_key(folded(i.text)), "big", signed=True) for i in inputs]
        return {
            **{f"text_{name}": value[order] for name, value in features.items()},
            "text_place": order,
            "text_key": torch.tensor(keys),
            "label": torch.zeros(len(rows), dtype=torch.int64),
            **({"text_taught": self.taught(rows, inputs)} if self.taught else {}),
        }


ROLES = ("query", "document", "default")
"""Names of prompts that encoding looks for by itself."""


def prompts_of(data: Sequence[Pairs]) -> dict[str, str]:
    """The prompts a trained encoder is saved with, under the names that encoding looks for.

    Each data set's first instruction is kept under the name of its file, or, where two files have
    one name or a name means something else, under that of folder and file; where all data sets
    share one, it is what `encode_query` and `encode_document` put before every text.
    """
    prompts = {}
    for role, by_set in {
        "query": [p.instruction for p in data],
        "document": [p.instruction if p.symmetric else p.document_instruction for p in data],
    }.items():
        if by_set and by_set[0] and all(given == by_set[0] for given in by_set):
            prompts[role] = PLAIN.join(by_set[0][0])
    paths = {path.resolve(): p.instruction for p in data if (path := Path(p.path))}
    stems = Counter(path.name.split(".")[0] for path in paths)
    for path, given in paths.items():
        name = path.name.split(".")[0]
        if stems[name] > 1 or name in ROLES:
            name = f"{path.parent.name}/{name}"
        if given:
            prompts[name] = PLAIN.join(given[0])
    return prompts
