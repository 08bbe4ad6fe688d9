"""What a run shows: its settings, then progress and scores, then the table and the next command.

`train.run.Run` does the training; the functions here pass it a listener and a scorer.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from unmasked.cli import tables, terminal
from unmasked.cli.failures import INTERRUPTED
from unmasked.evaluate.compare import COMMAND, MACHINE, headlines
from unmasked.evaluate.scorer import RESULTS, make_scorer
from unmasked.evaluate.tasks.tested import is_local, texts_of_task
from unmasked.files.writing import write_text
from unmasked.recipe.schema import BEFORE, BIDIRECTIONAL, CAUSAL, Recipe

if TYPE_CHECKING:
    from unmasked.recipe.anchors import Anchor
    from unmasked.train.callback import Listener
    from unmasked.train.run import Run


def run_recipe(recipe: Recipe, path: Path, anchor: Anchor | None = None) -> None:
    """Run or continue a recipe in a folder, and show settings, progress, table and next command.

    Arguments and errors are those of `train.run.Run`; the tasks of an anchor replace the recipe's.
    """
    tasks = anchor.tasks if anchor else recipe.evaluate.tasks
    score = make_scorer(tasks, results=path / RESULTS) if tasks else None
    with terminal.loading("loading the libraries"):
        from unmasked.train.checking.leaks import Leaks
        from unmasked.train.run import Run
    leaks = Leaks({task: texts_of_task(task) for task in tasks if is_local(task)})
    with terminal.Line() as line:
        scoring = _showing_proof(score, line) if score else None
        work = Run(recipe, path, scoring, listener(line), anchor, leaks)
        terminal.facts(_header(work, tasks), stderr=True)
        finished = _is_finished(work)
        with saying_what_is_kept(lambda: work):
            encoder = work.run()
    keep_command(path)
    terminal.show(encoder.report.summary())
    if anchor:
        tables.published_table(path, recipe, anchor)
    else:
        tables.stage_table(path, recipe.evaluate.bootstrap)
    if finished:
        terminal.show("nothing to do: every stage of this recipe is done")
    terminal.closing(path / "model", done=finished)


@contextmanager
def saying_what_is_kept(run: Callable[[], Run]) -> Iterator[None]:
    """On Ctrl-C in the block, say what the folder of a run holds and how to continue, and exit."""
    try:
        yield
    except KeyboardInterrupt:
        work = run()
        kept = _kept(work)
        what = f"saved: {', '.join(kept)}" if kept else "no step is saved yet"
        how = "continue" if kept else "begin anew"
        terminal.say(f"interrupted: {work.path}: {what}; run the same command to {how}")
        raise typer.Exit(INTERRUPTED) from None


def _kept(work: Run) -> list[str]:
    """What the next start can reuse from the folder of a run, in words; empty if nothing."""
    from unmasked.train.checkpoints import last_checkpoint
    from unmasked.train.fitting import is_done

    kept = []
    for name, stage in work.recipe.stages():
        if is_done(work.path / name):
            kept.append(f"{name} done")
        elif (checkpoint := last_checkpoint(work.path / name)) is not None:
            kept.append(f"{name} at step {checkpoint.step:,} of {stage.steps:,}")
    scores = len(work.results())
    return [*kept, f"{scores} encoders scored"] if scores else kept


def _is_finished(work: Run) -> bool:
    """Whether nothing is left to do: every stage is trained and scored, and the result is saved."""
    from unmasked.train.fitting import is_done

    stages = [name for name, _ in work.recipe.stages()]
    scored = {stage["name"] for stage in work.results()}
    if work.score is None:
        all_scored = True
    elif work.only is not None:  # the stages for which there are published figures
        all_scored = scored >= work.only
    else:
        all_scored = bool(scored & {BIDIRECTIONAL, BEFORE}) and scored.issuperset(stages)
    all_trained = all(is_done(work.path / name) for name in stages)
    return all_trained and all_scored and (work.path / "model" / "config.json").is_file()


def keep_command(run: Path) -> None:
    """Write the command that first finished a run, and its machine, into its folder."""
    from unmasked.train.devices import is_first

    if is_first() and not (run / COMMAND).exists():
        from unmasked.doctor import environment, lines

        command = f"{shlex.join(['unmasked', *sys.argv[1:]])}\n"
        machine = (f"{name}  {value}\n" for name, value in lines(environment()))
        write_text(run / MACHINE, "".join(machine))
        write_text(run / COMMAND, command)


def listener(line: terminal.Line) -> Listener:
    """A listener for `train.run.Run` that shows everything on a progress line."""
    from unmasked.train.callback import Listener

    known: dict[str, float] = {}  # the newest value of each measurement of the stage

    def stage(name: str) -> None:
        known.clear()
        line.begin(name)

    def step(step: int, steps: int, measured: dict[str, float]) -> None:
        known.update(measured)
        if "train_runtime" in measured:
            return  # the trainer's summary, whose loss is a mean over the whole stage
        if "eval_token_loss" in known:  # exact, while eval_loss is a mean of batch means
            known.pop("eval_loss", None)
        texts = {
            "loss": "loss {:.4f}",
            "eval_loss": "held-out {:.4f}",
            "eval_token_loss": "held-out {:.4f}",
            "tokens_per_second": "{:,.0f} tokens/s",
        }
        notes = [text.format(known[key]) for key, text in texts.items() if key in known]
        line.advance(step, steps, *notes)

    def scored(stage: str, scores: dict[str, float]) -> None:
        told = [f"{metric} {100 * scores[metric]:.2f}" for metric in headlines(scores)]
        line.note(f"{stage}: {', '.join(told)}")

    return Listener(stage, step, scored)


def _showing_proof(score: Callable[[Any], Any], line: terminal.Line) -> Callable[[Any], Any]:
    """A scorer that also shows the proof of the first encoder whose mask is open."""
    shown = False

    def scored(encoder: Any) -> Any:
        nonlocal shown
        if not shown and encoder.report.verdict != "impossible":
            line.note(encoder.report.summary())
            shown = True
        return score(encoder)

    return scored


def _header(work: Run, tasks: Sequence[str]) -> list[tuple[str, str]]:
    recipe = work.recipe
    dtype = str(work.dtype).removeprefix("torch.")
    if recipe.model.dtype == "auto":
        dtype += " (auto: bfloat16 if the GPU supports it, else float32)"
    stages = [
        f"{name} {stage.steps:,} steps of {stage.batch_size * stage.gradient_accumulation}"
        for name, stage in recipe.stages()
    ]
    rows = [
        ("base", recipe.model.base),
        ("device", work.device.type),
        ("dtype", dtype),
        ("attention", recipe.model.attention or "chosen by transformers"),
        ("stages", ", ".join(stages) or "none: converted only"),
        ("tasks", ", ".join(tasks) or "none: nothing is scored"),
        ("output", str(work.path)),
    ]
    done = [s["name"] for s in work.results() if not s["name"].startswith(CAUSAL)]
    return [*rows, ("scored", ", ".join(done))] if done else rows
