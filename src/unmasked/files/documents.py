"""Reads whole files as texts, each with its path as id: a folder of documents.

.txt, .md and .rst are read unchanged; of .html, the visible text; .pdf and .docx are read by pypdf
and python-docx, which the extra ``documents`` installs. Nothing in a file is executed or fetched. A
file that cannot be read is a row with a fault, so that the caller may skip it. Headers, footers and
notes of .docx, and pictures of any kind, are not read.

Cost: one file in memory. About ten .pdf pages per second, thousands of the other files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

from unmasked.errors import DataError, MissingExtraError, no_such_path
from unmasked.files.content import LOOKED_AT, Fault, file_fault, row_fault
from unmasked.files.readers import Cells

PREFIX = "documents:"  # the prefix of a folder, or a file, whose files are one text each
DOCUMENT_KINDS = (".txt", ".md", ".markdown", ".rst", ".html", ".htm", ".pdf", ".docx")
_LIBRARIES = {".pdf": "pypdf", ".docx": "docx"}
_PACKAGES = {"docx": "python-docx"}  # the package, if it has another name than its module


def visible(folder: Path) -> list[Path]:
    """Files at any depth, sorted, without hidden ones and markers such as ``_SUCCESS``."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    )


def instead(place: Path, kinds: Sequence[str]) -> str:
    """The fix for a file, or a folder, with none of the kinds whose rows can be read."""
    files = visible(place) if place.is_dir() else [place]
    found = dict.fromkeys(file.suffix.lower() for file in files)
    if ".txt" not in kinds and ".txt" in found:
        return 'write pairs, as .jsonl with {"query": "...", "positive": "..."} on each line'
    if documents := [kind for kind in found if kind in DOCUMENT_KINDS]:
        return (
            f"encode and search take {', '.join(documents)} with --whole-files, one text per file; "
            "to train on them, write one text per line (docs/tutorials/own-domain.md)"
        )
    return f"give a folder or a file of {', '.join(kinds)}"


def find_documents(place: Path) -> list[str]:
    """The documents of a folder, or a single one.

    Raises:
        DataError: there is no document.
        MissingExtraError: the library that reads a kind of file is not installed.
    """
    if not place.exists():
        raise DataError(no_such_path(place))
    files = visible(place) if place.is_dir() else [place]
    found = [str(file) for file in files if file.suffix.lower() in DOCUMENT_KINDS]
    if not found:
        allowed = ", ".join(DOCUMENT_KINDS)
        raise DataError(
            f"{place}: there is no document in it. Allowed: {allowed}, or a folder of them. "
            "Fix: give another file or folder."
        )
    for kind in {Path(file).suffix.lower() for file in found} & _LIBRARIES.keys():
        if find_spec(_LIBRARIES[kind]) is None:
            module = _LIBRARIES[kind]
            raise MissingExtraError(_PACKAGES.get(module, module), "documents")
    return found


def read_whole(path: str, column: str, name: str) -> Cells:
    """A file as one row with its text in a column and its name as id, or with a fault."""
    text, fault = _read(Path(path))
    return Cells(1, {} if fault else {column: text, "id": name}, fault)


def _read(path: Path) -> tuple[str, Fault | None]:
    kind = path.suffix.lower()
    if kind in _LIBRARIES:
        extract = _pdf if kind == ".pdf" else _docx
        return _extracted(path, extract)
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return "", file_fault(str(path), raw[:LOOKED_AT]) or row_fault(str(path), error)
    if kind in (".html", ".htm"):
        page = _Page()
        page.feed(text)
        page.close()
        return page.text(), None
    return text.replace("\r\n", "\n"), None


def _extracted(path: Path, extract: Callable[[Path], str]) -> tuple[str, Fault | None]:
    try:
        return extract(path).encode(errors="replace").decode(), None
    except Exception as error:  # the libraries raise almost anything on a damaged file
        if isinstance(error, OSError) and error.errno is not None:  # the operating system's own
            raise
        given = f"not readable as {path.suffix} ({type(error).__name__}: {str(error)[:80]})"
        return "", (given, "save it again, without a password, or remove it from the folder")


def _pdf(path: Path) -> str:
    import pypdf

    with pypdf.PdfReader(path) as reader:
        return "\n\n".join(page.extract_text() for page in reader.pages)


def _docx(path: Path) -> str:
    import docx
    from docx.table import Table

    parts = []
    for block in docx.Document(str(path)).iter_inner_content():
        if isinstance(block, Table):
            rows = ("\t".join(cell.text for cell in row.cells) for row in block.rows)
            parts.append("\n".join(rows))
        else:
            parts.append(block.text)
    return "\n\n".join(part for part in parts if part.strip())


class _Page(HTMLParser):
    """Collects the text of a page; blocks are separated, and scripts and styles are left out."""

    _HIDDEN = frozenset({"script", "style"})
    _BLOCKS = re.compile(
        r"address|article|aside|blockquote|d[dlt]|div|fig(caption|ure)|footer|form|h[1-6r]|header|li|"
        r"main|nav|[ou]l|p|pre|section|table|title|tr"
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._hidden = False
        self._open_pre = 0  # how many <pre> are open; white space in them is kept

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self._hidden = tag in self._HIDDEN
        self._open_pre += tag == "pre"
        self._border(tag)
        if tag in ("td", "th"):
            self._parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False
        self._open_pre = max(self._open_pre - (tag == "pre"), 0)
        self._border(tag)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._parts.append(data if self._open_pre else re.sub(r"\s+", " ", data))

    def _border(self, tag: str) -> None:
        if self._BLOCKS.fullmatch(tag):
            self._parts.append("\n\n")
        elif tag == "br":
            self._parts.append("\n")

    def text(self) -> str:
        """The text of the page, without several empty lines in a row."""
        joined = re.sub(r"[ \t]*\n( (?! ))?", "\n", "".join(self._parts))
        return re.sub(r"\n{3,}", "\n\n", joined).strip()
