"""Verbs for a whole model: convert, evaluate, analyse, doctor, serve, push."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from unmasked.cli import terminal
from unmasked.cli.failures import MISUSED
from unmasked.cli.options import DTYPE, JSON_FILE, MODEL, NEW_FOLDER, Pooling
from unmasked.errors import MissingExtraError
from unmasked.files.writing import write_text

if TYPE_CHECKING:
    from unmasked.compat.llm2vec import LLM2Vec
    from unmasked.evaluate.scorer import Scorer


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
        _trade_off(models, against, score, layers or [], dimensions or [], json_file)
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


def _trade_off(
    models: list[str],
    against: str | None,
    score: Scorer,
    layers: list[int],
    dimensions: list[int],
    json_file: Path | None,
) -> None:
    """Score every (layers, dimensions) of one encoder, and show quality beside cost."""
    if len(models) > 1 or against:
        raise typer.BadParameter(
            "--layers and --dimensions take one model apart. Give one, without --against."
        )
    from unmasked.cli import tables
    from unmasked.evaluate.compare import compare_encoders
    from unmasked.evaluate.trade_off import cut_encoders

    scored, cuts = {}, []
    with terminal.loading(f"scoring {models[0]}"):
        for cut, encoder in cut_encoders(models[0], layers, dimensions, allow_partial=True):
            scored[cut.name] = score(encoder)
            cuts.append(cut)
    rows = compare_encoders(scored)
    tables.trade_off_table(cuts, rows)
    if json_file:
        costs = {cut.name: asdict(cut) for cut in cuts}
        found = [row.as_dict() | {"cost": costs[row.encoder]} for row in rows]
        write_text(json_file, json.dumps(found, indent=2) + "\n")


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
    folder: Annotated[Path, Argument(help="Folder of a saved model: RUN/model.")],
    repository: Annotated[str, Argument(help="NAME or ORGANISATION/NAME on the hub.")],
    public: Annotated[bool, Option("--public", help="Let everybody see it.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="List the files and send nothing.")] = False,
) -> None:
    """Upload a saved model to the Hugging Face hub, private by default."""
    from unmasked.checkpoint import push as hub

    hub.check_name(repository)
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


EXTRA_OF_SERVE = ("fastapi", "prometheus_client", "starlette", "uvicorn")
SERVED = Annotated[
    list[str],
    Argument(
        metavar="MODEL",
        help="Hub name, folder, or 'nano'; NAME=MODEL says what clients call it.",
    ),
]
HOST = Annotated[str, Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")]
PORT = Annotated[int, Option(min=0, max=65535, help="Port; 0 for any that is free.")]
KEYS = Annotated[
    Path | None,
    Option(help="API keys, one a line; or set UNMASKED_API_KEYS.", show_default="no keys"),
]
INPUTS = Annotated[int, Option(min=1, help="Maximum number of texts per request.")]
BODY = Annotated[int, Option(min=1, help="Maximum size of a request in MiB.")]
TOKENS = Annotated[
    int | None, Option(min=2, help="Maximum number of tokens per text.", show_default="the model's")
]
CUT = Annotated[
    bool, Option("--truncate", help="Cut texts that are too long where a request does not say.")
]
QUEUE = Annotated[
    int, Option(min=1, help="Texts that may wait; beyond, requests are refused (429).")
]
TIMEOUT = Annotated[float, Option(min=0.1, help="Seconds until a request is given up.")]
WAIT = Annotated[float, Option(min=0, help="Milliseconds that a text may wait for others.")]
BATCH = Annotated[
    int | None,
    Option(min=1, help="Maximum number of tokens per forward.", show_default="by device"),
]
EIGHT_BITS = Annotated[
    Literal["int8", "fp8"] | None,
    Option(help="8-bit weights (int8 on a CPU, fp8 on a GPU): faster and less exact."),
]


def serve(
    models: SERVED,
    host: HOST = "127.0.0.1",
    port: PORT = 8000,
    api_key_file: KEYS = None,
    max_inputs: INPUTS = 2048,
    max_body: BODY = 8,
    max_tokens: TOKENS = None,
    truncate: CUT = False,
    max_queue: QUEUE = 4096,
    timeout: TIMEOUT = 60.0,
    wait_ms: WAIT = 2.0,
    batch_tokens: BATCH = None,
    dtype: DTYPE = "auto",
    quantize: EIGHT_BITS = None,
) -> None:
    """Answer OpenAI's /v1/embeddings and TEI's /embed over HTTP, until SIGTERM or Ctrl-C."""
    with terminal.waiting("starting"):
        try:
            from unmasked import serve as server
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in EXTRA_OF_SERVE:
                raise
            raise MissingExtraError(str(error.name), "serve") from error
    names, keys = server.model_names(models), server.read_keys(api_key_file)
    limits = server.Limits(
        max_body << 20,
        max_inputs,
        max_tokens,
        truncate,
        max_queue,
        timeout,
        wait_ms / 1000,
        batch_tokens,
    )
    with server.bind(host, port) as taken:
        encoders = {name: _load(model, dtype, quantize) for name, model in names.items()}
        if host not in ("127.0.0.1", "::1", "localhost") and not keys:
            terminal.say(f"anyone who reaches {host} can use this server: it has no API keys")
        with server.Service(encoders, limits) as service:
            said = ", ".join(names)
            server.run_server(
                service, keys, taken, lambda url: terminal.show(f"{said} at {url}/v1 (page: /docs)")
            )
    terminal.say("stopped; every request that was accepted has its answer")


def _load(name: str, dtype: str, quantize: str | None) -> LLM2Vec:
    with terminal.loading(f"loading {name}"):
        from unmasked.compat.llm2vec import LLM2Vec

        return LLM2Vec.from_pretrained(name, dtype=dtype, quantize=quantize)
