"""A step on one or several processes, for `test_devices`: started as a script, by torchrun's rules.

python processes.py KIND DECODER FOLDER    trains two steps of KIND, saves the gradient of each
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import (
    SentenceTransformerDataCollator,
)
from transformers import TrainerCallback, TrainingArguments, default_data_collator, set_seed

from unmasked import LLM2Vec, adapters, loading
from unmasked.config import MNTP, SimCSE
from unmasked.train import devices
from unmasked.train.contrastive import ContrastiveTrainer, TwoViewsLoss
from unmasked.train.mntp import (
    BlockData,
    MaskedNextTokenModel,
    MaskedNextTokenTrainer,
    Masking,
)
from unmasked.train.trainer import RunCallback, stage_arguments, trained

SETTINGS = {"steps": 2, "batch_size": 8, "log_steps": 1, "learning_rate": 1e-2, "eval_steps": 100}


class Recorder(TrainerCallback):
    """Keeps the gradient that each optimiser step is made of."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seen: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        weights = [p for p in trained(model).parameters() if p.requires_grad]
        self.seen.append(torch.cat([p.grad.flatten() for p in weights]))
        torch.save(self.seen, f"{self.file}-{devices.rank()}.pt")


def encoder_of(decoder: str) -> LLM2Vec:
    """With a LoRA without dropout whose B is not zero, so that every gradient counts."""
    encoder = LLM2Vec.from_pretrained(decoder, device="cpu")
    set_seed(0)
    peft_model = adapters.attach(encoder.backbone.auto_model, rank=4, dropout=0.0)
    for name, weight in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    encoder.backbone.auto_model = peft_model
    return encoder


def mntp_trainer(decoder: str, folder: Path, callbacks: list) -> MaskedNextTokenTrainer:
    encoder = encoder_of(decoder)
    head = loading.load_causal_lm(decoder, torch.float32)
    ids = np.random.default_rng(0).integers(10, 300, (32, 24))
    settings = MNTP.model_validate({**SETTINGS, "block_length": 24})
    return MaskedNextTokenTrainer(
        model=MaskedNextTokenModel(encoder.backbone.auto_model, head),
        args=TrainingArguments(
            **stage_arguments(settings, folder, 0, most_rows=2),
            remove_unused_columns=False,
            label_names=["labels"],
        ),
        data_collator=default_data_collator,
        train_dataset=BlockData(ids, Masking(5, 300, (0, 1)), 0),
        callbacks=callbacks,
    )


def simcse_trainer(decoder: str, folder: Path, callbacks: list) -> ContrastiveTrainer:
    encoder = encoder_of(decoder)
    encoder.model_card_data.generate_widget_examples = False
    words = ["cat", "sat", "mat", "looked", "another", "dog", "near", "tree", "while", "rain"]
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(words, draw.integers(2, 12))) for _ in range(64)]
    settings = SimCSE.model_validate({**SETTINGS, "max_length": 24})
    return ContrastiveTrainer(
        model=encoder,
        args=SentenceTransformerTrainingArguments(
            **stage_arguments(settings, folder, 0), dataloader_drop_last=True
        ),
        data_collator=SentenceTransformerDataCollator(encoder.preprocess, max_length=24),
        train_dataset=Dataset.from_dict({"text": texts}),
        loss=TwoViewsLoss(encoder, 0.05),
        callbacks=callbacks,
    )


def main() -> None:
    kind, decoder, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    devices.join()
    callback = RunCallback(2, folder / f"metrics-{kind}-{devices.world()}.jsonl", None)
    recorder = Recorder(folder / f"{kind}-{devices.world()}")
    make = {"mntp": mntp_trainer, "simcse": simcse_trainer}[kind]
    trainer = make(decoder, folder / f"{kind}-{devices.world()}", [callback, recorder])
    trainer.args.max_grad_norm = 1e9  # the norm is taken, nothing is clipped
    trainer.train()


if __name__ == "__main__":
    main()
