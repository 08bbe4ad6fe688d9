"""Verbs that use or examine a finished model: convert, evaluate, search, analyse, doctor, push."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from unmasked.cli import options, terminal
from unmasked.cli.failures import MISUSED
from unmasked.cli.shipping.cut_scores import score_cuts
from unmasked.errors import DataError
from unmasked.files.writing import write_text


def convert(
    model: options.MODEL,
    output: options.NEW_FOLDER,
    peft: Annotated[
        list[str] | None,
        Option(help="PEFT adapter to merge into the model; repeat for more, in their order."),
    ] = None,
    pooling: Annotated[
        options.Pooling | None,
        Option(help="Pooling of token states.", show_default="as saved, else mean"),
    ] = None,
    max_length: Annotated[
        int | None,
        Option(min=2, help="Maximum tokens per input.", show_default="as saved, else 512"),
    ] = None,
    include_instruction: Annotated[
        bool,
        Option(
            "--include-instruction", help="Also pool BOS and the instruction, as most engines do."
        ),
    ] = False,
    dtype: options.DTYPE = "checkpoint",
    attention: Annotated[
        str | None,
        Option(
            help="Attention implementation: sdpa, eager, ...", show_default="transformers' choice"
        ),
    ] = None,
    allow_partial: options.ALLOW_PARTIAL = False,
    layers: Annotated[
        int | None, Option(min=1, help="Keep only the first LAYERS layers.", show_default="all")
    ] = None,
) -> None:
    """Remove the causal mask of a decoder, prove it, and save an encoder, without training.

    Stock sentence-transformers loads the folder and gives the same vectors.
    """
    encoder = terminal.load_encoder(
        model,
        peft_model_name_or_path=list(peft or []),
        enable_bidirectional=True,  # even for an encoder that was saved with its mask closed
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

        typer.echo(formats_text())  # not `terminal.show`: rich would expand the tabs of .tsv
        raise typer.Exit


COMPARED = Annotated[
    list[str],
    Argument(help="Hub names, folders or 'nano'; the first model is compared with the others."),
]
TASKS = Annotated[
    list[str],
    Option(
        help="Task file or folder (see --formats), words:FILE for a linear probe on words, or the "
        "mteb name of a public task or benchmark; repeat for more."
    ),
]
LANGUAGES = Annotated[
    list[str] | None,
    Option(help="Language of public tasks: eng, kor, ...; repeat for more.", show_default="all"),
]


def evaluate(
    models: COMPARED,
    tasks: TASKS,
    languages: LANGUAGES = None,
    against: Annotated[
        Literal["causal"] | None, Option(help="Also score the causal decoder, with each pooling.")
    ] = None,
    base: Annotated[
        str | None,
        Option(help="Decoder of --against causal.", show_default="the base of the first model"),
    ] = None,
    results: Annotated[
        Path, Option(help="Folder of public tasks' results; tasks found there are not run again.")
    ] = Path("mteb"),
    every: Annotated[
        bool, Option("--all", help="Show every metric, not only the main one of each task.")
    ] = False,
    layers: Annotated[
        list[int] | None,
        Option(min=1, help="Also score the first LAYERS layers alone; repeat for more."),
    ] = None,
    dimensions: Annotated[
        list[int] | None,
        Option(min=1, help="Also score vectors cut to this length; repeat for more."),
    ] = None,
    json_file: options.JSON_FILE = None,
    formats: Annotated[
        bool,
        Option("--formats", callback=_formats, is_eager=True, help="Show examples of task files."),
    ] = False,
) -> None:
    """Score models on tasks with 95 % intervals, and compare the first model with the others."""
    from unmasked.cli import tables
    from unmasked.evaluate.compare import compare_encoders
    from unmasked.evaluate.scorer import make_scorer

    options.check_used("--base", base, against is not None, "--against causal")
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
        help="Output of 'unmasked encode' (folder or file); or texts, which are encoded for this "
        "search only.",
    ),
]
QUERY = Annotated[
    str | None, Argument(help="Text to search for.", show_default="read from standard input")
]
TEXTS = Annotated[
    str | None,
    Option(help="The encoded texts, to be shown; not needed if they were kept with --keep text."),
]
QUERY_PROMPT = Annotated[
    str | None, Option(help="Text put before every query.", show_default="the model's for queries")
]
STORED_DTYPE = Annotated[
    options.Dtype | None,
    Option(help="Number type of the weights.", show_default="as in encoding, or auto"),
]


def search(
    where: VECTORS,
    model: Annotated[str, Option(help="Model that encoded the texts: hub name or folder.")],
    query: QUERY = None,
    top: Annotated[int, Option(min=1, help="Number of texts to show per query.")] = 10,
    texts: TEXTS = None,
    text_column: options.COLUMN = "text",
    whole_files: options.WHOLE = False,
    chunk: options.CHUNK = None,
    overlap: options.OVERLAP = 0,
    late: options.LATE = False,
    prompt: QUERY_PROMPT = None,
    prompt_name: options.PROMPT_NAME = None,
    dtype: STORED_DTYPE = None,
    json_file: options.JSON_FILE = None,
) -> None:
    """Show the texts of an encoded corpus that are nearest to a query, by exact cosine similarity.

    Meant for inspecting vectors, not for serving users. Without a query, queries are read line by
    line from standard input, up to an empty line.
    """
    from unmasked import corpus
    from unmasked.cli import tables
    from unmasked.corpus import search as room
    from unmasked.files.source import Source

    stored = room.open_vectors(where) if room.are_vectors(Path(where)) else None
    chunks = options.divided(chunk, overlap, late)
    if stored is not None and chunks is not None:
        raise DataError(f"--chunk splits texts, but {where} holds vectors. Fix: leave it out.")
    if stored is None and texts is not None:
        raise DataError(f"--texts goes with vectors, but {where} holds texts. Fix: leave it out.")
    corpus.Encoding(prompt, prompt_name, chunks=chunks).check_options()
    shown, given = None, texts if stored is not None else where
    if given is not None:
        shown = Source(options.documents(given, whole_files), text_column)
        if shown.on_disk and stored is None:
            shown.survey()
    encoded_with = stored.settings if stored is not None else {}
    dtype, quantize = dtype or encoded_with.get("dtype", "auto"), encoded_with.get("quantize")
    encoder = terminal.load_encoder(model, dtype=dtype, quantize=quantize)
    prompts = {"prompt": prompt, "prompt_name": prompt_name}
    if stored is None:
        assert shown is not None
        with terminal.Line() as line:
            line.begin("encoding")
            show = partial(line.advance, total=None)
            find = room.search_texts(encoder, shown, chunks, progress=show, **prompts)
    else:
        find = room.VectorSearch(encoder, stored, shown, **prompts)
    answers = []
    for wanted in [query] if query is not None else terminal.queries():
        (hits,) = find([wanted], top)
        tables.show_hits(hits)
        answers.append({"query": wanted, "hits": [hit._asdict() for hit in hits]})
    if json_file:
        write_text(json_file, json.dumps(answers, indent=2, ensure_ascii=False) + "\n")


def analyse(
    model: options.MODEL,
    task: Annotated[
        str | None,
        Option(
            help="Task file or folder with related texts (STS, pairs, reranking, retrieval).",
            show_default="docstrings of installed packages",
        ),
    ] = None,
    output: Annotated[Path | None, Option("-o", "--output", help="Folder for the figures.")] = None,
    json_file: options.JSON_FILE = None,
) -> None:
    """Compare a model's states with closed and open mask by layer, and its vectors' geometry."""
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
    model: Annotated[
        str | None,
        Argument(help="Hub name or folder of a model, or 'nano'.", show_default="this machine"),
    ] = None,
    load: Annotated[
        bool, Option("--load", help="Examine a hub model's weights too, not only its config.")
    ] = False,
    as_json: options.AS_JSON = False,
) -> None:
    """Examine this machine, or whether a model is really bidirectional (exit code 2 if not)."""
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
    public: Annotated[bool, Option("--public", help="Make the repository public.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="List the files and send nothing.")] = False,
) -> None:
    """Upload a saved model to the hub, private by default, in place of an earlier one there."""
    from unmasked.checkpoint import push as hub
    from unmasked.checkpoint.location import locate

    hub.check_name(repository)
    folder = Path(locate(folder).name)
    files = hub.list_files(folder)
    rows = [[name, terminal.short(size, "B")] for name, size in files]
    terminal.show_table(["file", "size"], rows)
    total = terminal.short(sum(size for _, size in files), "B")
    visibility = "public" if public else "private"
    terminal.show(f"{len(files)} files, {total}, to {repository} ({visibility})")
    if dry_run:
        terminal.show("dry run: nothing was sent")
        return
    with terminal.waiting("uploading"):
        address = hub.push(folder, repository, private=not public)
    terminal.show(f"pushed  {address}")
