"""The options of `encode`, and how its inputs become batches ahead of the device.

Inputs come in windows. While one window runs, the next is tokenised in one thread and collated,
packed and pinned in another; tokenising and copying release the interpreter lock. Cost: one
tokenisation per distinct text, and a sort per window of texts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmasked.errors import DataError, unknown
from unmasked.forward.backbone import Backbone
from unmasked.forward.batches import ahead, filling, plan_batches, token_budget, windows
from unmasked.forward.packing import Packed, pack
from unmasked.text.inputs import check_numbers, check_prompt, split_pairs
from unmasked.text.tokens import TokenRow

SENTENCE = "sentence_embedding"
TOKENS = "token_embeddings"
OUTPUTS = (SENTENCE, TOKENS, None)
"""Allowed values of the option ``output_value`` of `encode`; None is every output of the model."""
STOCK_PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
"""Allowed values of the option ``precision`` of `encode`, as in sentence-transformers."""
TOKENISED_AHEAD = 2
"""Largest number of tokenised windows that wait to be collated."""

AT_ONCE = 512
"""Number of inputs that are tokenised at once; Control-C waits until they are."""


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse faulty options of `encode`, with a `DataError`, before any work is done."""
    check_prompt(options.get("prompt"))
    check_numbers(options)
    for name, allowed in (("output_value", OUTPUTS), ("precision", (*STOCK_PRECISIONS, None))):
        if (value := options.get(name, allowed[0])) not in allowed:
            raise DataError(unknown(name, value, map(str, allowed)))


@dataclass(frozen=True)
class Request:
    """The options of one pass over the inputs, named as in `SentenceTransformer.encode`.

    Attributes:
        output_value: one of `OUTPUTS`.
        save_to_cpu: copy vectors to the host as they are computed.
        by_tokens: limit a forward by its number of tokens; otherwise it has `batch_size` rows.
        processing_kwargs, task: see `Backbone.preprocess`.
        stock_features: pass on what stock modules after the pooling may read: padded states and
            prompt_length.
    """

    device: torch.device
    prompt: str | None = None
    batch_size: int = 32
    show_progress_bar: bool = False
    output_value: str | None = SENTENCE
    save_to_cpu: bool = True
    normalize_embeddings: bool = False
    truncate_dim: int | None = None
    by_tokens: bool = False
    processing_kwargs: Mapping[str, Any] | None = None
    task: str | None = None
    stock_features: bool = False

    @classmethod
    def of(cls, device: torch.device, options: Mapping[str, Any]) -> Request:
        """The request of a call of `encode`; options that are meant for other modules are ignored.

        Raises:
            DataError: see `check_numbers`.
        """
        check_numbers(options)
        names = {field.name for field in fields(cls)}
        return cls(device, **{name: value for name, value in options.items() if name in names})

    @property
    def on_gpu(self) -> bool:
        """Whether the device runs asynchronously."""
        return self.device.type == "cuda"

    def plan(self, lengths: Sequence[int], padded: bool, backbone: Backbone) -> list[np.ndarray]:
        """Divide rows with these numbers of tokens into batches; returns the indices of each."""
        apart = backbone.longest_unscaled
        if self.by_tokens:
            # On a CPU padding always counts, so that batches are the same whether packed or not:
            # the composition of a batch moves the last bits of a vector.
            budget = token_budget(self.device, backbone.dtype)
            return plan_batches(lengths, budget, padded=padded or not self.on_gpu, apart=apart)
        return plan_batches(lengths, batch_size=self.batch_size, apart=apart)


@dataclass
class TextWindow:
    """Inputs whose vectors are returned together.

    Attributes:
        inputs: n distinct inputs.
        inverse: for each of the N requested inputs, its index in `inputs`; None if all differ.
        left: how many of `inputs` have no vector yet.
        vectors: (n, D), the vectors of `inputs`; None until the first of them is computed.
        copies: (n,) how often each of `inputs` was requested.
    """

    inputs: list[Any]
    inverse: np.ndarray | None = None
    left: int = 0
    vectors: Tensor | None = None

    def __post_init__(self) -> None:
        self.left = len(self.inputs)
        indices = np.arange(self.left) if self.inverse is None else self.inverse
        self.copies = np.bincount(indices, minlength=self.left)

    def take(self, places: np.ndarray, vectors: Tensor) -> None:
        """Store the (B, D) vectors of the inputs at (B,) places."""
        if self.vectors is None:
            self.vectors = vectors.new_empty(len(self.inputs), vectors.shape[1])
        self.vectors[torch.from_numpy(places).to(vectors.device, non_blocking=True)] = vectors
        self.left -= len(places)

    def finished(self, request: Request) -> Tensor:
        """(N, D) vectors of the requested inputs; an empty tensor if there are none."""
        if self.vectors is None:
            return torch.empty(0, device="cpu" if request.save_to_cpu else request.device)
        if self.inverse is None or len(self.inverse) == len(self.inputs):
            return self.vectors
        return self.vectors[torch.from_numpy(self.inverse).to(self.vectors.device)]


@dataclass(frozen=True)
class TokenisedRows:
    """The token rows of some consecutive inputs of a window; `first` is the index of the first."""

    window: TextWindow
    first: int
    rows: list[TokenRow]


@dataclass(frozen=True)
class PreparedBatch:
    """Inputs that share a forward: their places in their window, token counts and features.

    `cut` has the places of truncated inputs. An empty window becomes one batch without inputs, so
    that its (empty) result comes at the right place among those of the other windows.
    """

    window: TextWindow
    places: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    lengths: Sequence[int] = ()
    features: dict[str, Any] = field(default_factory=dict)
    cut: Sequence[int] = ()


def tokenised(
    backbone: Backbone,
    wanted: Iterable[TextWindow],
    request: Request,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[TokenisedRows]:
    """Tokenise windows piece by piece, until `stopped()` is true; meant to run in a thread."""
    limit = backbone.limit(request.processing_kwargs, task=request.task)
    for window in wanted:
        if not window.inputs:
            yield TokenisedRows(window, 0, [])
        for piece in windows(len(window.inputs), growing=request.on_gpu):
            inputs, rows = window.inputs[piece], list[TokenRow]()
            split_pairs(inputs)  # all of them, so that an error has the index among them
            for start in range(0, len(inputs), AT_ONCE):
                if stopped():  # nobody waits for the rows
                    return
                part = inputs[start : start + AT_ONCE]
                rows += backbone.tokenize_inputs(part, request.prompt, limit)
            yield TokenisedRows(window, piece.start, rows)


def prepare_batches(
    backbone: Backbone, pieces: Iterable[TokenisedRows], request: Request
) -> Iterator[PreparedBatch]:
    """Plan and collate tokenised pieces; meant to run in a thread."""
    padded = backbone.unpackable is not None
    stock = request.stock_features or request.output_value is None
    collate = backbone.features_of if stock else backbone.collate
    # Dummy rows at the end of a batch may be added only where nothing but our pooling sees them.
    filled = request.on_gpu and request.output_value == SENTENCE and not padded
    filled &= not request.stock_features
    for piece in pieces:
        rows, lengths = piece.rows, [len(row.ids) for row in piece.rows]
        if not rows:
            yield PreparedBatch(piece.window)
        for chosen in request.plan(lengths, padded, backbone):
            own = [lengths[i] for i in chosen]
            together = [rows[i] for i in chosen]
            if filled:
                ids = together[0].ids  # beginnings of the longest text
                together += [TokenRow(ids[:length], 0, length) for length in filling(own)]
            features: dict[str, Any] = collate(together)
            if not padded:
                features["packed"] = pack(features["attention_mask"])
            if request.on_gpu:
                features = {
                    key: value.pin_memory() if isinstance(value, Tensor | Packed) else value
                    for key, value in features.items()
                }
            features["repad"] = request.stock_features or request.output_value != SENTENCE
            cut = [piece.first + int(i) for i in chosen if rows[i].cut]
            yield PreparedBatch(piece.window, chosen + piece.first, own, features, cut)


def prepared_ahead(
    backbone: Backbone, wanted: Iterable[TextWindow], request: Request
) -> Generator[PreparedBatch, None, None]:
    """The batches of all windows, prepared in two threads, which end when the generator closes."""
    stopping = Event()

    def batches() -> Iterator[PreparedBatch]:
        rows = tokenised(backbone, wanted, request, stopping.is_set)
        with closing(ahead(rows, TOKENISED_AHEAD)) as pieces:
            yield from prepare_batches(backbone, pieces, request)

    with closing(ahead(batches(), stop=stopping.set)) as prepared:
        yield from prepared
