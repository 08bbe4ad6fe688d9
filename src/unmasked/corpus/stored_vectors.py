"""How texts become the vectors that are stored.

A vector is truncated to its first dimensions, then normalised (Matryoshka, arXiv 2205.13147), then
stored as float32, float16, int8 or single bits. int8 needs ranges, the smallest and the largest
value of each dimension; they are measured once, on the first texts, saved, and shared by all shards
and machines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unmasked.corpus.late import check_pooling, late_vectors, positions
from unmasked.errors import DataError, unknown
from unmasked.files.writing import written_aside
from unmasked.text.inputs import check_numbers, check_prompt
from unmasked.text.passages import Chunks, Passage, divide, windows_of

if TYPE_CHECKING:
    from unmasked.files.source import Source
    from unmasked.model import TextEncoder

PRECISIONS = ("float32", "float16", "int8", "binary")
CALIBRATION = 4096
"""Number of rows at the beginning of the source that the ranges of int8 are measured on."""


@dataclass(frozen=True)
class Encoding:
    """How texts become vectors: options of `TextEncoder.encode`; None is the model's default."""

    prompt: str | None = None  # text that is put before every input
    prompt_name: str | None = None  # the name of one of the model's prompts, instead of its text
    batch_size: int | None = None  # maximum number of texts per forward
    normalize: bool = False  # scale every vector to length 1
    truncate_dim: int | None = None  # keep only the first dimensions of each vector, this many
    precision: str = "float32"
    """``float32``; ``float16``; ``int8``, (v - low) / (high - low) * 255 - 128 with the range of
    each dimension, as sentence-transformers computes it; ``binary``, one bit per dimension, set if
    v > 0, eight to a byte, the first one in the highest place (`numpy.unpackbits` reverses it)."""
    chunks: Chunks | None = None
    """How documents are divided into passages, each of which has a vector; None encodes them
    whole."""
    expected_tokens: int = 0
    """A rough number of tokens in the whole source, which decides whether compiling the decoder
    layers is worth its time."""

    def of(self, source: Source) -> Encoding:
        """A copy whose `expected_tokens` are estimated from the source's size on the disk.

        If that is unknown (standard input, a data set on the hub), nothing is compiled unless the
        model's setting is ``always``. The decision never depends on the progress of a run: compiled
        layers change the last bits of a vector, and a shard must have the same bytes wherever a run
        was interrupted.
        """
        from unmasked.forward.compiling import LETTERS

        size = sum(Path(file).stat().st_size for file in source.files) if source.on_disk else 0
        return replace(self, expected_tokens=size // LETTERS)

    def compiled(self, model: TextEncoder) -> bool:
        """Compile the decoder layers if that saves time; returns whether they are compiled."""
        return model.backbone.compile_for(self.expected_tokens, model.compiles)

    def check_options(self) -> None:
        """Refuse, with a `DataError`, what no model can do."""
        if self.prompt is not None and self.prompt_name is not None:
            raise DataError("prompt and prompt_name were both given. Fix: give one of them.")
        check_prompt(self.prompt)
        check_numbers(vars(self))
        if self.precision not in PRECISIONS:
            raise DataError(unknown("precision", self.precision, PRECISIONS))
        if self.chunks is not None:
            self.chunks.check_sizes()

    def check(self, model: TextEncoder) -> None:
        """Refuse what the model cannot do, with a `DataError` that says what it can do."""
        self.check_options()
        if self.prompt_name is not None and self.prompt_name not in model.prompts:
            raise DataError(unknown("prompt name", self.prompt_name, model.prompts))
        width = model.get_embedding_dimension() or 0
        if self.truncate_dim is not None and self.truncate_dim > width:
            given = f"truncate_dim {self.truncate_dim} should be from 1 to {width}"
            raise DataError(f"{given}. Fix: {width}, or leave it out.")
        if self.chunks is not None:
            late = self.chunks.late
            prompt, tokens = self.resolved_prompt(model) or "", model.backbone.tokens
            self.chunks.check(tokens, prompt, positions(model) if late else None)
            if late:
                check_pooling(model)

    def width(self, model: TextEncoder) -> int:
        """D, the dimensions of a vector before bits are packed."""
        return self.truncate_dim or model.get_embedding_dimension() or 0

    def resolved_prompt(self, model: TextEncoder) -> str | None:
        """The text that is put before every input."""
        name = self.prompt_name or model.default_prompt_name
        return model.prompts[name] if self.prompt is None and name is not None else self.prompt

    def __call__(
        self, model: TextEncoder, windows: Iterable[list[str]]
    ) -> Generator[tuple[list[Passage], np.ndarray], None, None]:
        """The passages of each list of N texts, P in all, and their (P, D) float32 vectors.

        Without `chunks`, each text is one passage. A thread reads the lists ahead.
        """
        from unmasked.forward.loop.running import encode_windows

        self.compiled(model)
        if self.chunks is not None and self.chunks.late:
            yield from (self._late(model, texts) for texts in windows)
            return
        divided: deque[list[Passage]] = deque()  # of the lists that are not encoded yet

        def parts() -> Iterator[list[str]]:
            for texts in windows:
                divided.append(self._divide(model, texts))
                yield [texts[i][begin:end] for i, begin, end in divided[-1]]

        encoded = encode_windows(
            model,
            model.backbone,
            parts(),
            prompt=self.resolved_prompt(model),
            batch_size=self.batch_size,
            normalize_embeddings=self.normalize,
            truncate_dim=self.truncate_dim or model.truncate_dim,
        )
        with closing(encoded):  # ends its threads
            for vectors in encoded:
                yield divided.popleft(), np.ascontiguousarray(vectors, dtype="<f4")

    def passages(self, model: TextEncoder, texts: list[str]) -> tuple[list[Passage], np.ndarray]:
        """The passages of N texts, P in all, and their (P, D) float32 vectors."""
        (result,) = self(model, [texts])
        return result

    def _divide(self, model: TextEncoder, texts: list[str]) -> list[Passage]:
        if self.chunks is None:
            return [Passage(i, 0, len(text)) for i, text in enumerate(texts)]
        tokens = model.backbone.tokens
        spans = (divide(tokens, text, self.chunks) for text in texts)
        return [Passage(i, *span) for i, parts in enumerate(spans) for span in parts]

    def _late(self, model: TextEncoder, texts: list[str]) -> tuple[list[Passage], np.ndarray]:
        """The same result, with each passage pooled from one forward over its document."""
        passages, tokens = self._divide(model, texts), model.backbone.tokens
        if not passages:
            return passages, np.empty((0, self.width(model)), dtype="<f4")
        prompt, limit = self.resolved_prompt(model) or "", positions(model)
        windows, order, first = [], [], 0
        for document, parts in groupby(passages, key=lambda passage: passage.document):
            spans = [(begin, end) for _, begin, end in parts]
            own = list(windows_of(tokens, texts[document], spans, prompt, limit))
            order += [first + place for window in own for place in window.passages]
            windows += own
            first += len(spans)
        vectors = late_vectors(model, windows, self.normalize, self.width(model))
        # `order` has the passage of each vector; its argsort has the vector of each passage.
        return passages, np.ascontiguousarray(vectors[np.argsort(order)], dtype="<f4")

    def stored_type(self, width: int) -> tuple[np.dtype[Any], int]:
        """The type of the stored numbers, and how many of them a vector of D = `width` takes."""
        if self.precision == "binary":
            return np.dtype("u1"), -(-width // 8)
        return np.dtype({"float32": "<f4", "float16": "<f2", "int8": "i1"}[self.precision]), width

    def store(self, vectors: np.ndarray, ranges: np.ndarray | None) -> np.ndarray:
        """(N, D) float32 vectors in the type and width of `stored_type`."""
        if self.precision == "float16":
            with np.errstate(over="ignore"):  # the caller looks for infinities
                return vectors.astype("<f2")
        if self.precision in ("int8", "binary"):
            from sentence_transformers.util import quantize_embeddings

            kind: Any = "ubinary" if self.precision == "binary" else "int8"
            return np.ascontiguousarray(quantize_embeddings(vectors, kind, ranges=ranges))
        return vectors

    def measure_ranges(self, model: TextEncoder, texts: list[str], window: int) -> np.ndarray:
        """(2, D) float32: the smallest and the largest value of each dimension over some texts."""
        starts = range(0, len(texts) or 1, window)  # at least one window, even if it is empty
        encoded = self(model, (texts[i : i + window] for i in starts))
        vectors = np.concatenate([vectors for _, vectors in encoded])
        vectors = vectors[np.isfinite(vectors).all(axis=1)]
        if not len(vectors):
            raise DataError(
                f"none of the first {CALIBRATION} rows has a vector to measure the ranges of int8 "
                "on. Fix: --ranges FILE of another run, or put good rows first."
            )
        return np.stack([vectors.min(axis=0), vectors.max(axis=0)])


def encode_passages(
    model: TextEncoder, texts: Sequence[str], chunks: Chunks, **options: Any
) -> tuple[list[Passage], np.ndarray]:
    """Divide documents into passages, and encode each passage.

    Args:
        model, texts: the encoder, and the documents.
        chunks: the maximum number of tokens of a passage, their overlap, and whether a passage is
            pooled from the forward over its document.
        options: fields of `Encoding`: ``prompt``, ``normalize``, ``truncate_dim`` and so on.

    Returns:
        The passages, P in all, in order, and their (P, D) float32 vectors.

    Raises:
        DataError: the sizes of passages are impossible, or the model cannot find a passage in its
            document.
    """
    encoding = Encoding(chunks=chunks, **options)
    encoding.check(model)
    return encoding.passages(model, list(texts))


def read_ranges(path: Path, width: int | None = None) -> np.ndarray:
    """The (2, D) ranges in a file; a `DataError` if it has something else. None takes any width."""
    try:
        ranges = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        fix = "give the _ranges.npy of a run"
        raise DataError(f"{path} holds no ranges ({error}). Fix: {fix}.") from error
    width = ranges.shape[-1] if width is None and ranges.ndim else width
    if ranges.shape != (2, width) or ranges.dtype.kind != "f" or not np.isfinite(ranges).all():
        given = f"{ranges.dtype} of shape {ranges.shape}"
        raise DataError(
            f"{path} is {given}, and the ranges of these vectors are finite floats of shape "
            f"(2, {width}), lowest and highest. Fix: give the _ranges.npy of such a run."
        )
    return np.ascontiguousarray(ranges, dtype="<f4")


def ranges_of(output: Path) -> Path:
    """The file of the ranges of one file of int8 vectors."""
    return output.with_name(f"{output.name}.ranges.npy")


def skipped_of(output: Path) -> Path:
    """The file that lists the rows without a vector in one file of vectors."""
    return output.with_name(f"{output.name}.skipped.jsonl")


def save_ranges(path: Path, ranges: np.ndarray) -> None:
    """Write ranges to a file, completely or not at all."""
    with written_aside(path) as file:
        np.save(file, ranges)
