"""The recipe, stage by stage: baselines, MNTP, SimCSE, each scored, the result saved.

Everything lives in a run folder, and the same command continues it: a stage that has its adapter is
not trained again, a score that is written is not computed again, a stage that was cut off resumes
from its last checkpoint.

    recipe.yaml      as resolved         results.json     scores of every stage
    mntp/ simcse/    adapter, checkpoints, metrics.jsonl, TensorBoard events
    scores/          per-item scores, for intervals        model/    the merged encoder
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import (
    SentenceTransformerDataCollator,
)
from sentence_transformers.util import get_device_name
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    PrinterCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from unmasked import __version__, adapters, folder, loading
from unmasked.config import MNTP, Recipe, SimCSE
from unmasked.errors import OutputError
from unmasked.model import LLM2Vec
from unmasked.packing import checkpoint_contexts
from unmasked.recipe import dump_recipe, load_recipe, recipe_differences
from unmasked.tokens import TextTokenizer
from unmasked.train.contrastive import ContrastiveTrainer, TwoViewsLoss, attention_dropout
from unmasked.train.data import make_blocks, read_texts, split_held_out
from unmasked.train.mntp import (
    BlockData,
    MaskedNextTokenModel,
    MaskedNextTokenTrainer,
    Masking,
    find_mask_id,
    token_metrics,
)
from unmasked.train.trainer import Report, RunCallback, last_checkpoint, stage_arguments

LIBRARIES = ("torch", "transformers", "sentence-transformers", "peft")
BASELINES = ("mean", "weighted_mean", "last_token")


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
    step: Report = lambda step, steps, measured: None
    scored: Callable[[str, dict[str, float]], None] = lambda stage, scores: None


class Run:
    """A recipe and the folder it runs in.

    Args:
        recipe: what to do.
        path: the run folder; made, or continued if it was made with the same recipe. Only a
            folder ``data`` may be there before.
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
        self.listener = listener or Listener()
        self.device = torch.device(get_device_name())
        self.dtype = loading.pick_dtype(recipe.model.dtype, self.device)
        self._check_folder()

    def run(self) -> LLM2Vec:
        """All stages that are not done yet; returns the finished encoder."""
        set_seed(self.recipe.seed)
        self.listener.stage("checking texts and model")
        self._check_inputs()
        self._write_recipe()
        if self.score is not None:
            for mode in BASELINES:
                causal = partial(self._encoder, pooling_mode=mode, enable_bidirectional=False)
                self._score(f"causal_{mode}", partial(causal, []))
            self._score("bidirectional", partial(self._encoder, []))
        done: list[str | Path] = []
        for name, train in self._stages().items():
            if not (self.path / name / adapters.CONFIG_NAME).is_file():
                self.listener.stage(name)
                train(done)
            done.append(self.path / name)
            self._score(name, partial(self._encoder, done))
        encoder = self._encoder(done)
        if not (self.path / "model" / "config.json").is_file():
            self.listener.stage("saving")
            encoder.save(self.path / "model", card=self._card(encoder))
        return encoder

    def _stages(self) -> dict[str, Callable[[Sequence[str | Path]], None]]:
        """The recipe's stages in order; each trains on the merged adapters before it."""
        stages: dict[str, Callable[[Sequence[str | Path]], None]] = {}
        if self.recipe.mntp is not None:
            stages["mntp"] = partial(self._train_mntp, self.recipe.mntp)
        if self.recipe.simcse is not None:
            stages["simcse"] = partial(self._train_simcse, self.recipe.simcse)
        return stages

    def results(self) -> list[dict[str, Any]]:
        """Stages in order, each ``{"name": ..., "scores": {"TASK.METRIC": fraction}}``."""
        file = self.path / "results.json"
        if not file.is_file():
            return []
        stages: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["stages"]
        return stages

    def _check_folder(self) -> None:
        mine = self.path / "recipe.yaml"
        if mine.is_file():
            changed = recipe_differences(load_recipe(mine), self.recipe)
            if changed:
                raise OutputError(
                    f"{self.path} was made with a different recipe:\n  "
                    + "\n  ".join(changed)
                    + "\nFix: the same settings to continue it, or another output folder."
                )
        elif self.path.exists() and {item.name for item in self.path.iterdir()} - {"data"}:
            raise OutputError(
                f"{self.path} exists and is no run folder (it has no recipe.yaml). "
                "Fix: another output folder."
            )

    def _check_inputs(self) -> None:
        """Read every training text and prove the model before anything is written."""
        for stage in (self.recipe.mntp, self.recipe.simcse):
            if stage is not None:
                read_texts(stage.data, stage.max_texts)
        self._encoder([])

    def _write_recipe(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        aside = self.path / "recipe.tmp"
        dump_recipe(self.recipe, aside)
        ran = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        text = aside.read_text(encoding="utf-8")
        aside.write_text(f"# unmasked {__version__}, {ran}\n{text}", encoding="utf-8")
        aside.replace(self.path / "recipe.yaml")

    # Encoders

    def _encoder(self, chain: Sequence[str | Path], **overrides: Any) -> LLM2Vec:
        model = self.recipe.model
        options: dict[str, Any] = {
            "pooling_mode": model.pooling,
            "max_length": model.max_length,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attn_implementation": model.attention,
            "allow_partial": model.allow_partial,
            "revision": model.revision,
            **overrides,
        }
        return LLM2Vec.from_pretrained(model.base, list(chain), **options)

    def _card(self, encoder: LLM2Vec) -> folder.Card:
        recipe = (self.path / "recipe.yaml").read_text(encoding="utf-8")
        sections = {"Recipe": f"```yaml\n{recipe}```"}
        stages = (self.recipe.mntp, self.recipe.simcse)
        data = dict.fromkeys(str(path) for stage in stages if stage for path in stage.data)
        base, proof = str(self.recipe.model.base), encoder.report.summary()
        return folder.Card(base, proof, sections, list(data), self.results())

    # Scores

    def _score(self, name: str, make: Callable[[], LLM2Vec]) -> None:
        stages = self.results()
        if self.score is None or any(stage["name"] == name for stage in stages):
            return
        self.listener.stage(f"scoring {name}")
        results = self.score(make())
        items = {f"{r.name}.{key}": value for r in results for key, value in r.items.items()}
        (self.path / "scores").mkdir(exist_ok=True)
        np.savez(self.path / "scores" / f"{name}.npz", **items)  # type: ignore[arg-type]
        scores = {f"{r.name}.{key}": float(v) for r in results for key, v in r.scores.items()}
        stages.append({"name": name, "scores": scores})
        aside = self.path / "results.tmp"
        aside.write_text(json.dumps({"stages": stages}, indent=2) + "\n", encoding="utf-8")
        aside.replace(self.path / "results.json")
        self.listener.scored(name, scores)

    # Training

    def _train_mntp(self, stage: MNTP, done: Sequence[str | Path]) -> None:
        encoder = self._encoder(done)
        tokens = encoder.backbone.tokens
        train, held_out = self._texts(stage)
        model = self.recipe.model
        language_model: Any = loading.load_causal_lm(
            model.base, self.dtype, encoder.report.attention, revision=model.revision
        )
        language_model.to(self.device)
        mask_id = find_mask_id(tokens.tokenizer, stage.mask_token)
        vocabulary = language_model.config.get_text_config().vocab_size
        trunk: Any = encoder.backbone.auto_model
        if mask_id is None:
            mask_id = vocabulary
            trunk.resize_token_embeddings(vocabulary + 1)
            language_model.resize_token_embeddings(vocabulary + 1)
        peft_model = self._attach(trunk, stage)
        masking = Masking(
            mask_id,
            min(vocabulary, len(tokens.tokenizer)),
            tuple({*tokens.prefix, *tokens.tokenizer.all_special_ids}),
            stage.mask_probability,
            stage.mask_style,
        )
        evaluation = None
        if held_out and stage.eval_steps:
            evaluation = self._blocks(held_out, tokens, stage, masking)
        work = self.path / "mntp"
        arguments = stage_arguments(stage, work, self.recipe.seed)
        callback = self._callback("mntp", stage, stage.batch_size * stage.block_length)
        trainer = MaskedNextTokenTrainer(
            model=MaskedNextTokenModel(peft_model, language_model),
            args=TrainingArguments(
                **arguments,
                remove_unused_columns=False,
                label_names=["labels"],
                eval_strategy="steps" if evaluation else "no",
                eval_steps=stage.eval_steps or None,
                eval_on_start=evaluation is not None,
                per_device_eval_batch_size=stage.batch_size,
            ),
            data_collator=default_data_collator,
            train_dataset=self._blocks(train, tokens, stage, masking),
            eval_dataset=evaluation,
            compute_metrics=token_metrics,
            callbacks=[callback, TensorBoardCallback(SummaryWriter(str(work)))],
        )
        self._fit(trainer, callback, peft_model, work)

    def _train_simcse(self, stage: SimCSE, done: Sequence[str | Path]) -> None:
        encoder = self._encoder(done)
        peft_model = self._attach(encoder.backbone.auto_model, stage)
        encoder.backbone.auto_model = peft_model
        encoder.model_card_data.generate_widget_examples = False
        texts, _ = self._texts(stage)
        work = self.path / "simcse"
        callback = self._callback("simcse", stage, None)
        with attention_dropout(peft_model, stage.attention_dropout):
            trainer = ContrastiveTrainer(
                model=encoder,
                args=SentenceTransformerTrainingArguments(
                    **stage_arguments(stage, work, self.recipe.seed), dataloader_drop_last=True
                ),
                data_collator=SentenceTransformerDataCollator(
                    encoder.preprocess, max_length=stage.max_length
                ),
                train_dataset=Dataset.from_dict({"text": texts}),
                loss=TwoViewsLoss(encoder, stage.temperature),
                callbacks=[callback, TensorBoardCallback(SummaryWriter(str(work)))],
            )
            self._fit(trainer, callback, peft_model, work)

    def _blocks(
        self, texts: list[str], tokens: TextTokenizer, stage: MNTP, masking: Masking
    ) -> BlockData:
        blocks = make_blocks(texts, tokens, stage.block_length)
        return BlockData(blocks.ids, masking, self.recipe.seed)

    def _texts(self, stage: MNTP | SimCSE) -> tuple[list[str], list[str]]:
        texts = read_texts(stage.data, stage.max_texts)
        return split_held_out(texts, stage.held_out, self.recipe.seed)

    def _attach(self, trunk: Any, stage: MNTP | SimCSE) -> PeftModel:
        lora = stage.lora
        set_seed(self.recipe.seed)
        model = adapters.attach(trunk, lora.rank, lora.alpha, lora.dropout, lora.targets)
        if stage.gradient_checkpointing:
            trunk.activation_checkpointing_enable(
                {"use_reentrant": False, "context_fn": checkpoint_contexts}
            )
            trunk.enable_input_require_grads()
        return model

    def _callback(self, name: str, stage: MNTP | SimCSE, tokens: int | None) -> RunCallback:
        per_step = tokens and tokens * stage.gradient_accumulation
        metrics = self.path / name / "metrics.jsonl"
        return RunCallback(stage.steps, metrics, per_step, self.listener.step)

    def _fit(self, trainer: Any, callback: RunCallback, model: PeftModel, work: Path) -> None:
        """Train, or continue, until the stage's last step; then keep the adapter alone."""
        trainer.remove_callback(PrinterCallback)  # the listener speaks
        checkpoint = last_checkpoint(work)
        if checkpoint is not None and checkpoint.step >= callback.steps:
            adapters.load_adapter(model, checkpoint.path)  # cut off after its last step
        else:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint.path))
            if callback.interrupted and trainer.state.global_step < callback.steps:
                raise KeyboardInterrupt
        aside = work / "adapter.tmp"
        adapters.save_adapter(model, aside)
        for name in (adapters.WEIGHTS_NAME, adapters.CONFIG_NAME):  # the config says it is whole
            (aside / name).replace(work / name)
        aside.rmdir()
        for finished in work.glob("checkpoint-*"):
            shutil.rmtree(finished)
        if callback.interrupted:
            raise KeyboardInterrupt
