"""The whole method in minutes: `nano` learns the documentation of the packages on this machine.

The task: the first sentence of a docstring must find the rest of it among the docstrings of modules
that training has not read. Nothing is downloaded. The demo writes texts and a retrieval task to
files, and runs an ordinary recipe on them. Cost: see `Size`; minutes on two cores.
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
from unmasked.model import TextEncoder
from unmasked.recipe.files import load_recipe
from unmasked.recipe.schema import Recipe

if TYPE_CHECKING:
    from unmasked.train.callback import Listener
    from unmasked.train.run import Run

TASK = "docstrings"
METRICS = (f"{TASK}.ndcg@10", f"{TASK}.recall@1", f"{TASK}.recall@10")
FEWEST = 20  # minimum number of documents for a meaningful ranking
SEARCHES = 3  # searches that are shown at the end


@dataclass(frozen=True)
class Size:
    """How much the demo reads and trains."""

    docstrings: int = 24_000  # that are read
    documents: int = 1000  # of the retrieval task
    mntp_steps: int = 100
    simcse_steps: int = 50
    supervised_steps: int = 120


FULL = Size()
QUICK = Size(docstrings=2500, documents=60, mntp_steps=8, simcse_steps=4, supervised_steps=6)


@dataclass(frozen=True)
class DemoSearch:
    """A held-out first sentence, and where its docstring was found before and after."""

    query: str
    wanted: str  # the name of the docstring that the sentence begins
    before: tuple[int, str]  # the rank of that docstring, from 1, and the name of the first hit
    after: tuple[int, str]


def demo_recipe(folder: Path, size: Size) -> Recipe:
    """The ordinary recipe of the demo, on the files that `write_data` writes."""
    data = folder / "data"
    stages = {
        "mntp": ("train.jsonl", size.mntp_steps),
        "simcse": ("passages.jsonl", size.simcse_steps),
        "supervised": ("pairs.jsonl", size.supervised_steps),
    }
    own = ("batch_size=48", "max_length=64", "learning_rate=1e-3")
    settings = ["name=demo", f"evaluate.tasks={data / TASK}", *(f"supervised.{s}" for s in own)]
    for stage, (file, steps) in stages.items():
        settings += [f"{stage}.data={data / file}", f"{stage}.steps={steps}"]
        settings += [f"{stage}.warmup_steps={steps // 10}"]
    return load_recipe("nano-supervised", settings)


def write_data(folder: Path, size: Size) -> None:
    """Write the texts and the retrieval task to a run folder, unless it has them.

    Raises:
        DataError: there are too few docstrings on this machine.
    """
    data = folder / "data"
    if (data / TASK / "qrels" / "test.tsv").is_file():  # the file that is written last
        return
    found = collect(limit=size.docstrings)
    held_out = [d for d in pairs(found) if d.held_out][: size.documents]
    if len(held_out) < FEWEST:
        raise DataError(
            f"only {len(held_out)} usable docstrings of held-out modules were found in the "
            "packages of this Python. Fix: run the demo where more packages are installed."
        )
    train = [d for d in found if not d.held_out]
    # The texts of SimCSE: each summary, and the first paragraph of the rest.
    passages = (text for d in train for text in (d.summary, d.body.split("\n\n", 1)[0]) if text)
    answered = ({"query": d.summary, "positive": d.body} for d in pairs(train))
    _write_rows(data / "train.jsonl", ({"text": d.text} for d in train))
    _write_rows(data / "passages.jsonl", ({"text": text} for text in passages))
    _write_rows(data / "pairs.jsonl", answered)
    _write_task(data / TASK, held_out)


def demo_run(folder: Path, *, quick: bool) -> Run:
    """The run of the demo in a folder, to read its results."""
    from unmasked.train.run import Run

    return Run(demo_recipe(folder, QUICK if quick else FULL), folder)


def run_demo(folder: Path, *, quick: bool, listener: Listener) -> list[DemoSearch]:
    """Write the data, run the recipe, and make a few searches before and after.

    Args:
        folder: run folder, in which an interrupted demo continues.
        quick: train only a few steps, to see that everything works.
        listener: is called as the run proceeds.

    Returns:
        Searches with the untouched decoder (mean pooling) and with the trained encoder.
    """
    from unmasked.train.run import Run

    size = QUICK if quick else FULL
    recipe = demo_recipe(folder, size)
    Run(recipe, folder)  # refuses a foreign folder before anything is written to it
    listener.stage("reading the docstrings of the installed packages")
    write_data(folder, size)
    score = make_scorer(recipe.evaluate.tasks)
    after = Run(recipe, folder, score, listener).run()
    listener.stage("searching")
    before = LLM2Vec.from_pretrained(recipe.model.base, enable_bidirectional=False)
    return _searches(folder / "data" / TASK, before, after)


def _searches(task: Path, before: TextEncoder, after: TextEncoder) -> list[DemoSearch]:
    documents, queries = (_read_rows(task / f"{name}.jsonl") for name in ("corpus", "queries"))
    chosen = range(0, len(queries), max(1, len(queries) // SEARCHES))[:SEARCHES]
    names = [row["_id"].partition(" ")[2] for row in documents]
    found: dict[int, list[tuple[int, str]]] = {index: [] for index in chosen}
    for model in (before, after):
        corpus = model.encode_document([row["text"] for row in documents])
        asked = model.encode_query([queries[index]["text"] for index in chosen])
        for index, scores in zip(chosen, model.similarity(asked, corpus).numpy(), strict=True):
            rank = int((scores > scores[index]).sum()) + 1
            found[index].append((rank, names[int(scores.argmax())]))
    return [DemoSearch(queries[index]["text"], names[index], *found[index]) for index in chosen]


def _write_task(folder: Path, docs: list[Docstring]) -> None:
    ids = [f"{i:05d} {d.module}.{d.name}".rstrip(".") for i, d in enumerate(docs)]
    for name, texts in (("corpus", [d.body for d in docs]), ("queries", [d.summary for d in docs])):
        rows = ({"_id": i, "text": text} for i, text in zip(ids, texts, strict=True))
        _write_rows(folder / f"{name}.jsonl", rows)
    lines = ["query-id\tcorpus-id\tscore", *(f"{i}\t{i}\t1" for i in ids)]
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:  # unlike `splitlines`, splits at line breaks only
        return [json.loads(line) for line in file]


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")
