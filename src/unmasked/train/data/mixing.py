"""Which rows are held out, which share a batch, and how they become the model's input.

All rows of a batch are from one data set, on all devices: the documents of another set would be
easy negatives, recognised by their style. All texts of a batch, queries and documents, go through
the model in one forward, with the same preprocessing as in `encode`. The samplers of
sentence-transformers support neither a weight per data set nor batches of the same data set on all
devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers.base.sampler import SetEpochMixin
from torch.utils.data import BatchSampler

from unmasked.errors import DataError
from unmasked.recipe.schema import Pairs
from unmasked.text.templates import PLAIN
from unmasked.train.data.record import read_facts
from unmasked.train.data.texts import folded, key_of, text_key


def split_rows(
    rows: Dataset, held_out: int, seed: int, queries: np.ndarray | None = None
) -> tuple[Dataset, Dataset]:
    """Rows to train on, and up to `held_out` others (at most a tenth), both in the file's order.

    All rows of a query are on one side. `Dataset.train_test_split` would shuffle both, so that
    reads would jump about in the file. If `queries`, (N,) `key_of` the `folded` query of each
    row, is not given, the rows are read for it.
    """
    if queries is None:
        parts = rows.select_columns("query").iter(1024)
        keys = (key_of(folded(query)) for part in parts for query in part["query"])
        queries = np.fromiter(keys, np.uint64, len(rows))
    _, query, sizes = np.unique(queries, return_inverse=True, return_counts=True)
    left, taken = min(held_out, len(rows) // 10), set[int]()
    for number in query[np.random.default_rng(seed).permutation(len(rows))].tolist():
        if number not in taken and sizes[number] <= left:
            taken.add(number)
            left -= int(sizes[number])
    chosen = np.isin(query, [*taken])
    return rows.select(np.flatnonzero(~chosen)), rows.select(np.flatnonzero(chosen))


@dataclass(eq=False)
class OneSourceBatches(SetEpochMixin, BatchSampler):
    """Batches of one data set each, drawn again in every epoch.

    Each run of `processes` consecutive batches is from the same data set: accelerate gives one of
    them to each device. Batches depend on seed and epoch alone, so that a resumed run has the same
    ones as an uninterrupted run. Rows that do not fill a last batch are left out in this epoch.

    Attributes:
        sources: (N,) the number of each row's data set.
        batch_size: rows per batch.
        weights: passes over each data set per epoch; 0 leaves it out.
        processes: number of devices, each of which gets one batch.
        seed: the seed of the order.

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
        self.together = self.batch_size * self.processes  # rows of a batch on all devices
        self.counts = []  # of each data set, how many such batches an epoch has
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
            # With a weight of up to a half, each epoch takes another part of the same order.
            parts = len(rows) // self.together // count if count else 1
            turn, part = divmod(self.epoch, max(1, parts))
            source = draw if parts < 2 else np.random.default_rng([self.seed, turn, number])
            drawn: list[np.ndarray] = []
            while len(drawn) < count:  # a weight above 1 passes more than once
                order = source.permutation(rows)
                whole = order[: len(order) // self.together * self.together]
                drawn += list(whole.reshape(-1, self.together))
            batches += drawn[part * count : (part + 1) * count]
        for index in draw.permutation(len(batches)):
            yield from batches[index].reshape(self.processes, -1).tolist()


def measuring_batches(
    sources: np.ndarray, batch_size: int, processes: int = 1
) -> OneSourceBatches | None:
    """Batches of held-out rows, made smaller if the largest data set among them fills none.

    Returns:
        None if no data set has two rows for every device. Data sets that fill no batch are left
        out.
    """
    counts = np.bincount(sources.astype(np.int64), minlength=1)  # no rows give a float array
    size = min(batch_size, int(counts.max()) // processes)
    weights = [float(count >= size * processes) for count in counts]
    return OneSourceBatches(sources, size, weights, processes) if size >= 2 else None


class Input(NamedTuple):
    """A text of a batch: whether it is a query or a document, its instruction, and the text."""

    is_query: bool
    instruction: str
    text: str


Taught = Callable[[Sequence[dict[str, Any]], Sequence[Input]], torch.Tensor]
"""From the rows of a batch and their inputs, in the order of `inputs_of`, to a teacher's (R, W)
vectors or (B, 1 + K) scores."""


def inputs_of(
    data: Sequence[Pairs], rows: Sequence[dict[str, Any]], hard_negatives: int
) -> list[Input]:
    """The texts of a batch: queries, then positives, then each rank of negatives.

    A row with fewer negatives than another has its positive again in their place.
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
    """The instruction of a row's query or documents: its own, or one of its data set's."""
    pairs = data[row["source"]]
    on_query = is_query or pairs.symmetric  # symmetric: documents get the query's instruction
    if own := row.get("query_instruction" if on_query else "document_instruction"):
        return str(own)
    chosen = pairs.instruction if on_query else pairs.document_instruction
    return chosen[row["number"] % len(chosen)] if chosen else ""


@dataclass
class PairCollator:
    """Turns rows into the features of one forward.

    Attributes:
        preprocess: the model's method, which takes ``[instruction, text]`` pairs.
        data: the data sets, for their instructions.
        hard_negatives: maximum number of negatives per row.
        max_length: maximum number of tokens of an input, with its instruction.
        taught: a teacher's scores or vectors of a batch; None without a teacher.
    """

    preprocess: Callable[..., dict[str, torch.Tensor]]
    data: Sequence[Pairs]
    hard_negatives: int
    max_length: int
    taught: Taught | None = None
    valid_label_columns: ClassVar[Sequence[str]] = ()

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Features of all R = (2 + K) * B texts of a batch.

        Returns:
            The features of `preprocess`, longest text first; ``place`` (R,), the position of each
            text in the order of `inputs_of`; ``key`` (R,), in that order, a number for each text
            that is equal for texts that differ only in case and white space; with a teacher,
            ``taught``, also in that order. All their names begin with ``text_``. Besides, ``label``
            (B,), of which only the length counts.
        """
        inputs = inputs_of(self.data, rows, self.hard_negatives)
        features = self.preprocess(
            [[i.instruction, i.text] for i in inputs], max_length=self.max_length
        )
        features.pop("prompt_length", None)  # a single number, which cannot be reordered
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
"""Names of prompts with a meaning of their own, which no data set may take."""


def prompts_of(data: Sequence[Pairs], folder: Path) -> dict[str, str]:
    """The prompts that a trained encoder is saved with.

    Each data set's first instruction is saved under the name of its file, or as FOLDER/NAME if two
    files have the same name or it is one of `ROLES`. An instruction that all data sets have in
    common becomes the prompt of `encode_query` or `encode_document`. Instructions that all rows of
    a data set had in common, which the stage has noted in its folder, take precedence.
    """
    names, prompts = ("instruction", "document_instruction"), {}
    if of_rows := read_facts(folder).get("instructions"):
        own = [{n: [text] for n, text in zip(names, of, strict=True) if text} for of in of_rows]
        data = [pairs.model_copy(update=new) for pairs, new in zip(data, own, strict=True)]
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
