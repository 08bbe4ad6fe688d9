"""Other people's code: the trainer of sentence-transformers, losses, and how frameworks find us."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from support.vectors import close

from unmasked import LLM2Vec
from unmasked.checkpoint.push import list_files
from unmasked.errors import ModelError

TEXTS = ["a cat on a mat", "한국어 문장"]


def load(folder):
    return LLM2Vec.from_pretrained(folder, device="cpu", dtype="float32")


def trainer_of(model, folder, steps, **options):
    rows = range(8)
    pairs = {"anchor": [f"query {i}" for i in rows], "positive": [f"answer {i}" for i in rows]}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, save_steps=2, max_steps=steps,
        report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
        lr_scheduler_type="constant", **options,
    )  # fmt: skip
    return SentenceTransformerTrainer(
        model=model, args=arguments, loss=MultipleNegativesRankingLoss(model),
        train_dataset=Dataset.from_dict(pairs), eval_dataset=Dataset.from_dict(pairs),
    )  # fmt: skip


def train(model, folder, steps, **resume):
    trainer_of(model, folder, steps).train(**resume)
    return model.encode(TEXTS)


def with_lora(folder, seed, how="add_adapter"):
    """An encoder with a LoRA that begins at random, as a script attaches it each time it runs."""
    model, options = load(folder), {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    torch.manual_seed(seed)
    if how == "add_adapter":
        model.add_adapter(LoraConfig(**options, init_lora_weights="gaussian"))
    else:
        model.backbone.auto_model = get_peft_model(
            model.backbone.auto_model, LoraConfig(**options, use_dora=True)
        )
    return model


def test_the_trainer_resumes_to_the_weights_of_a_run_that_was_not_stopped(tiny_decoder, tmp_path):
    whole = train(load(tiny_decoder), tmp_path / "whole", 4)
    train(load(tiny_decoder), tmp_path / "cut", 2)
    resumed = train(load(tiny_decoder), tmp_path / "cut", 4, resume_from_checkpoint=True)
    assert abs(whole - load(tiny_decoder).encode(TEXTS)).max() > 1e-3
    close(resumed, whole)


@pytest.mark.parametrize("how", ["add_adapter", "get_peft_model"])
def test_the_trainer_resumes_exactly_with_an_adapter_attached(how, tiny_decoder, tmp_path, caplog):
    whole = train(with_lora(tiny_decoder, 0, how), tmp_path / "whole", 4)
    train(with_lora(tiny_decoder, 0, how), tmp_path / "cut", 2)
    resumed = with_lora(tiny_decoder, 1, how)
    found = train(resumed, tmp_path / "cut", 4, resume_from_checkpoint=True)
    assert abs(whole - load(tiny_decoder).encode(TEXTS)).max() > 1e-3
    close(found, whole)
    assert "training continues with a new one" not in caplog.text
    frozen = [name for name, p in resumed.named_parameters() if not p.requires_grad]
    assert len(frozen) > 10 and not any("lora" in name for name in frozen)


def test_a_state_dict_goes_through_a_file_of_torch(tiny_decoder, tmp_path):
    """Which takes tensors and plain values alone; a token of the hub is in none of them."""
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", token="hf_secret")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert b"hf_secret" not in (tmp_path / "state.pt").read_bytes()
    assert not model.load_state_dict(torch.load(tmp_path / "state.pt"))[0]


def test_a_checkpoint_of_another_base_goes_below_a_new_lora(tiny_decoder, tmp_path, caplog):
    other = load(tiny_decoder)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
    other.save(tmp_path / "other")
    train(with_lora(tmp_path / "other", 0), tmp_path / "cut", 2)
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    model = with_lora(tiny_decoder, 1)
    model.load_state_dict(type(model)(str(checkpoint), device="cpu").state_dict())
    close(model.encode(TEXTS), load(checkpoint).encode(TEXTS))
    assert "training continues with a new one" in caplog.text


@pytest.mark.parametrize("how", [None, "add_adapter", "get_peft_model"])
def test_the_trainer_ends_with_its_best_model(how, tiny_decoder, tmp_path):
    """The highest loss counts as the best one, so that it goes back a long way."""
    model = load(tiny_decoder) if how is None else with_lora(tiny_decoder, 0, how)
    trainer = trainer_of(
        model, tmp_path / "run", 8, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    losses = {
        row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row
    }
    assert best.name == "checkpoint-2" and max(losses, key=losses.get) == 2 and len(losses) == 4
    close(model.encode(TEXTS), load(best).encode(TEXTS))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[2], rel=1e-4)
    trainer.save_model(str(tmp_path / "final"))
    close(load(tmp_path / "final").encode(TEXTS), model.encode(TEXTS))


def test_a_folder_says_the_adapter_only_where_one_acts(tiny_decoder, tmp_path):
    model = with_lora(tiny_decoder, 0)
    model.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "attached" / "adapters.safetensors").is_file()
    assert not [name for name, _ in list_files(tmp_path / "saved") if name.startswith("attached")]
    model.disable_adapters()
    model.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "attached").exists()


def test_stock_code_rebuilds_it_by_its_class(tiny_decoder, tmp_path):
    model = load(tiny_decoder)
    model.save(tmp_path / "saved")
    options = {"trust_remote_code": False, "local_files_only": True, "cache_folder": None}
    kwargs = {"model_kwargs": {"dtype": "float32"}, "processor_kwargs": None, "backend": "torch"}
    again = type(model)(str(tmp_path / "saved"), device="cpu", truncate_dim=8, **options, **kwargs)
    close(again.encode(TEXTS), model.encode(TEXTS)[:, :8])
    for refused in ({"gguf_file": "x"}, {"use_safetensors": False}):
        with pytest.raises(ModelError, match="is not supported"):
            type(model)(str(tmp_path / "saved"), model_kwargs=refused)
    with pytest.raises(ModelError, match="always runs in torch"):
        type(model)(str(tmp_path / "saved"), backend="onnx")


def test_what_stock_scripts_pass_to_the_model_is_followed(tiny_decoder, tmp_path):
    load(tiny_decoder).save(tmp_path / "saved")
    model = LLM2Vec(
        str(tmp_path / "saved"),
        model_kwargs={"attn_implementation": "eager", "low_cpu_mem_usage": True},
        tokenizer_kwargs={"padding_side": "left"},
        device="cpu",
    )
    close(model.encode(TEXTS), load(tiny_decoder).encode(TEXTS))
    with pytest.raises(ModelError, match="nonsense"):
        LLM2Vec(str(tmp_path / "saved"), model_kwargs={"attn_implementation": "nonsense"})


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
