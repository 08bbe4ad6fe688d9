"""Real text that every machine has: the docstrings of the installed Python packages.

The demo and the bundled decoder need prose of a special field without a download. Every Python
installation has tens of thousands of docstrings, and each is a retrieval pair: its first sentence
says what the rest explains.

Files are only parsed (`ast`), never imported. Parsing takes about a second per 2 MB of source, so
files are read in a fixed shuffled order, and reading stops when enough docstrings are found.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

HELD_OUT_SHARE = 5  # one module in five is never trained on
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
_SKIPPED_FOLDERS = {"tests", "test", "testing", "__pycache__", "idlelib", "lib2to3"}


@dataclass(frozen=True, slots=True)
class Docstring:
    """One docstring: `summary` is its first sentence, `body` is all that follows."""

    module: str
    name: str
    summary: str
    body: str

    @property
    def text(self) -> str:
        return f"{self.summary}\n{self.body}" if self.body else self.summary

    @property
    def held_out(self) -> bool:
        """True for the fixed fifth of all modules that training never reads."""
        return hashlib.sha256(self.module.encode()).digest()[0] % HELD_OUT_SHARE == 0


def collect(
    roots: list[Path] | None = None, limit: int | None = None, workers: int = 2
) -> list[Docstring]:
    """Docstrings with distinct summaries and distinct bodies, in an order fixed by module names.

    Args:
        roots: folders to search; by default those of the running interpreter's packages.
        limit: the maximum number of docstrings.
        workers: the number of processes that parse.
    """
    if roots is None:
        paths = sysconfig.get_paths()
        roots = [Path(paths[name]) for name in ("stdlib", "purelib", "platlib")]
    # purelib and platlib are often the same folder; the order by digest mixes all packages.
    files = sorted(_source_files(list(dict.fromkeys(roots))), key=lambda item: _digest(item[1]))
    seen: set[str] = set()
    found = (doc for doc in _parse_all(files, workers) if _is_new(doc, seen))
    return list(islice(found, limit))


def pairs(docstrings: list[Docstring]) -> list[Docstring]:
    """The docstrings whose summary can serve as a query that the body answers."""
    return [
        d
        for d in docstrings
        if 4 <= len(d.summary.split()) <= 40
        and len(d.body.split()) >= 12
        and d.summary.lower() not in d.body.lower()
    ]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _is_new(doc: Docstring, seen: set[str]) -> bool:
    keys = {"s" + doc.summary.casefold()} | ({"b" + doc.body.casefold()} if doc.body else set())
    if keys & seen:
        return False
    seen |= keys
    return True


def _source_files(roots: list[Path]) -> Iterator[tuple[Path, str]]:
    """(file, dotted module name) of every source file below the roots, once."""
    for root in roots:
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if "site-packages" in parts or _SKIPPED_FOLDERS & set(parts):
                continue
            yield path, ".".join(parts)


def _parse_all(files: list[tuple[Path, str]], workers: int) -> Iterator[Docstring]:
    if workers <= 1:
        yield from chain.from_iterable(map(_parse, files))
        return
    with ProcessPoolExecutor(workers) as pool:  # unlike `Pool`, it raises if a process is killed
        try:
            for start in range(0, len(files), 512):  # few files ahead, as a limit may end it early
                found = pool.map(_parse, files[start : start + 512], chunksize=16)
                yield from chain.from_iterable(found)
        finally:
            pool.shutdown(cancel_futures=True)


def _parse(item: tuple[Path, str]) -> list[Docstring]:
    path, module = item
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError):
        return []  # a template, or a file for another version of Python
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [n for n in ast.walk(tree) if isinstance(n, kinds)]
    docs = []
    for node in nodes:
        raw = ast.get_docstring(node, clean=False)
        if raw and (doc := _split(module, getattr(node, "name", ""), raw)):
            docs.append(doc)
    return docs


def _split(module: str, name: str, raw: str) -> Docstring | None:
    text = inspect.cleandoc(raw).strip()
    if len(text) < 20:
        return None
    parts = _SENTENCE_END.split(text, maxsplit=1)
    summary = " ".join(parts[0].split())
    body = parts[1].strip() if len(parts) > 1 else ""
    return Docstring(module, name, summary, body[:4000])
