"""The whole road in minutes: `nano` learns the documentation of the packages on this machine.

The first sentence of a docstring has to find the rest of it among those of modules that training
never read. Nothing is downloaded, and nothing is special: the demo writes texts and a retrieval
task to files and runs an ordinary recipe on them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmasked.compat.llm2vec import LLM2Vec
from unmasked.errors import DataError
from unmasked.evaluate.scorer import make_scorer
from unmasked.files.docstrings import Docstring, collect, pairs
from unmasked.recipe.files import load_recipe
from unmasked.recipe.schema import Recipe

if TYPE_CHECKING:
    from unmasked.train.run import Listener

TASK = "docstrings"
METRICS = (f"{TASK}.ndcg@10", f"{TASK}.recall@1", f"{TASK}.recall@10")
FEWEST = 20  # documents below which a ranking says nothing
SEARCHES = 3


@dataclass(frozen=True)
class Size:
    """How much the demo reads and trains."""

    docstrings: int = 24_000
    documents: int = 1000
    mntp_steps: int = 100
    simcse_steps: int = 50
    supervised_steps: int = 120


FULL = Size()
QUICK = Size(docstrings=2500, documents=60, mntp_steps=8, simcse_steps=4, supervised_steps=6)


@dataclass(frozen=True)
class Search:
    """A held-out first sentence, and where its docstring was found before and after.

    Attributes:
        query: the sentence.
        wanted: name of the docstring it begins.
        before, after: rank of that docstring (1 is first) and the name of the first hit.
    """

    query: str
    wanted: str
    before: tuple[int, str]
    after: tuple[int, str]


def demo_recipe(folder: Path, size: Size) -> Recipe:
    """The ordinary recipe of the demo, on the files that `write_data` writes."""
    data = folder / "data"
    return load_recipe(
        "nano-supervised",
        [
            "name=demo",
            f"mntp.data={data / 'train.jsonl'}",
            f"mntp.steps={size.mntp_steps}",
            f"mntp.warmup_steps={size.mntp_steps // 10}",
            f"simcse.data={data / 'passages.jsonl'}",
            f"simcse.steps={size.simcse_steps}",
            f"simcse.warmup_steps={size.simcse_steps // 10}",
            f"supervised.data={data / 'pairs.jsonl'}",
            f"supervised.steps={size.supervised_steps}",
            f"supervised.warmup_steps={size.supervised_steps // 10}",
            "supervised.batch_size=48",
            "supervised.max_length=64",
            "supervised.learning_rate=1e-3",
            f"evaluate.tasks={data / TASK}",
        ],
    )


def write_data(folder: Path, size: Size) -> None:
    """Write the texts and the retrieval task below a run folder, unless they are there.

    Raises:
        DataError: too few docstrings on this machine.
    """
    data = folder / "data"
    if (data / TASK / "qrels" / "test.tsv").is_file():
        return
    found = collect(limit=size.docstrings)
    held_out = [d for d in pairs(found) if d.held_out][: size.documents]
    if len(held_out) < FEWEST:
        raise DataError(
            f"only {len(held_out)} usable docstrings of held-out modules were found in the "
            "packages of this Python. Fix: run the demo where more packages are installed."
        )
    train = [d for d in found if not d.held_out]
    data.mkdir(parents=True, exist_ok=True)
    _write_lines(data / "train.jsonl", ({"text": d.text} for d in train))
    _write_lines(data / "passages.jsonl", ({"text": t} for d in train for t in _passages(d) if t))
    answered = ({"query": d.summary, "positive": d.body} for d in pairs(train))
    _write_lines(data / "pairs.jsonl", answered)
    _write_task(data / TASK, held_out)


def run_demo(folder: Path, *, quick: bool, listener: Listener) -> list[Search]:
    """Write the data, run the recipe, and make a few searches before and after.

    Args:
        folder: run folder; an interrupted demo continues in it.
        quick: a handful of steps, to see that everything works.
        listener: told what happens.

    Returns:
        Searches with the untouched decoder (mean pooling) and with the result.
    """
    from unmasked.train.run import Run

    size = QUICK if quick else FULL
    recipe = demo_recipe(folder, size)
    Run(recipe, folder)  # refuses a folder that is not ours before writing to it
    listener.stage("reading the docstrings of the installed packages")
    write_data(folder, size)
    score = make_scorer(recipe.evaluate.tasks)
    after = Run(recipe, folder, score, listener).run()
    listener.stage("searching")
    before = LLM2Vec.from_pretrained(recipe.model.base, enable_bidirectional=False)
    return _searches(folder, before, after)


def _searches(folder: Path, before: LLM2Vec, after: LLM2Vec) -> list[Search]:
    documents = _read_lines(folder / "data" / TASK / "corpus.jsonl")
    queries = _read_lines(folder / "data" / TASK / "queries.jsonl")
    chosen = range(0, len(queries), max(1, len(queries) // SEARCHES))[:SEARCHES]
    names = [row["_id"].partition(" ")[2] for row in documents]
    found: dict[int, list[tuple[int, str]]] = {index: [] for index in chosen}
    for model in (before, after):
        corpus = model.encode_document([row["text"] for row in documents])
        asked = model.encode_query([queries[index]["text"] for index in chosen])
        for index, scores in zip(chosen, model.similarity(asked, corpus).numpy(), strict=True):
            rank = int((scores > scores[index]).sum()) + 1
            found[index].append((rank, names[int(scores.argmax())]))
    return [Search(queries[index]["text"], names[index], *found[index]) for index in chosen]


def _read_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _passages(doc: Docstring) -> tuple[str, str]:
    """What SimCSE calls a sentence: the summary, and the first paragraph of the rest."""
    return doc.summary, doc.body.split("\n\n", 1)[0]


def _write_task(folder: Path, docs: list[Docstring]) -> None:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    ids = [f"{i:05d} {d.module}.{d.name}".rstrip(".") for i, d in enumerate(docs)]
    _write_lines(
        folder / "corpus.jsonl",
        ({"_id": i, "text": d.body} for i, d in zip(ids, docs, strict=True)),
    )
    _write_lines(
        folder / "queries.jsonl",
        ({"_id": i, "text": d.summary} for i, d in zip(ids, docs, strict=True)),
    )
    rows = ["query-id\tcorpus-id\tscore", *(f"{i}\t{i}\t1" for i in ids)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
