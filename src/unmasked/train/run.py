"""The recipe, stage by stage: baselines, MNTP, SimCSE, supervised, each scored; the result saved.

Everything lives in a run folder, and the same command continues it: a stage that has its adapter is
not trained again, a score that is written is not computed again, a stage that was cut off resumes
from its last checkpoint.

    recipe.yaml      as resolved         results.json     scores of every stage
    mntp/ simcse/ supervised/            adapter, checkpoints, metrics.jsonl, TensorBoard events
    scores/          per-item scores, for intervals        model/    the merged encoder
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from sentence_transformers.util import get_device_name
from transformers import set_seed

from unmasked.checkpoint.card import Card, versions
from unmasked.compat.llm2vec import LLM2Vec
from unmasked.errors import OutputError
from unmasked.files.writing import aside_of, write_text
from unmasked.forward import precision
from unmasked.forward.pooling import CAUSAL_BASELINES
from unmasked.recipe.files import load_recipe, recipe_differences, recipe_text
from unmasked.recipe.schema import Pairs, Recipe
from unmasked.train import devices
from unmasked.train.callback import OnLog
from unmasked.train.checkpoints import last_checkpoint
from unmasked.train.data.mixing import prompts_of
from unmasked.train.fitting import StageSetup, clear, fit, is_done
from unmasked.train.losses.mntp import TOKENS
from unmasked.train.preflight import check_inputs, check_settings
from unmasked.train.trackers import require_trackers

RECIPE = "recipe.yaml"
LOCK = ".lock"
"""Held while a run is at work; it ends with the process."""
MAY_BE_THERE = {"data", aside_of(Path(RECIPE)).name, TOKENS, LOCK}
"""In a folder without a recipe: given, or left by a run that was killed early."""
STAGES = ("mntp", "simcse", "supervised")


class Scored(Protocol):
    """What a task says of an encoder: `evaluate.tasks.TaskResult` is one."""

    @property
    def name(self) -> str: ...
    @property
    def scores(self) -> dict[str, float]: ...
    @property
    def items(self) -> dict[str, np.ndarray]: ...


Score = Callable[[LLM2Vec], Sequence[Scored]]


@dataclass
class Listener:
    """What the caller wants to hear; every part may be left out."""

    stage: Callable[[str], None] = lambda name: None
    step: OnLog = lambda step, steps, measured: None
    scored: Callable[[str, dict[str, float]], None] = lambda stage, scores: None


class Run:
    """A recipe and the folder it runs in.

    Args:
        recipe: what to do.
        path: the run folder; made, or continued if it was made with the same recipe, or with
            another that was neither trained nor scored. Only a folder ``data`` may be there before.
        score: how an encoder is scored; none of the stages is if None.
        listener: told what happens.

    Raises:
        OutputError: the folder belongs to another recipe, or holds something else.
    """

    def __init__(
        self,
        recipe: Recipe,
        path: str | Path,
        score: Score | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.recipe = recipe
        self.path = Path(path)
        self.score = score
        self.listener = listener if listener and devices.is_first() else Listener()
        devices.join()
        self.device = torch.device(get_device_name())
        self.dtype = precision.pick(recipe.model.dtype, self.device).dtype
        require_trackers(recipe.trackers)
        self._check_folder()

    def run(self) -> LLM2Vec:
        """All stages that are not done yet; returns the finished encoder.

        Raises:
            OutputError: another run is at work in the folder.
            UnmaskedError: what `checks` refuses, or a stage could not use.
        """
        with self._locked():
            return self._run()

    def _run(self) -> LLM2Vec:
        set_seed(self.recipe.seed)
        self.listener.stage("checking texts and model")
        self._check_inputs()
        if devices.is_first():
            self._write_recipe()
        devices.wait()
        done: list[str | Path] = [self.recipe.model.base, *self.recipe.model.adapters]
        if self.score is not None:
            for mode in CAUSAL_BASELINES:
                causal = partial(self._encoder, pooling_mode=mode, enable_bidirectional=False)
                self._score(f"causal_{mode}", partial(causal, done))
            self._score("bidirectional", partial(self._encoder, done))
        for name, stage in self.recipe.stages():
            start = done.pop() if stage.lora.start == "continue" else None
            if not is_done(self.path / name):
                self.listener.stage(name)
                fit(self._job(name, done, start), stage)
            if devices.is_first():
                self._clear(name)
            done = [*([] if stage.lora.method == "full" else done), self.path / name]
            self._score(name, partial(self._encoder, done))
        encoder = self._encoder(done)
        if devices.is_first() and not (self.path / "model" / "config.json").is_file():
            self.listener.stage("saving")
            encoder.save(self.path / "model", card=self._card(encoder))
        devices.wait()
        return encoder

    def results(self) -> list[dict[str, Any]]:
        """Stages in order, each ``{"name": ..., "scores": {"TASK.METRIC": fraction}}``."""
        file = self.path / "results.json"
        if not file.is_file():
            return []
        stages: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["stages"]
        return stages

    def _check_folder(self) -> None:
        mine = self.path / RECIPE
        if mine.is_file():
            changed = recipe_differences(load_recipe(mine), self.recipe)
            if changed and self._has_begun():
                raise OutputError(
                    f"{self.path} was made with a different recipe:\n  "
                    + "\n  ".join(changed)
                    + "\nFix: the same settings to continue it, or another output folder."
                )
        elif self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file. Fix: another output folder.")
        elif self.path.exists() and {item.name for item in self.path.iterdir()} - MAY_BE_THERE:
            raise OutputError(
                f"{self.path} exists and is no run folder (it has no recipe.yaml). "
                "Fix: another output folder."
            )

    def _has_begun(self) -> bool:
        """Whether something belongs to the recipe: a score, a checkpoint, an adapter."""
        folders = [self.path / name for name in STAGES]
        trained = any(is_done(folder) or last_checkpoint(folder) for folder in folders)
        return trained or bool(self.results())

    def _check_inputs(self) -> None:
        """Prove the model and read every text of what is not done, before anything else is made."""
        check_settings(self.recipe, self.path)
        encoder = self._encoder([self.recipe.model.base, *self.recipe.model.adapters])
        if not devices.is_first():
            return
        try:
            check_inputs(self.recipe, self.path, encoder)
        except BaseException:
            if not (self.path / RECIPE).is_file():
                shutil.rmtree(self.path / TOKENS, ignore_errors=True)
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The folder for this run alone; one that is made and left empty is removed again."""
        if not devices.is_first():
            yield
            return
        made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                f"another run is at work in {self.path}. "
                "Fix: wait for it, or another output folder."
            ) from None
        try:
            yield
        finally:
            if made and {item.name for item in self.path.iterdir()} == {LOCK}:
                shutil.rmtree(self.path)
            lock.release()

    def _clear(self, name: str) -> None:
        clear(self.path / name)
        if name == "mntp":
            shutil.rmtree(self.path / TOKENS, ignore_errors=True)

    def _write_recipe(self) -> None:
        ran = ", ".join(f"{name} {number}" for name, number in versions().items())
        write_text(self.path / RECIPE, f"# {ran}\n{recipe_text(self.recipe)}")

    # Encoders

    def _encoder(self, chain: Sequence[str | Path], **overrides: Any) -> LLM2Vec:
        """A base, the recipe's or one that was trained in full, with adapters merged into it."""
        model = self.recipe.model
        base, *merged = chain
        last = self.recipe.supervised if Path(chain[-1]).name == "supervised" else None
        options: dict[str, Any] = {
            "pooling_mode": model.pooling,
            "max_length": model.max_length,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attn_implementation": model.attention,
            "allow_partial": model.allow_partial,
            "enable_bidirectional": model.bidirectional,
            "revision": model.revision if base == model.base else None,
            "prompts": prompts_of(last.data) if last else None,
            **overrides,
        }
        return LLM2Vec.from_pretrained(base, merged, **options)

    def _job(self, name: str, done: Sequence[str | Path], start: str | Path | None) -> StageSetup:
        """What a stage trains: the base with the adapters before it merged."""
        recipe, encoder, told = self.recipe, self._encoder(done), self.listener.step
        folder = self.path / name
        return StageSetup(folder, encoder, recipe.model, recipe.seed, told, start, recipe.trackers)

    def _card(self, encoder: LLM2Vec) -> Card:
        recipe = (self.path / RECIPE).read_text(encoding="utf-8")
        sections = {"Recipe": f"```yaml\n{recipe}```"}
        given = (item for _, stage in self.recipe.stages() for item in stage.data)
        data = dict.fromkeys(item.path if isinstance(item, Pairs) else item for item in given)
        base, proof = str(self.recipe.model.base), encoder.report.summary()
        return Card(base, proof, sections, list(data), self.results())

    # Scores

    def _score(self, name: str, make: Callable[[], LLM2Vec]) -> None:
        if self.score is not None and devices.is_first():
            self._score_here(self.score, name, make)
        devices.wait()

    def _score_here(self, score: Score, name: str, make: Callable[[], LLM2Vec]) -> None:
        stages = self.results()
        if any(stage["name"] == name for stage in stages):
            return
        self.listener.stage(f"scoring {name}")
        results = score(make())
        items = {f"{r.name}.{key}": value for r in results for key, value in r.items.items()}
        (self.path / "scores").mkdir(exist_ok=True)
        np.savez(self.path / "scores" / f"{name}.npz", **items)  # type: ignore[arg-type]
        scores = {f"{r.name}.{key}": float(v) for r in results for key, v in r.scores.items()}
        stages.append({"name": name, "scores": scores})
        write_text(self.path / "results.json", json.dumps({"stages": stages}, indent=2) + "\n")
        self.listener.scored(name, scores)
