"""The files that commands of the documentation name, small, in a folder of their own."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import statistics
import textwrap
from pathlib import Path

ANIMALS = ["cat", "dog", "horse", "owl", "fox", "whale", "ant", "crow"]
PLACES = ["in the garden", "near the river", "under the roof", "beside the road", "at the station"]
DEEDS = ["sleeps", "waits", "sings", "looks for food"]
SCENES = [*itertools.product(ANIMALS, PLACES, DEEDS)]
LINES = [f"The {animal} {deed} {place}." for animal, place, deed in SCENES]
ASKED = [f"Where is the {animal} that {deed} {place}?" for animal, place, deed in SCENES]


def write_jsonl(file: Path, rows: list[dict]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_rows(file: Path, rows: list[list[object]], delimiter: str = "\t") -> None:
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out, delimiter=delimiter).writerows(rows)


def write_page_files(folder: Path) -> None:
    """Everything that a page takes for given."""
    (folder / "texts.txt").write_text("\n".join(LINES), encoding="utf-8")
    scored = [
        [score, a, b] for score, a, b in zip([5, 3, 1, 0] * 4, LINES, LINES[4:], strict=False)
    ]
    for name in ("sts.tsv", "sts_korean.tsv"):
        write_rows(folder / name, [["score", "sentence1", "sentence2"], *scored])
    pairs = list(zip(ASKED, LINES, strict=True))[:120]
    for name in ("pairs.jsonl", "duplicates.jsonl"):
        write_jsonl(folder / name, [{"query": q, "positive": p} for q, p in pairs])
    write_rows(folder / "faq.csv", [["asked", "said"], *map(list, pairs)], ",")
    grit = [{"query": ["Answer:", q], "pos": [["", p]], "neg": [["", "No."]]} for q, p in pairs]
    write_jsonl(folder / "grit.jsonl", grit)
    write_jsonl(folder / "english.jsonl", [{"abstract": line} for line in LINES])
    write_jsonl(folder / "korean.jsonl", [{"abstract": f"{line} 고양이"} for line in LINES[:80]])
    words = "\n\n".join("\n".join(f"{w}\t{len(w) % 2}" for w in x.split()) for x in LINES[:40])
    for name in ("pos_train.tsv", "pos_dev.tsv"):
        (folder / name).write_text(words + "\n", encoding="utf-8")

    (folder / "corpus").mkdir()
    rows = [{"text": line, "url": f"u{i}", "year": 2000 + i} for i, line in enumerate(LINES[:60])]
    write_jsonl(folder / "corpus" / "part-1.jsonl", rows)
    (folder / "documents").mkdir()
    for number, animal in enumerate(ANIMALS):
        own = [line for line in LINES if f" {animal} " in line]
        parts = [f"## The {animal}, part {i}\n\n{own[i]}\n{own[-i]}\n" for i in range(1, 12)]
        text = f"# About the {animal}\n\nWhat is known.\n\n" + "\n".join(parts)
        (folder / "documents" / f"{number}.md").write_text(text, encoding="utf-8")
    (folder / "project").mkdir()
    for module in (statistics, textwrap, shutil):
        shutil.copy(module.__file__, folder / "project")
