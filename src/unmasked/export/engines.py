"""Runs what was exported, to compare it: one `Engine` for each kind of folder.

What the engine cannot be told is not told to it: a text goes through it as its users would send
it. The folder says in `unmasked_export.json` what it is; without that file it is read as stock
sentence-transformers reads it.

Shapes: N texts, B rows of a batch, T tokens, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmasked.errors import ModelError, unknown

MANIFEST = "unmasked_export.json"
Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Engine:
    """A way to get vectors from a folder.

    Attributes:
        name: what computes them.
        vectors: (N, D) vectors of N ``(instruction, text)`` pairs.
    """

    name: str
    vectors: Callable[[Pairs], np.ndarray]


def engine_of(folder: Path) -> Engine:
    """The engine of a folder.

    Raises:
        ModelError: it is no folder, or its format is not known.
        MissingExtraError: its engine is not installed.
    """
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is neither a folder nor an address. Allowed: a folder of `unmasked export`, "
            "of a saved encoder, or http://HOST:PORT."
        )
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return stock_engine(folder)
    kind = json.loads(manifest.read_text(encoding="utf-8")).get("format", "")
    kinds = {"vllm": stock_engine, "tei": stock_engine}
    if kind not in kinds:
        raise ModelError(unknown(f"format in {manifest}", kind, kinds))
    return kinds[kind](folder)


def stock_engine(folder: Path) -> Engine:
    """Stock sentence-transformers, with the instruction given as its prompt."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), trust_remote_code=False)
    empty = model.prompts.get(model.default_prompt_name or "", "")

    def vectors(pairs: Pairs) -> np.ndarray:
        prompts = [f"{i}\n" if i and not i[-1].isspace() else i for i, _ in pairs]
        rows = [
            model.encode([text], prompt=prompt or empty, show_progress_bar=False)[0]
            for prompt, (_, text) in zip(prompts, pairs, strict=True)
        ]
        return np.stack(rows)

    return Engine("sentence-transformers", vectors)
