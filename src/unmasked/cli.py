"""The commands: one function a verb, the work in the modules.

Nothing heavy is imported before it is needed: ``unmasked --help`` answers without torch. Results go
to stdout, progress to stderr. Exit codes: 0 done; 2 the user can mend it (the message says how, and
``--debug`` shows where); 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from unmasked import __version__
from unmasked.errors import OutputError, RecipeError, unknown
from unmasked.failures import MISUSED, Verbs

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn any decoder-only language model into a text encoder.",
    epilog="Begin with: unmasked demo",
)
recipes_app = typer.Typer(no_args_is_help=True, help="The recipes that come with the package.")
app.add_typer(recipes_app, name="recipes")


class Pooling(str, Enum):
    """From token states to one vector."""

    mean = "mean"
    weighted_mean = "weighted_mean"
    last_token = "last_token"
    eos_token = "eos_token"
    bos_token = "bos_token"


class Dtype(str, Enum):
    """Precision of the weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Stage(str, Enum):
    """The stages that can be trained alone."""

    mntp = "mntp"
    simcse = "simcse"


class Rival(str, Enum):
    """What a model can be compared with."""

    causal = "causal"


MODEL = Annotated[str, typer.Argument(help="Hub name, folder, or 'nano', the bundled decoder.")]
DTYPE = Annotated[Dtype, typer.Option(help="auto: bfloat16 on a GPU that has it, else float32.")]
OVERRIDES = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings to change: mntp.steps=500."),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unmasked {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every verb; `Verbs` reads ``debug``."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder.")] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Few steps: shows the way, not the gain.")
    ] = False,
) -> None:
    """Everything, on the bundled decoder and this machine's own documentation, in minutes."""
    from unmasked import running, terminal, views

    with terminal.waiting("loading the libraries"):
        from unmasked.demo import METRICS, run_demo

        terminal.quiet_libraries()
    with terminal.Line() as line:
        searches = run_demo(output, quick=quick, listener=running.listener(line))
    views.stage_table(output, metrics=METRICS)
    views.show_searches(searches)
    running.close(output / "model")


@app.command()
def convert(
    model: MODEL,
    output: Annotated[Path, typer.Option("-o", "--output", help="New folder.")],
    peft: Annotated[
        list[str] | None, typer.Option(help="Adapter to merge; repeat for more, in order.")
    ] = None,
    pooling: Annotated[
        Pooling | None, typer.Option(help="By default what the folder says, else mean.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Longest input, in tokens.", show_default="512")
    ] = None,
    dtype: DTYPE = Dtype.auto,
    attention: Annotated[
        str | None, typer.Option(help="sdpa, eager, ...; transformers chooses by default.")
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Accept layers that stay causal (hybrids).")
    ] = False,
) -> None:
    """Take the causal mask off, prove it, save an encoder; no training.

    Stock sentence-transformers loads the folder to the same vectors.
    """
    from unmasked import running, terminal

    _check_new(output)
    with terminal.waiting(f"loading {model}"):
        from unmasked.model import LLM2Vec

        terminal.quiet_libraries()
        encoder = LLM2Vec.from_pretrained(
            model,
            list(peft or []),
            pooling_mode=pooling.value if pooling else None,
            max_length=max_length,
            dtype=dtype.value,
            attn_implementation=attention,
            allow_partial=allow_partial,
        )
    terminal.show(encoder.report.summary())
    with terminal.waiting("saving"):
        encoder.save(output)
    running.close(output)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a shipped recipe.")],
    overrides: OVERRIDES = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Run folder.", show_default="runs/NAME"),
    ] = None,
) -> None:
    """All stages of a recipe, scored before and after each. The same command continues."""
    from unmasked.config import load_recipe
    from unmasked.running import run_recipe

    resolved = load_recipe(recipe, overrides or [])
    run_recipe(resolved, output or Path("runs") / resolved.name)


@app.command()
def train(
    stage: Annotated[Stage, typer.Argument()],
    base: Annotated[str, typer.Option(help="Model to start from: hub name, folder or adapter.")],
    data: Annotated[list[str], typer.Option(help="File of texts; repeat for more.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder.")],
    overrides: OVERRIDES = None,
) -> None:
    """One stage: mntp on a decoder, simcse on any model or on the adapter mntp left."""
    from unmasked.running import run_recipe, stage_recipe

    run_recipe(stage_recipe(stage.value, base, data, output, overrides or []), output)


@app.command()
def encode(
    model: MODEL,
    texts: Annotated[
        str,
        typer.Argument(metavar="INPUT", help=".txt, .jsonl or .csv, perhaps .gz; - is stdin."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help=".npy or .parquet file.")],
    text_column: Annotated[str, typer.Option(help="Where .jsonl and .csv hold the text.")] = "text",
    prompt: Annotated[str | None, typer.Option(help="Text put before every input.")] = None,
    prompt_name: Annotated[str | None, typer.Option(help="Prompt of the model, by name.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most texts a forward.", show_default="by tokens")
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Vectors of length 1.")] = False,
    truncate_dim: Annotated[
        int | None, typer.Option(min=1, help="Keep the first numbers of each vector.")
    ] = None,
    dtype: DTYPE = Dtype.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Texts of any number to a file of vectors, row for row."""
    from unmasked import terminal
    from unmasked.corpus import Encoding, check_output, encode_corpus
    from unmasked.source import Source

    check_output(output, overwrite)
    source = Source(texts, text_column)
    with terminal.waiting(f"checking {source.name}"):
        total = source.count() if source.again else None
    with terminal.waiting(f"loading {model}"):
        from unmasked.model import LLM2Vec

        terminal.quiet_libraries()
        encoder = LLM2Vec.from_pretrained(model, dtype=dtype.value)
    with terminal.Line() as line:
        rows, width = encode_corpus(
            encoder,
            source,
            output,
            Encoding(prompt, prompt_name, batch_size, normalize, truncate_dim),
            overwrite=overwrite,
            progress=line.counter("encoding", "texts", total),
        )
    terminal.show(f"{rows:,} vectors of {width} numbers in {output}")


@app.command()
def evaluate(
    model: MODEL,
    tasks: Annotated[
        list[str], typer.Option(help="A .tsv of scored pairs or a BEIR folder; repeat for more.")
    ],
    against: Annotated[
        Rival | None, typer.Option(help="Also score the causal decoder, with each pooling.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The causal decoder.", show_default="the model's own base")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the table there.")
    ] = None,
) -> None:
    """Scores on local tasks, each with its 95 % interval."""
    from unmasked import terminal, views
    from unmasked.evaluate.compare import compare_encoders, make_scorer

    score = make_scorer(tasks)
    with terminal.waiting("loading the libraries"):
        from unmasked.evaluate.baselines import causal_baselines, find_base
        from unmasked.model import LLM2Vec

        terminal.quiet_libraries()
    baselines = {}
    for name, make in causal_baselines(base or find_base(model)) if against else ():
        with terminal.waiting(f"scoring {name}"):
            baselines[name] = score(make())
    with terminal.waiting(f"scoring {model}"):
        ours = score(LLM2Vec.from_pretrained(model, allow_partial=True))
    rows = compare_encoders({model: ours, **baselines})
    views.score_table(rows)
    if json_file:
        json_file.write_text(json.dumps([row.as_dict() for row in rows], indent=2) + "\n")


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="A model to look at, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """This machine, or a model: is it really bidirectional? Exit code 2 if not."""
    from unmasked import doctor, terminal

    with terminal.waiting(f"examining {model or 'this machine'}"):
        if model:
            terminal.quiet_libraries()
        found = doctor.examine(model) if model else doctor.environment()
    if as_json:
        terminal.show(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        terminal.facts(doctor.lines(found))
    if not found.get("bidirectional", True):
        raise typer.Exit(MISUSED)


@recipes_app.command("list")
def recipes_list() -> None:
    """Names and base models."""
    from unmasked import terminal
    from unmasked.config import load_recipe, shipped_recipes

    recipes = {name: load_recipe(name) for name in shipped_recipes()}
    terminal.facts([(name, recipe.model.base) for name, recipe in recipes.items()])


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument()]) -> None:
    """The recipe, as it is written."""
    typer.echo(_shipped(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument()],
    to: Annotated[Path | None, typer.Argument(help="New file.", show_default="NAME.yaml")] = None,
) -> None:
    """A copy to change and run."""
    from unmasked import terminal

    source, target = _shipped(name), to or Path(f"{name}.yaml")
    if target.exists():
        raise OutputError(f"{target} exists. Fix: another name.")
    target.write_bytes(source.read_bytes())
    terminal.closing(target, ["unmasked", "run", f"./{target}"])


def _shipped(name: str) -> Path:
    from unmasked.config import shipped_recipes

    recipes = shipped_recipes()
    if name not in recipes:
        raise RecipeError(unknown("recipe", name, recipes))
    return recipes[name]


def _check_new(folder: Path) -> None:
    """Refuse to write into a folder that has something in it, before any work is done."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file. Fix: name a new folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"{folder} exists and is not empty. Fix: name a new folder.")


def main() -> None:
    """The ``unmasked`` command."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars would cut through our line
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = ["--debug"] if len(arguments) < len(sys.argv[1:]) else []  # also behind the verb
    app([*debug, *arguments])
