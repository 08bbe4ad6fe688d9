"""Runs a recipe: baselines, MNTP, SimCSE, supervised, each scored; then saves the encoder.

Everything is kept in a run folder, and the same command continues it: finished stages and scores
are not computed again, and an interrupted stage resumes from its last checkpoint. Cost besides
training and scoring: a model is loaded and proved once before the first stage (with scores two more
times, as the causal baselines need the mask closed) and once after each stage.

    recipe.yaml      all settings        results.json     scores of every stage
    mntp/ simcse/ supervised/            adapter, checkpoints, metrics.jsonl, TensorBoard events
    scores/          per-item scores, for intervals        model/    the merged encoder
    benchmarks/NAME/ results.json and scores/ of a published benchmark
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers.util import get_device_name
from transformers import set_seed

from unmasked.checkpoint.card import Card, versions
from unmasked.checkpoint.location import Location, locate
from unmasked.compat.llm2vec import LLM2Vec
from unmasked.compat.origin import find_base, training_data
from unmasked.errors import MissingExtraError, OutputError, UnmaskedError, first_line
from unmasked.files.writing import aside_of, folder_for_one, write_text
from unmasked.forward import precision
from unmasked.forward.pooling import CAUSAL_BASELINES
from unmasked.recipe.anchors import BENCHMARKS, Anchor
from unmasked.recipe.files import load_recipe, recipe_differences, recipe_text
from unmasked.recipe.schema import (
    BEFORE,
    BIDIRECTIONAL,
    CAUSAL,
    Pairs,
    Recipe,
    Supervised,
    Training,
)
from unmasked.train import devices
from unmasked.train.blending import blend
from unmasked.train.callback import Listener
from unmasked.train.checking.leaks import Leaks
from unmasked.train.checkpoints import last_checkpoint
from unmasked.train.data.mixing import prompts_of
from unmasked.train.fitting import TEACHER, TOKENS, StageSetup, clear, is_done
from unmasked.train.preflight import check_inputs, check_settings
from unmasked.train.stages import fit

logger = logging.getLogger(__name__)

RECIPE, RESULTS = "recipe.yaml", "results.json"
MERGED = "merged"  # the folder of a stage's encoder after merge_with_base, and its name in scores
LOCK = ".lock"
"""Locked while a run is active; the lock is released when the process ends."""
MAY_BE_THERE = {"data", aside_of(Path(RECIPE)).name, TEACHER, TOKENS, LOCK}
"""Allowed in a folder without a recipe: given data, and what a run leaves if it is killed early."""
Chain = Sequence[str | Path]
"""A base model, then the adapters to merge into it, in this order."""
Scoring = Callable[[LLM2Vec], Sequence[Any]]
"""Scores an encoder on tasks; each result is an `evaluate.bootstrap.TaskResult`."""


class Run:
    """A recipe and the folder it runs in.

    Args:
        recipe: the settings of the run.
        path: the run folder: a new one, which may contain only ``data``, or one that was made with
            the same recipe, or with one of which nothing has been trained or scored yet.
        score: scores an encoder; None scores nothing.
        listener: is called as the run proceeds.
        anchor: a published benchmark: scores go to its folder, and only the stages for which there
            are published figures are scored.
        leaks: texts of the test sets; a warning names each stage whose data contains any of them.

    Raises:
        OutputError: the folder belongs to another recipe, or contains something else.
        MissingExtraError: a tracker is not installed.
    """

    def __init__(
        self,
        recipe: Recipe,
        path: str | Path,
        score: Scoring | None = None,
        listener: Listener | None = None,
        anchor: Anchor | None = None,
        leaks: Leaks | None = None,
    ) -> None:
        self.recipe = recipe
        self.path = Path(path)
        self.scored = self.path / anchor.folder if anchor else self.path
        self.only = {*anchor.of_stages([name for name, _ in recipe.stages()])} if anchor else None
        self.score, self.leaks = score, leaks
        self.listener = listener if listener and devices.is_first() else Listener()
        self._loaded: tuple[tuple[object, ...], LLM2Vec] | None = None
        devices.join()
        self.device = torch.device(get_device_name())
        self.dtype = precision.pick(recipe.model.dtype, self.device).dtype
        for tracker in recipe.trackers:
            if find_spec(tracker) is None:
                raise MissingExtraError(tracker, tracker)
        self._check_folder()

    def run(self) -> LLM2Vec:
        """Do everything that is not done yet; returns the finished encoder.

        Raises:
            OutputError: another run is active in the folder, or a checkpoint cannot be written.
            UnmaskedError: `preflight` found a fault, or a stage cannot use its data or settings.
            KeyboardInterrupt: after Ctrl-C, once the checkpoint is saved.
        """
        alone = folder_for_one(self.path, LOCK) if devices.is_first() else nullcontext()
        with alone:
            return self._run()

    def _run(self) -> LLM2Vec:
        set_seed(self.recipe.seed)
        self.listener.stage("checking texts and model")
        chain: list[str | Path] = [self.recipe.model.base, *self.recipe.model.adapters]
        self._check_inputs(chain)
        if devices.is_first():
            self._write_recipe()
        devices.wait()
        self._score_baselines(chain)
        stage: Training | None = None
        for name, stage in self.recipe.stages():
            before = list(chain)
            # The adapter that this stage continues to train is not merged into its base.
            start = chain.pop() if stage.lora.start == "continue" else None
            if not is_done(self.path / name):
                self.listener.stage(name)
                fit(self._setup(name, chain, start), stage)
            if devices.is_first():
                self._clear(name)
            # A stage that trains all weights saves a whole encoder: it is the base from now on.
            chain = [*([] if stage.lora.method == "full" else chain), self.path / name]
            self._score(name, partial(self._encoder, chain, stage))
            if isinstance(stage, Supervised) and stage.merge_with_base:
                self._merge(before, chain, stage)
                chain = [self.path / MERGED]
                self._score(MERGED, partial(self._encoder, chain, stage))
        encoder = self._encoder(chain, stage)
        if devices.is_first() and not (self.path / "model" / "config.json").is_file():
            self.listener.stage("saving")
            encoder.save(self.path / "model", card=self._card(encoder))
        devices.wait()
        return encoder

    def results(self) -> list[dict[str, Any]]:
        """Scored baselines and stages, each ``{"name": ..., "scores": {"TASK.METRIC": ...}}``."""
        file = self.scored / RESULTS
        if not file.is_file():
            return []
        stages: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["stages"]
        return stages

    def _check_folder(self) -> None:
        written = self.path / RECIPE
        if written.is_file():
            changed = recipe_differences(load_recipe(written), self.recipe)
            if changed and self._has_begun():
                raise OutputError(
                    f"{self.path} was made with a different recipe:\n  "
                    + "\n  ".join(changed)
                    + "\nFix: use the same settings to continue, or choose another output folder."
                )
        elif self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file. Fix: choose another output folder.")
        elif self.path.exists() and {item.name for item in self.path.iterdir()} - MAY_BE_THERE:
            raise OutputError(
                f"{self.path} exists and is not a run folder (it has no recipe.yaml). "
                "Fix: choose another output folder."
            )

    def _has_begun(self) -> bool:
        """Whether the folder has a result of its recipe: a score, a checkpoint or an adapter."""
        folders = [self.path / name for name in ("mntp", "simcse", "supervised")]
        trained = any(is_done(folder) or last_checkpoint(folder) for folder in folders)
        scores = [self.path / RESULTS, *self.path.glob(f"{BENCHMARKS}/*/{RESULTS}")]
        return trained or any(file.is_file() for file in scores)

    def _check_inputs(self, chain: Chain) -> None:
        """Prove the model and read all data of the unfinished stages, before training starts."""
        check_settings(self.recipe, self.path)
        encoder = self._encoder(chain)
        if not devices.is_first():
            return
        try:
            check_inputs(self.recipe, self.path, encoder, self.listener.stage, self.leaks)
        except BaseException as error:
            if not (self.path / RECIPE).is_file():
                # After Ctrl-C the teacher's vectors are kept: they may have taken hours.
                interrupted = isinstance(error, KeyboardInterrupt)
                for folder in (TOKENS,) if interrupted else (TOKENS, TEACHER):
                    shutil.rmtree(self.path / folder, ignore_errors=True)
            raise

    def _clear(self, name: str) -> None:
        """Remove the files that only an unfinished stage needs."""
        clear(self.path / name)
        if folder := {"mntp": TOKENS, "supervised": TEACHER}.get(name):
            shutil.rmtree(self.path / folder, ignore_errors=True)

    def _write_recipe(self) -> None:
        ran = ", ".join(f"{name} {number}" for name, number in versions().items())
        write_text(self.path / RECIPE, f"# {ran}\n{recipe_text(self.recipe)}")

    # Encoders

    def _encoder(self, chain: Chain, last: Training | None = None) -> LLM2Vec:
        """The base with adapters merged into it.

        Args:
            chain: the base (the recipe's, or an encoder of which all weights were trained), then
                the adapters.
            last: the stage that trained the last of them; the encoder gets its prompts.
        """
        model, (base, *adapters), folder = self.recipe.model, chain, self.path / "supervised"
        return self._load(
            tuple(map(str, chain)),
            base,
            adapters,
            enable_bidirectional=model.bidirectional,
            pooling_mode=model.pooling,
            allow_partial=model.allow_partial,
            prompts=prompts_of(last.data, folder) if isinstance(last, Supervised) else None,
            revision=model.revision if base == model.base else None,
            layers=model.layers if base == model.base else None,
        )

    def _merge(self, before: Chain, after: Chain, stage: Supervised) -> None:
        """Merge the encoder before a stage into the one after it, unless that has been done."""
        if devices.is_first() and not (self.path / MERGED / "config.json").is_file():
            self.listener.stage("merging with the base")
            share, encoder = stage.merge_with_base, self._encoder(after, stage)
            others = [("the encoder before supervised", partial(self._encoder, before))]
            partly = self.recipe.model.allow_partial or not self.recipe.model.bidirectional
            blend(encoder, others, [1 - share, share], allow_partial=partly)
            self._loaded = None  # it has been changed in place
            encoder.save(self.path / MERGED, card=self._card(encoder))
        devices.wait()

    def _causal_baseline(self, decoder: Location, pooling: str) -> LLM2Vec:
        """The untouched decoder with a pooling mode; it is loaded once for all of them."""
        first = CAUSAL_BASELINES[0]
        options: dict[str, Any] = {"enable_bidirectional": False, "pooling_mode": first}
        encoder = self._load((CAUSAL, decoder.name), decoder.name, [], **options, **decoder.hub)
        width = encoder.backbone.get_embedding_dimension()
        encoder[1] = type(encoder[1])(width, pooling, encoder.settings.skip_instruction)
        return encoder

    def _load(
        self, key: tuple[object, ...], base: str | Path, adapters: Chain, **options: Any
    ) -> LLM2Vec:
        """Load an encoder as the recipe says, unless the one loaded last has the same key."""
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # freed before the next one is loaded: two may not fit in memory
            model = self.recipe.model
            options |= {"max_length": model.max_length, "attn_implementation": model.attention}
            options["compile"] = model.compile
            if model.include_instruction is not None:
                options["skip_instruction"] = not model.include_instruction
            encoder = LLM2Vec.from_pretrained(base, list(adapters), dtype=self.dtype, **options)
            self._loaded = key, encoder
        return self._loaded[1]

    def _setup(self, name: str, chain: Chain, start: str | Path | None) -> StageSetup:
        """What a stage starts from: the base with the adapters of earlier stages merged into it."""
        encoder, self._loaded = self._encoder(chain), None  # it is trained in place
        return StageSetup(self.path / name, encoder, self.recipe, self.listener.step, start)

    def _card(self, encoder: LLM2Vec) -> Card:
        recipe = (self.path / RECIPE).read_text(encoding="utf-8")
        sections = {"Recipe": f"```yaml\n{recipe}```"}
        data = (item for _, stage in self.recipe.stages() for item in stage.data)
        of_base = training_data(self.recipe.model.base, self.recipe.model.revision)
        own = (item.path if isinstance(item, Pairs) else item for item in data)
        names = dict.fromkeys([*of_base, *own])  # each once, in order
        base, proof = str(self.recipe.model.base), encoder.report.summary()
        return Card(base, proof, sections, list(names), self.results())

    # Scores

    def _score_baselines(self, chain: Chain) -> None:
        """Score what the stages are compared with: the causal decoder, and the untrained encoder.

        The base may have an open mask already, as the encoder of another run has: then the decoder
        that it was made from is the causal baseline, and without that decoder there is none.
        """
        scored = {stage["name"] for stage in self.results()}
        stages = {name for name, _ in self.recipe.stages()}
        done = scored | stages >= self.only if self.only else scored & {BIDIRECTIONAL, BEFORE}
        if self.score is not None and devices.is_first() and not done:
            model = self.recipe.model
            decoder = find_base(model.base, model.revision)
            is_base = decoder.name == locate(model.base).name
            causal = self._is_causal(decoder, is_base)
            for mode in CAUSAL_BASELINES if causal else ():
                self._add_score(f"{CAUSAL}{mode}", partial(self._causal_baseline, decoder, mode))
            plain = causal and is_base and model.bidirectional and not model.adapters
            self._add_score(BIDIRECTIONAL if plain else BEFORE, partial(self._encoder, chain))
        devices.wait()

    def _is_causal(self, decoder: Location, is_base: bool) -> bool:
        """Whether a decoder can be loaded and the proof finds its mask closed."""
        try:
            report = self._causal_baseline(decoder, CAUSAL_BASELINES[0]).report
            return report.verdict == "impossible"
        except UnmaskedError as error:
            if is_base:
                raise
            logger.warning(
                "no causal baseline: %s comes from the decoder %s, which cannot be loaded (%s)",
                self.recipe.model.base, decoder.name, first_line(error),
            )  # fmt: skip
            return False

    def _score(self, name: str, load: Callable[[], LLM2Vec]) -> None:
        """Score an encoder on the first process, while the others wait."""
        if self.score is not None and devices.is_first():
            self._add_score(name, load)
        devices.wait()

    def _add_score(self, name: str, load: Callable[[], LLM2Vec]) -> None:
        """Load an encoder and write its scores, unless they are there or not wanted."""
        stages = self.results()
        unwanted = self.only is not None and name not in self.only
        if self.score is None or unwanted or any(stage["name"] == name for stage in stages):
            return
        self.listener.stage(f"scoring {name}")
        results = self.score(load())
        items = {f"{r.name}.{key}": v for r in results for key, v in r.items.items()}
        (self.scored / "scores").mkdir(parents=True, exist_ok=True)
        np.savez(self.scored / "scores" / f"{name}.npz", **items)
        scores = {f"{r.name}.{k}": float(v) for r in results for k, v in r.scores.items()}
        stages.append({"name": name, "scores": scores})
        write_text(self.scored / RESULTS, json.dumps({"stages": stages}, indent=2) + "\n")
        self.listener.scored(name, scores)
