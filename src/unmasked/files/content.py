"""Recognises by its first bytes a file that is not text in UTF-8, and says how to convert it.

UTF-16 that is read as UTF-8 is text full of NUL characters, and a .gz that is called .txt is no
text at all. Such a file is refused as a whole, with a command that corrects it, as skipping its
faulty lines would leave a few that are readable by accident. The fix for a single line that is not
UTF-8 names an encoding in which the line is text, found by trying several.

Cost: the first four kilobytes of each file are examined.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

LOOKED_AT = 4096  # bytes at the beginning of a file that are examined
Fault = tuple[str, str]  # what is wrong with a row or a file, and how to correct it
_BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_CONVERTED_TWICE = tuple(
    "\ufeff".encode(name).decode("latin1").encode() for name in ("utf-16-le", "utf-16-be")
)
"""The byte order marks of UTF-16 after a conversion from latin1 to UTF-8."""
_OTHER_KINDS = {  # first bytes: kind, and a command on the name, a new name or the name as .jsonl
    b"\x1f\x8b": ("gzip", "cp {0} {0}.gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "cp {0} {0}.zst"),
    b"PAR1": ("Parquet", "cp {0} {0}.parquet"),
    b"BZh": ("bzip2", "bunzip2 -c {0} > {1}"),
    b"\xfd7zXZ": ("xz", "unxz -c {0} > {1}"),
    b"%PDF-": ("PDF", "pdftotext {0} {1}"),
    b"PK\x03\x04": ("a zip archive (.xlsx and .docx are such)", ""),
    b"SQLite format 3\0": ("an SQLite database", ""),
    b"version https://git-lfs.github.com/spec/": ("a pointer of Git LFS", "git lfs pull"),
}
_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*\{")
_OBJECTS = re.compile(rb"(\s*\{\s*\"[^\"\n]*\"\s*:[^\n]*(\n|$)){1,3}")
_TXT = re.compile(r"\.txt(?=[^/]*$)", re.IGNORECASE)
_PACKED = re.compile(r"\.(gz|zst)$", re.IGNORECASE)
_HTML = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html)\b", re.IGNORECASE)
_OF_ONE_SCRIPT = ("cp949", "shift_jis", "gb18030", "big5", "cp1251")
"""Encodings that are tried in this order if a line is neither UTF-8 nor Western European."""


def file_fault(path: str, head: bytes) -> Fault | None:
    """What is wrong with a file as a whole, if its first `LOOKED_AT` bytes say so; else None."""
    for mark, (kind, command) in _OTHER_KINDS.items():
        if head.startswith(mark):
            return f"it is {kind} by its content", _as_what_it_is(path, kind, command)
    if _HTML.match(head):
        return "it is a page of HTML", "download the file that the page is about"
    if _suffix(path) == ".jsonl" and _ARRAY.match(head):
        return "it is one JSON array, and not one object per line", by_line(path)
    is_txt = path == "-" or _suffix(path) == ".txt"
    if is_txt and _OBJECTS.fullmatch(b"".join(head.splitlines(keepends=True)[:3])):
        given = "every line of it is a JSON object, and not a text"
        return given, _as_what_it_is(path, "JSON lines", "cp {0} {2}")
    if head.startswith(_CONVERTED_TWICE) and 0 in head:
        given = "it is UTF-16 that was converted to UTF-8 as if it were latin1"
        return given, _piped(path, "iconv -f utf-8 -t latin1", "iconv -f utf-16 -t utf-8")
    marks = _BYTE_ORDER_MARKS.items()
    encoding = next((name for mark, name in marks if head.startswith(mark)), None)
    how = "as its byte order mark says"
    if encoding is None:
        encoding, how = _wide_encoding(head), "without a byte order mark"
    if encoding is not None:
        return f"it is {encoding}, {how}, and not UTF-8", converted(path, encoding)
    if b"\r" in head[:-1] and b"\n" not in head:
        given = "its lines end in CR alone, as on very old computers, so it is read as one line"
        return given, _piped(path, r"tr '\r' '\n'")
    return None


def _as_what_it_is(path: str, kind: str, command: str) -> str:
    """The command after which a file can be read, or advice if there is no command."""
    if not command:
        return "export it as .csv in UTF-8"
    if path == "-":
        return f"write it to a file with the suffix of {kind}, and give that file"
    if kind == "gzip" and path.lower().endswith(".gz"):  # packed twice
        return _piped(path, "gzip -dc")
    names = path, str(_beside(path)), _TXT.sub(".jsonl", path)
    return command.format(*map(shlex.quote, names))


def _suffix(path: str) -> str:
    """The suffix of a file, unpacked and in small letters."""
    return Path(_PACKED.sub("", path)).suffix.lower()


def _beside(path: str) -> Path:
    """A new name for the output of a command that converts a file."""
    place = Path("texts.txt" if path == "-" else path)
    name = _PACKED.sub("", place.name)
    if name.endswith(".json"):
        return place.with_name(f"{name}l")
    stem, dot, kind = name.rpartition(".")
    return place.with_name(f"{stem}-fixed{dot}{kind}" if dot else f"{name}-fixed")


def by_line(path: str) -> str:
    """The command that makes a file of one object per line, from a JSON array or such lines."""
    if path.endswith(".json"):
        with Path(path).open("rb") as file:
            if not _ARRAY.match(file.read(LOOKED_AT)):
                return f"cp {shlex.quote(path)} {shlex.quote(f'{path}l')}"
    code = "import json, sys; print(*map(json.dumps, json.load(sys.stdin)), sep='\\n')"
    return _piped(path, f"python -c {shlex.quote(code)}")


def converted(path: str, encoding: str) -> str:
    """The command that writes a file again in UTF-8."""
    return _piped(path, f"iconv -f {encoding.lower()} -t utf-8")


def _piped(path: str, *commands: str) -> str:
    """The command line that pipes a file, unpacked, through commands into a new file.

    For standard input it begins with the first command, which reads what is piped into it.
    """
    unpack = {".gz": "gzip -dc", ".zst": "zstd -dc"}.get(Path(path).suffix.lower())
    given, other = shlex.quote(path), shlex.quote(str(_beside(path)))
    if unpack:
        return f"{' | '.join([f'{unpack} {given}', *commands])} > {other}"
    if path == "-":
        return f"{' | '.join(commands)} > {other}"
    return f"{' | '.join([f'{commands[0]} < {given}', *commands[1:]])} > {other}"


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a byte order mark, recognised by zero bytes: UTF-8 text has none."""
    zeros = head.count(0)
    if not zeros:
        return None
    controls = sum(byte < 32 and byte not in b"\0\t\n\r\f\x1b" for byte in head)
    if _is_utf8(head) and not controls and zeros * 5 < len(head):
        return None  # a stray byte, which is the fault of its row
    for names in (("UTF-32LE", "UTF-32BE"), ("UTF-16LE", "UTF-16BE")):
        ascii_count, encoding = max((_count_ascii(head, name), name) for name in names)
        characters = len(head) * 8 // int(encoding[4:6])
        # A head that is UTF-8 as well must be mostly ASCII, as then every other byte is zero.
        if ascii_count and (controls or not _is_utf8(head) or 2 * ascii_count > characters):
            return encoding
    return None


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.end >= len(head) - 3  # the end of the head may cut a character
    return True


def _count_ascii(raw: bytes, encoding: str) -> int:
    """How many characters are ASCII if these bytes are text in an encoding; 0 if they are not."""
    text = raw[: len(raw) // 4 * 4 or len(raw)].decode(encoding, "replace")
    strange = ("Cc", "Cn", "Co")
    if any(unicodedata.category(c) in strange and c not in "\t\r\n" for c in text):
        return 0
    return 0 if "\ufffd" in text[:-1] else sum(map(str.isascii, text))


def row_fault(path: str, error: UnicodeDecodeError | OverflowError) -> Fault:
    """The fault of a line that is not UTF-8, with an encoding in which it is text.

    Or, in .parquet, of a row with a time that Python cannot hold.
    """
    if isinstance(error, OverflowError):
        given = f"a date outside the years 1 to 9999, or too long a duration ({error})"
        return given, "correct it, or leave its column out"
    raw, place = bytes(error.object), error.start
    given = f"not UTF-8 (byte {raw[place]:#04x} at position {place})"
    encoding = encoding_of(raw)
    if encoding is None:
        return given, "save the file as UTF-8; this line is text in none of the encodings tried"
    fix = f"convert the file; this line is text in {encoding}: {converted(path, encoding)}"
    return given, fix


def encoding_of(raw: bytes) -> str | None:
    """An encoding in which a line is text of one script; None if there is none among those tried.

    Western European encodings are tried first if most bytes above 127 are single bytes between
    ASCII letters; those of East Asia and Cyrillic are tried first if they come in runs.
    """
    high = [byte > 127 for byte in raw]
    pairs = sum(a and b for a, b in pairwise(high))
    western = ("cp1252", "latin1")
    in_runs = pairs * 2 >= sum(high) > 1
    order = (*_OF_ONE_SCRIPT, *western) if in_runs else (*western, *_OF_ONE_SCRIPT)
    return next((name for name in order if _is_text_in(raw, name)), None)


def _is_text_in(raw: bytes, encoding: str) -> bool:
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    others = [char for char in text if not char.isascii()]
    return all(unicodedata.category(char)[0] in "LMNPSZ" for char in others) and (
        encoding not in _SCRIPTS or _share(others, _SCRIPTS[encoding]) > 0.5
    )


_SCRIPTS = {
    "cp949": ((0xAC00, 0xD7A3), (0x3000, 0x303F)),
    "shift_jis": ((0x3040, 0x30FF), (0x3000, 0x303F), (0x4E00, 0x9FFF)),
    "gb18030": ((0x4E00, 0x9FFF), (0x3000, 0x303F), (0xFF00, 0xFFEF)),
    "big5": ((0x4E00, 0x9FFF), (0x3000, 0x303F), (0xFF00, 0xFFEF)),
    "cp1251": ((0x0400, 0x04FF),),
}
"""The Unicode blocks of each encoding's script, so that another script is not mistaken for it."""


def _share(characters: Iterable[str], blocks: Iterable[tuple[int, int]]) -> float:
    found = [any(a <= ord(char) <= b for a, b in blocks) for char in characters]
    return sum(found) / max(len(found), 1)


_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}
"""Separators of the columns of .csv; spreadsheets use a semicolon where numbers have a decimal
comma."""


def separator(first: str) -> tuple[str, str, str]:
    """The first line of .csv as it should be read, the separator of the columns, and its name.

    It is the first of `_SEPARATORS` in the header, unless a line ``sep=;`` for spreadsheets, which
    is read as a blank line, comes before the header.
    """
    declared = re.fullmatch(r"sep=(.)[\r\n]*", first, re.IGNORECASE)
    if declared:
        return "\n", declared[1], _SEPARATORS.get(declared[1], f"'{declared[1]}'")
    between = next((mark for mark in _SEPARATORS if mark in first), ",")
    return first, between, _SEPARATORS[between]
