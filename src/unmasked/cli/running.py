"""What ``run`` and ``train`` have in common at the terminal: facts first, progress, then the table.

Training itself is `train.stages.Run`; its listener and its scores are put in here.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmasked.cli import terminal, views
from unmasked.errors import MissingExtraError
from unmasked.evaluate.compare import CAUSAL, COMMAND, headlines
from unmasked.evaluate.scorer import RESULTS, make_scorer
from unmasked.recipe.files import make_recipe
from unmasked.recipe.schema import Recipe

if TYPE_CHECKING:
    from unmasked.train.run import Listener, Run


def stage_recipe(
    stage: str, base: str, data: Sequence[str], output: Path, overrides: Sequence[str]
) -> Recipe:
    """A recipe of one stage, everything else at its default.

    Raises:
        RecipeError: an override has an unknown key or a value that cannot be used.
    """
    name = re.sub(r"[^\w.-]", "-", output.resolve().name).lstrip("-.") or stage
    start = {"name": name, "model": {"base": base}, stage: {"data": list(data)}}
    return make_recipe(start, overrides)


def run_recipe(recipe: Recipe, path: Path) -> None:
    """Run, or continue, a recipe in a folder, and show it: facts, progress, table, next command.

    Raises:
        UnmaskedError: see `train.stages.Run`.
    """
    tasks = recipe.evaluate.tasks
    score = make_scorer(tasks, results=path / RESULTS) if tasks else None
    with terminal.waiting("loading the libraries"):
        from unmasked.train.run import Run

        terminal.quiet_libraries()
    with terminal.Line() as line:
        work = Run(recipe, path, score and _with_proof(score, line), listener(line))
        terminal.facts(_header(work), stderr=True)
        encoder = work.run()
    keep_command(path)
    terminal.show(encoder.report.summary())
    views.stage_table(path, recipe.evaluate.bootstrap)
    close(path / "model")


def keep_command(run: Path) -> None:
    """Leave the command that first ended a run in its folder, for its report."""
    command = f"{shlex.join(['unmasked', *sys.argv[1:]])}\n"
    if not (run / COMMAND).exists():
        (run / COMMAND).write_text(command, encoding="utf-8")


def write_report(run: Path, output: Path | None = None) -> Path:
    """The report of a run, with this machine's environment in it."""
    from unmasked.doctor import environment, lines
    from unmasked.evaluate.report.page import write_report as write

    return write(run, output, lines(environment()))


def finish_demo(run: Path) -> None:
    """The demo's report, or what is missing to draw it, and the next command."""
    keep_command(run)
    try:
        with terminal.waiting("drawing the report"):
            terminal.show(f"report {write_report(run)}")
    except MissingExtraError as error:
        terminal.say(f"no report: {error}")
    close(run / "model")


def close(model: Path) -> None:
    """Where an encoder was saved, and a command that uses it."""
    following = ["unmasked", "encode", str(model), "texts.txt", "-o", "vectors.npy"]
    terminal.closing(model, following)


class _RunView:
    """Shows what a `train.stages.Listener` is told; its methods are the listener's parts."""

    def __init__(self, line: terminal.Line) -> None:
        self._line = line
        self._known: dict[str, float] = {}

    def stage(self, name: str) -> None:
        self._known = {}
        self._line.begin(name)

    def step(self, step: int, steps: int, measured: dict[str, float]) -> None:
        self._known |= measured
        if "train_runtime" in measured:
            return  # the trainer's last word, whose loss is a mean over the whole stage
        if "eval_token_loss" in self._known:
            self._known.pop("eval_loss", None)  # a mean of batch means
        texts = {
            "loss": "loss {:.4f}",
            "eval_loss": "held-out {:.4f}",
            "eval_token_loss": "held-out {:.4f}",
            "tokens_per_second": "{:,.0f} tokens/s",
        }
        notes = [text.format(self._known[k]) for k, text in texts.items() if k in self._known]
        self._line.advance(step, steps, *notes)

    def scored(self, stage: str, scores: dict[str, float]) -> None:
        told = [f"{metric} {100 * scores[metric]:.2f}" for metric in headlines(scores)]
        self._line.note(f"{stage}: {', '.join(told)}")


def listener(line: terminal.Line) -> Listener:
    """A listener for `train.stages.Run` that shows everything on a progress line."""
    from unmasked.train.run import Listener

    view = _RunView(line)
    return Listener(view.stage, view.step, view.scored)


def _with_proof(score: Callable[[Any], Any], line: terminal.Line) -> Callable[[Any], Any]:
    """Tells the proof of the first encoder without its causal mask."""
    told = False

    def scored(encoder: Any) -> Any:
        nonlocal told
        if not told and encoder.report.verdict != "impossible":
            told = True
            line.note(encoder.report.summary())
        return score(encoder)

    return scored


def _header(work: Run) -> list[tuple[str, str]]:
    recipe = work.recipe
    dtype = str(work.dtype).removeprefix("torch.")
    auto = recipe.model.dtype == "auto"
    stages = [
        f"{name} {stage.steps:,} steps of {stage.batch_size * stage.gradient_accumulation}"
        for name, stage in recipe.stages()
    ]
    done = [s["name"] for s in work.results() if not s["name"].startswith(CAUSAL)]
    rows = [
        ("base", recipe.model.base),
        ("device", work.device.type),
        (
            "dtype",
            f"{dtype} (auto: bfloat16 on a GPU that has it, float32 on CPU)" if auto else dtype,
        ),
        ("attention", recipe.model.attention or "as transformers chooses"),
        ("stages", ", ".join(stages) or "none: converted only"),
        ("tasks", ", ".join(recipe.evaluate.tasks) or "none: nothing is scored"),
        ("output", str(work.path)),
    ]
    return [*rows, ("scored", ", ".join(done))] if done else rows
