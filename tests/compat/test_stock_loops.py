"""Other people's code: the trainer of sentence-transformers, losses, and how frameworks find us."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from support.vectors import close

from unmasked import LLM2Vec
from unmasked.errors import ModelError

TEXTS = ["a cat on a mat", "한국어 문장"]


def load(folder):
    return LLM2Vec.from_pretrained(folder, device="cpu", dtype="float32")


def train(model, folder, steps, **resume):
    rows = range(8)
    pairs = {"anchor": [f"query {i}" for i in rows], "positive": [f"answer {i}" for i in rows]}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, save_steps=2, max_steps=steps,
        report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
        lr_scheduler_type="constant",
    )  # fmt: skip
    loss = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(pairs), loss=loss
    )
    trainer.train(**resume)
    return model.encode(TEXTS)


def test_the_trainer_resumes_to_the_weights_of_a_run_that_was_not_stopped(tiny_decoder, tmp_path):
    whole = train(load(tiny_decoder), tmp_path / "whole", 4)
    train(load(tiny_decoder), tmp_path / "cut", 2)
    resumed = train(load(tiny_decoder), tmp_path / "cut", 4, resume_from_checkpoint=True)
    assert abs(whole - load(tiny_decoder).encode(TEXTS)).max() > 1e-3
    close(resumed, whole)


def test_stock_code_rebuilds_it_by_its_class(tiny_decoder, tmp_path):
    model = load(tiny_decoder)
    model.save(tmp_path / "saved")
    options = {"trust_remote_code": False, "local_files_only": True, "cache_folder": None}
    kwargs = {"model_kwargs": {"dtype": "float32"}, "processor_kwargs": None, "backend": "torch"}
    again = type(model)(str(tmp_path / "saved"), device="cpu", truncate_dim=8, **options, **kwargs)
    close(again.encode(TEXTS), model.encode(TEXTS)[:, :8])
    with pytest.raises(ModelError, match="cannot be followed"):
        type(model)(str(tmp_path / "saved"), model_kwargs={"gguf_file": "x"})
    with pytest.raises(ModelError, match="runs in torch"):
        type(model)(str(tmp_path / "saved"), backend="onnx")


def test_frameworks_that_look_at_the_name_of_the_type_find_the_library(tiny_decoder):
    """BERTopic and KeyBERT look for this text, and take another model where it is missing."""
    assert "sentence_transformers" in str(type(load(tiny_decoder)))


def test_features_of_another_models_preprocessing_are_pooled_alike(tiny_decoder, tmp_path):
    """A guide of a loss is handed the features of the model that is trained."""
    model = load(tiny_decoder)
    model.save(tmp_path / "saved")
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    for prompt in (None, "Compare:\n"):
        features = stock.preprocess(TEXTS, prompt=prompt)
        with torch.no_grad():
            found = model(features)["sentence_embedding"]
            ours = stock(model.preprocess(TEXTS, prompt=prompt))["sentence_embedding"]
        close(found, model.encode(TEXTS, prompt=prompt))
        close(ours, model.encode(TEXTS, prompt=prompt))
