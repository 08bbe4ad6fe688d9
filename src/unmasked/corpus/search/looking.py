"""Finds the nearest texts to a query, with a model, its vectors, and perhaps their texts.

The texts are in a column beside the vectors (``--keep text``), or were just encoded for the search,
or are read from the source, once, and kept in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from unmasked.corpus.search.nearest import nearest_vectors
from unmasked.corpus.search.stored_files import StoredVectors, open_vectors
from unmasked.corpus.stored_vectors import Encoding
from unmasked.errors import DataError
from unmasked.files.source import Source
from unmasked.text.passages import Chunks

if TYPE_CHECKING:
    from unmasked.model import TextEncoder

_WINDOW = 2048


class Hit(NamedTuple):
    """A text that was found."""

    score: float  # its cosine similarity to the query
    row: int  # its number in the corpus, from 0
    id: str | None = None  # its id, if it has one
    file: str | None = None  # the file that it is from, if that is known
    begin: int | None = None  # the position of a passage in its document, in characters
    end: int | None = None
    text: str | None = None  # the text, or the passage, if it is known


class VectorSearch:
    """Finds the nearest texts.

    Args:
        model: the model that made the vectors; it encodes the queries.
        texts: the source that the vectors were made from, to show the texts as well.
        prompt, prompt_name: put before a query; by default the model's prompt for queries.

    Raises:
        DataError: the vectors were made by another model, or from other texts.
    """

    def __init__(
        self,
        model: TextEncoder,
        stored: StoredVectors,
        texts: Source | None = None,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> None:
        self.model, self.stored, self.source = model, stored, texts
        self.prompt, self.prompt_name = prompt, prompt_name
        width = model.get_embedding_dimension() or 0
        made_by = stored.settings.get("model")
        if stored.width > width or made_by not in (None, model.fingerprint()):
            dtype = stored.settings.get("dtype", "float32")
            raise DataError(
                f"{stored.name} was made by another model, or in another number type ({dtype}), "
                "so a score would mean nothing. Fix: give --model the model that made it, and "
                f"--dtype {dtype}."
            )
        if texts is not None and stored.inputs and texts.on_disk:
            given = [
                (name, Path(file).stat().st_size)
                for name, file in zip(texts.names, texts.files, strict=True)
            ]
            if given != [(entry["file"], entry.get("bytes")) for entry in stored.inputs]:
                raise self._other_texts(texts)

    def __call__(self, queries: Sequence[str], count: int = 10) -> list[list[Hit]]:
        """The nearest texts to each query, best first; fewer than `count` if there are no more."""
        vectors: Any = self.model.encode_query(
            list(queries),
            prompt=self.prompt,
            prompt_name=self.prompt_name,
            truncate_dim=self.stored.width,
            show_progress_bar=False,
        )
        found = nearest_vectors(self.stored, np.asarray(vectors, dtype=np.float32), count)
        return [
            [self._hit(float(score), int(place)) for score, place in zip(*best, strict=True)]
            for best in zip(found.scores, found.places, strict=True)
        ]

    def _hit(self, score: float, place: int) -> Hit:
        cells = self.stored.cells(place)
        named = {name: cells[name] for name in Hit._fields if name in cells}
        if self.source is not None:
            if named["row"] >= len(self._texts):
                raise self._other_texts(self.source)
            named["text"] = self._texts[named["row"]].as_py()
        hit = Hit(score, **named)
        if hit.text is not None and hit.begin is not None:
            hit = hit._replace(text=hit.text[hit.begin : hit.end])
        return hit

    def _other_texts(self, texts: Source) -> DataError:
        given = f"{texts.name} is not what {self.stored.name} was made from"
        return DataError(f"{given}. Fix: give --texts the same files, or leave it out.")

    @cached_property
    def _texts(self) -> Any:
        """The texts of the source by row; Arrow saves the memory of a Python object per text."""
        import pyarrow as pa

        assert self.source is not None
        rows = (row.text for row in self.source.rows())
        parts = iter(lambda: list(islice(rows, _WINDOW)), [])
        return pa.chunked_array([pa.array(part, "large_string") for part in parts], "large_string")


def search_in(model: TextEncoder, vectors: str | Path, **options: Any) -> VectorSearch:
    """A search in a folder or file of vectors; the options are those of `VectorSearch`."""
    return VectorSearch(model, open_vectors(vectors), **options)


def search_texts(
    model: TextEncoder,
    source: Source,
    chunks: Chunks | None = None,
    *,
    progress: Callable[[int], None] = lambda rows: None,
    **options: Any,
) -> VectorSearch:
    """Encode the texts of a small corpus into memory, to search in them.

    Args:
        source: the texts; a row with a fault is an error.
        chunks: how texts are divided into passages; None encodes them whole.
        progress: called with the number of rows done so far.
        options: those of `VectorSearch`.
    """
    import pyarrow as pa

    source = replace(source, distinct=chunks is not None)  # a passage names its document by its id
    encoding, rows = Encoding(chunks=chunks), source.rows()
    encoding.check(model)
    parts, cells = [], []
    done = 0
    while window := list(islice(rows, _WINDOW)):
        for row in window:
            if row.fault is not None:
                raise source.error(row)
        found, vectors = encoding.passages(model, [row.text for row in window])
        parts.append(vectors)
        for document, begin, end in found:
            row = window[document]
            span = {"begin": begin, "end": end} if chunks else {}
            named = {"row": done + document, "id": row.id, "file": source.names[row.file]}
            cells.append(named | span | {"text": row.text})
        done += len(window)
        progress(done)
    if not done:
        raise source.empty()
    columns = pa.Table.from_pylist(cells)
    stored = StoredVectors(source.name, parts, "float32", encoding.width(model), columns)
    return VectorSearch(model, stored, **options)
