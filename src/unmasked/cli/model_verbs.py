"""Verbs for a whole model: convert, evaluate, search, analyse, doctor, push."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from unmasked.cli import terminal
from unmasked.cli.failures import MISUSED
from unmasked.cli.options import (
    CHUNK,
    COLUMN,
    DTYPE,
    JSON_FILE,
    LATE,
    MODEL,
    NEW_FOLDER,
    OVERLAP,
    PROMPT_NAME,
    WHOLE,
    Dtype,
    Pooling,
    divided,
    documents,
)
from unmasked.cli.shipping.cut_scores import score_cuts
from unmasked.errors import DataError
from unmasked.files.writing import write_text


def convert(
    model: MODEL,
    output: NEW_FOLDER,
    peft: Annotated[
        list[str] | None, Option(help="Adapter to merge; repeat for more, in order.")
    ] = None,
    pooling: Annotated[
        Pooling | None,
        Option(help="Pooling of token states.", show_default="the folder's, or mean"),
    ] = None,
    max_length: Annotated[
        int | None, Option(min=2, help="Maximum number of tokens per input.", show_default="512")
    ] = None,
    include_instruction: Annotated[
        bool,
        Option("--include-instruction", help="Pool BOS and the instruction, as all engines do."),
    ] = False,
    dtype: DTYPE = "checkpoint",
    attention: Annotated[
        str | None,
        Option(help="Attention: sdpa, eager, ...", show_default="as transformers chooses"),
    ] = None,
    allow_partial: Annotated[
        bool, Option("--allow-partial", help="Accept layers that stay causal (hybrids).")
    ] = False,
    layers: Annotated[
        int | None, Option(help="Keep only the first LAYERS layers.", show_default="all")
    ] = None,
) -> None:
    """Take the causal mask off, prove it, and save an encoder, without training.

    Stock sentence-transformers loads the folder to the same vectors.
    """
    with terminal.loading(f"loading {model}"):
        from unmasked.compat.llm2vec import LLM2Vec

        encoder = LLM2Vec.from_pretrained(
            model,
            list(peft or []),
            enable_bidirectional=True,  # also of an encoder that was saved with its mask closed
            pooling_mode=pooling,
            max_length=max_length,
            skip_instruction=False if include_instruction else None,
            dtype=dtype,
            attn_implementation=attention,
            allow_partial=allow_partial,
            layers=layers,
        )
    terminal.show(encoder.report.summary())
    with terminal.waiting("saving"):
        encoder.save(output)
    terminal.closing(output)


def _formats(wanted: bool) -> None:
    if wanted:
        from unmasked.evaluate.tasks.formats import formats_text

        typer.echo(formats_text())  # tabs stay tabs
        raise typer.Exit


def evaluate(
    models: Annotated[
        list[str],
        Argument(help="Hub name, folder, or 'nano'; the first is compared to the others."),
    ],
    tasks: Annotated[
        list[str], Option(help="Task file or folder, words:FILE, or mteb name; repeat for more.")
    ],
    languages: Annotated[
        list[str] | None, Option(help="Languages of public tasks: eng, kor, ...; repeat for more.")
    ] = None,
    against: Annotated[
        Literal["causal"] | None, Option(help="Also score the causal decoder, with each pooling.")
    ] = None,
    base: Annotated[
        str | None, Option(help="The causal decoder.", show_default="the base of the first model")
    ] = None,
    results: Annotated[
        Path, Option(help="Folder that keeps results of public tasks, to be continued.")
    ] = Path("mteb"),
    every: Annotated[
        bool, Option("--all", help="Show every metric, not only the main one of each task.")
    ] = False,
    layers: Annotated[
        list[int] | None, Option(help="Also score the first LAYERS layers alone; repeat for more.")
    ] = None,
    dimensions: Annotated[
        list[int] | None, Option(help="Also score shorter vectors; repeat for more.")
    ] = None,
    json_file: JSON_FILE = None,
    formats: Annotated[
        bool,
        Option("--formats", callback=_formats, is_eager=True, help="Show examples of task files."),
    ] = False,
) -> None:
    """Score models with 95 % intervals, and show what the first gains on each other one."""
    from unmasked.cli import tables
    from unmasked.evaluate.compare import compare_encoders
    from unmasked.evaluate.scorer import make_scorer

    score = make_scorer(tasks, languages, results)
    if layers or dimensions:
        score_cuts(models, against, score, layers or [], dimensions or [], json_file)
        return
    with terminal.loading("loading the libraries"):
        from unmasked.checkpoint.location import locate
        from unmasked.compat.llm2vec import LLM2Vec
        from unmasked.compat.origin import find_base
        from unmasked.evaluate.baselines import causal_baselines
    scored = {}
    baselines = causal_baselines(locate(base) if base else find_base(models[0])) if against else ()
    encoders = ((m, partial(LLM2Vec.from_pretrained, m, allow_partial=True)) for m in models)
    for name, make in (*baselines, *encoders):
        with terminal.waiting(f"scoring {name}"):
            scored[name] = score(make())
    rows = compare_encoders({name: scored[name] for name in dict.fromkeys([*models, *scored])})
    tables.score_table(rows, every)
    if json_file:
        write_text(json_file, json.dumps([row.as_dict() for row in rows], indent=2) + "\n")


VECTORS = Annotated[
    str,
    Argument(
        metavar="VECTORS|CORPUS",
        help="Folder or file that unmasked encode wrote; or texts, encoded for this time.",
    ),
]
QUERY = Annotated[
    str | None, Argument(help="What to look for.", show_default="asked for, one after another")
]
TEXTS = Annotated[
    str | None,
    Option(
        help="The texts that were encoded, to show them; not needed where they were kept with "
        "--keep text."
    ),
]
QUERY_PROMPT = Annotated[
    str | None, Option(help="Text put before a query.", show_default="the model's for queries")
]
STORED_DTYPE = Annotated[
    Dtype | None,
    Option(help="Number type of the weights.", show_default="that of the vectors, or auto"),
]


def search(
    where: VECTORS,
    query: QUERY = None,
    model: Annotated[str, Option(help="The model that encoded: its name or folder.")] = ...,  # type: ignore[assignment]
    top: Annotated[int, Option(min=1, help="How many texts to show.")] = 10,
    texts: TEXTS = None,
    text_column: COLUMN = "text",
    whole_files: WHOLE = False,
    chunk: CHUNK = None,
    overlap: OVERLAP = 0,
    late: LATE = False,
    prompt: QUERY_PROMPT = None,
    prompt_name: PROMPT_NAME = None,
    dtype: STORED_DTYPE = None,
    json_file: JSON_FILE = None,
) -> None:
    """Show the nearest texts of an encoded corpus, with scores (cosine); exact, for looking.

    Without a query it asks for one after another, until an empty line.
    """
    from unmasked.cli import tables
    from unmasked.corpus import search as room
    from unmasked.files.source import Source

    stored = room.open_vectors(where) if room.are_vectors(Path(where)) else None
    chunks = divided(chunk, overlap, late)
    if stored is not None and chunks is not None:
        raise DataError(f"--chunk divides texts, and {where} holds vectors. Fix: leave it out.")
    made = stored.settings if stored is not None else {}
    with terminal.loading(f"loading {model}"):
        from unmasked.compat.llm2vec import LLM2Vec

        encoder = LLM2Vec.from_pretrained(
            model, dtype=dtype or made.get("dtype", "auto"), quantize=made.get("quantize")
        )
    prompts = {"prompt": prompt, "prompt_name": prompt_name}
    if stored is None:
        source = Source(documents(where, whole_files), text_column)
        with terminal.Line() as line:
            line.begin("encoding")
            told = partial(line.advance, total=None)
            found = room.search_texts(encoder, source, chunks, progress=told, **prompts)
    else:
        of = Source(documents(texts, whole_files), text_column) if texts else None
        found = room.VectorSearch(encoder, stored, of, **prompts)
    answers = []
    for asked in [query] if query is not None else _queries():
        (hits,) = found([asked], top)
        tables.show_hits(hits)
        answers.append({"query": asked, "hits": [hit._asdict() for hit in hits]})
    if json_file:
        write_text(json_file, json.dumps(answers, indent=2, ensure_ascii=False) + "\n")


def _queries() -> Iterator[str]:
    """Queries that are typed, or lines of standard input, until an empty one."""
    shown = "query: " if sys.stdin.isatty() else ""
    while True:
        try:
            asked = input(shown).strip()
        except EOFError:
            return
        if not asked:
            return
        yield asked


def analyse(
    model: MODEL,
    task: Annotated[
        str | None,
        Option(
            help="Task with texts that belong together (STS, pairs, reranking, retrieval).",
            show_default="docstrings of this Python",
        ),
    ] = None,
    output: Annotated[Path | None, Option("-o", "--output", help="Folder for the figures.")] = None,
    json_file: JSON_FILE = None,
) -> None:
    """Compare closed and open mask layer by layer, and measure the shape of the vectors."""
    from unmasked.cli import tables

    with terminal.loading(f"analysing {model}"):
        from unmasked.evaluate import analysis

        found = analysis.analyse(model, task)
    tables.show_analysis(found)
    if json_file:
        write_text(json_file, json.dumps(found.as_dict(), indent=2) + "\n")
    for path in analysis.draw(found, output) if output else ():
        terminal.show(f"figure  {path}")


def doctor(
    model: Annotated[str | None, Argument(help="Model to examine as well.")] = None,
    load: Annotated[
        bool, Option("--load", help="Download the weights of a hub model and examine them.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Write JSON, for programs.")] = False,
) -> None:
    """Examine this machine, or a model: is it really bidirectional? Exit code 2 if it is not."""
    from unmasked.doctor import environment, examine, lines

    waiting = terminal.loading if model else terminal.waiting
    with waiting(f"examining {model or 'this machine'}"):
        found = examine(model, load or None) if model else environment()
    if as_json:
        terminal.show(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        terminal.facts(lines(found))
    if not found.get("bidirectional", True):
        raise typer.Exit(MISUSED)


def push(
    folder: Annotated[Path, Argument(help="Folder of a saved model, or of a run.")],
    repository: Annotated[str, Argument(help="NAME or ORGANISATION/NAME on the hub.")],
    public: Annotated[bool, Option("--public", help="Let everybody see it.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="List the files and send nothing.")] = False,
) -> None:
    """Upload a saved model to the Hugging Face hub, private by default."""
    from unmasked.checkpoint import push as hub
    from unmasked.checkpoint.location import locate

    hub.check_name(repository)
    folder = Path(locate(folder).name)
    files = hub.list_files(folder)
    rows = [[name, terminal.short(size, "B")] for name, size in files]
    terminal.show_table(["file", "size"], rows)
    total, who = sum(size for _, size in files), "public" if public else "private"
    terminal.show(f"{len(files)} files, {terminal.short(total, 'B')}, to {repository} ({who})")
    if dry_run:
        terminal.show("dry run: nothing was sent")
        return
    with terminal.waiting("uploading"):
        address = hub.push(folder, repository, private=not public)
    terminal.show(f"pushed  {address}")
