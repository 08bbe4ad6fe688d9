"""MNTP and SimCSE: the losses are the textbook's, only adapters train, a run continues."""

from __future__ import annotations

import copy
import gzip
import json

import numpy as np
import pytest
import torch
from support.tiny import SMALL
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

from unmasked import LLM2Vec
from unmasked.checkpoint import adapters, loading
from unmasked.errors import DataError, ModelError, OutputError, RecipeError, UnmaskedError
from unmasked.files.writing import folder_for_one
from unmasked.mask.opening import open_config
from unmasked.recipe.files import load_recipe
from unmasked.recipe.lora import Lora
from unmasked.recipe.schema import Model, Recipe, SimCSE
from unmasked.text.special_tokens import prepare_tokenizer
from unmasked.train.callback import Listener
from unmasked.train.data.texts import read_texts, split_held_out
from unmasked.train.losses import mntp
from unmasked.train.losses import simcse as contrastive
from unmasked.train.losses.simcse import TwoViewsLoss, noise
from unmasked.train.run import LOCK, Run

HEADS = {
    "llama": LlamaConfig(**SMALL),
    "llama_tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gemma2_soft_cap": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
    "cohere_scale": CohereConfig(**SMALL, logit_scale=0.5),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1),
    "gpt2": GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2),
}


# --- data -------------------------------------------------------------------------------------


def test_texts_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo  \r\n", encoding="utf-8")
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.write("세 번째\n")
    (tmp_path / "c.jsonl").write_text('{"text": "four\\nlines"}\n\n', encoding="utf-8")
    paths = [tmp_path / "a.txt", tmp_path / "b.txt.gz", tmp_path / "c.jsonl"]
    assert read_texts(paths) == ["one", "two  ", "세 번째", "four\nlines"]
    assert read_texts(paths, 2) == ["one", "two  "]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"fine\n\xff\xfe bad\n", "line 2: not UTF-8"),
        ("a.txt", b"\n \n", "there is no text in it"),
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "line 2: not JSON"),
        (
            "a.jsonl",
            b'{"txt": "x"}\n',
            "line 1: no column 'text' among txt.* Fix: give .*:text=NAME",
        ),
        ("a.txt.gz", b"no gzip", "not a whole gzip file"),
        ("a.pdf", b"x", "unknown kind of file"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_texts([tmp_path / name])


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(DataError, match=r"did you mean 'corpus\.txt'"):
        read_texts([tmp_path / "corpsu.txt"])


def test_held_out_texts_are_never_trained_on():
    texts = [f"text {i % 150}" for i in range(300)]
    train, held_out = split_held_out(texts, 12, seed=3)
    assert len(held_out) == 12
    assert not set(train) & set(held_out)
    assert sorted([*train, *held_out]) == sorted(set(texts))
    assert split_held_out(texts, 12, seed=3) == (train, held_out)
    assert len(split_held_out(texts, 100, seed=3)[1]) == 15  # at most a tenth


# --- masking ----------------------------------------------------------------------------------


def masked(style="bert", probability=0.2, ids=None):
    masking = mntp.Masking(5, 1000, (0, 1), probability, style)
    ids = torch.randint(10, 1000, (64, 256)) if ids is None else ids
    return ids, masking(ids)


def test_bert_masking_is_80_10_10():
    torch.manual_seed(0)
    ids, batch = masked()
    scored = batch["labels"] != mntp.IGNORED
    assert scored[:, 1:].float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert torch.equal(batch["labels"][scored], ids[scored])
    assert torch.equal(batch["input_ids"][~scored], ids[~scored])
    inputs = batch["input_ids"][scored]
    assert (inputs == 5).float().mean().item() == pytest.approx(0.8, abs=0.03)
    kept = (inputs == ids[scored]).float().mean().item()
    assert kept == pytest.approx(0.1, abs=0.02)


def test_all_mask_masks_every_chosen_token():
    _, batch = masked("all", 0.8)
    scored = batch["labels"] != mntp.IGNORED
    assert (batch["input_ids"][scored] == 5).all()
    assert scored[:, 1:].float().mean().item() == pytest.approx(0.8, abs=0.02)


def test_special_tokens_and_the_first_are_never_masked():
    ids = torch.randint(0, 3, (64, 64))
    _, batch = masked("all", 1.0, ids)
    scored = batch["labels"] != mntp.IGNORED
    assert not scored[:, 0].any()
    assert torch.equal(scored[:, 1:], ids[:, 1:] > 1)


def test_b28_the_mask_token_leaves_the_tokenizer_alone(tiny_tokenizer):
    before = tiny_tokenizer.backend_tokenizer.to_str()
    assert mntp.find_mask_id(tiny_tokenizer, "blank") == tiny_tokenizer.convert_tokens_to_ids("_")
    assert mntp.find_mask_id(tiny_tokenizer, "eos") == tiny_tokenizer.eos_token_id
    assert mntp.find_mask_id(tiny_tokenizer, "mask") is None
    assert tiny_tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("kind", ["blank", "eos", "mask"])
def test_b28_the_tokenizers_own_mask_token_masks(tiny_tokenizer, kind):
    """A tokenizer's own mask token is used, also in the encoder's copy of the tokenizer."""
    own = copy.deepcopy(tiny_tokenizer)
    own.add_special_tokens({"mask_token": "<mask>"})
    given = prepare_tokenizer(own)
    assert mntp.find_mask_id(own, kind) == own.mask_token_id
    assert mntp.find_mask_id(given, kind) == own.mask_token_id
    assert given("a <mask> b")["input_ids"] == own("a <mask> b")["input_ids"]


def test_masks_change_with_the_epoch_and_with_nothing_else():
    ids = np.random.default_rng(0).integers(10, 1000, (8, 64))
    masking = mntp.Masking(5, 1000, (0, 1))
    data, again = (mntp.BlockData(ids, masking, seed=1) for _ in range(2))
    forwards = [data[i]["labels"] for i in range(8)]
    backwards = [again[i]["labels"] for i in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    again.set_epoch(1)
    assert not torch.equal(forwards[0], again[0]["labels"])


# --- the MNTP loss ----------------------------------------------------------------------------


def mntp_model(config):
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(open_config(config)).eval()
    return language_model, language_model.base_model


@pytest.mark.parametrize("chunk", [None, 7], ids=["at_once", "in_chunks"])
@pytest.mark.parametrize("name", HEADS)
def test_scored_logits_give_the_loss_of_the_full_ones(name, chunk, monkeypatch):
    """Against the family's own forward with labels, which computes all logits."""
    language_model, trunk = mntp_model(HEADS[name])
    torch.manual_seed(1)
    ids = torch.randint(3, 120, (3, 24))
    batch = mntp.Masking(5, 120, (0, 1, 2), 0.3)(ids)
    logits = language_model(input_ids=batch["input_ids"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    hits = (logits.argmax(-1) == targets).sum()
    if chunk:
        monkeypatch.setattr(mntp, "LOGITS_AT_ONCE", chunk * 120)
    model = mntp.MaskedNextTokenModel(trunk, language_model)
    outputs = model(**batch)
    torch.testing.assert_close(outputs["loss"], expected)
    assert outputs["totals"].sum(0)[1] == hits
    assert outputs["totals"].sum(0)[2] == (targets != mntp.IGNORED).sum()
    metrics = mntp.token_metrics(type("P", (), {"predictions": outputs["totals"].numpy()}))
    assert metrics["token_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(np.exp(expected.item()), rel=1e-5)


def graph_of(loss):
    """The names of the nodes that a backward pass will run through."""
    seen, open_nodes = set(), [loss.grad_fn]
    while open_nodes:
        seen.add(node := open_nodes.pop())
        before = {one for one, _ in node.next_functions if one is not None}
        open_nodes += before - seen
    return {node.name() for node in seen}


@pytest.mark.parametrize("chunk", [None, 7], ids=["at_once", "in_chunks"])
@pytest.mark.parametrize("name", HEADS)
def test_the_gradient_is_that_of_all_logits(name, chunk, monkeypatch):
    """With a frozen head, scales and soft caps included; and no logits wait for the backward."""

    def trained(language_model):
        model = adapters.attach(language_model.base_model, rank=2, dropout=0.0)
        torch.manual_seed(2)
        for key, weight in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(weight, std=0.05)
        return model, [p for p in model.parameters() if p.requires_grad]

    batch = mntp.Masking(5, 120, (0, 1, 2), 0.3)(torch.randint(3, 120, (3, 24)))
    whole, _ = mntp_model(HEADS[name])
    whole.requires_grad_(False)
    _, expected = trained(whole)
    logits = whole(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    torch.nn.functional.cross_entropy(logits, targets).backward()

    if chunk:
        monkeypatch.setattr(mntp, "LOGITS_AT_ONCE", chunk * 120)
    language_model, _ = mntp_model(HEADS[name])
    trunk, found = trained(language_model)
    model = mntp.MaskedNextTokenModel(trunk, language_model)
    loss = model(**batch)["loss"]
    assert "LogSoftmaxBackward0" not in graph_of(loss)
    loss.backward()
    difference = torch.cat(
        [(a.grad - b.grad).flatten() for a, b in zip(found, expected, strict=True)]
    )
    norm = torch.cat([b.grad.flatten() for b in expected]).norm()
    assert norm > 0
    assert difference.norm() <= 1e-5 * norm


def test_only_the_scored_rows_reach_the_head():
    language_model, trunk = mntp_model(HEADS["llama"])
    batch = mntp.Masking(5, 120, (0, 1, 2), 0.2)(torch.randint(3, 120, (3, 24)))
    model = mntp.MaskedNextTokenModel(trunk, language_model)
    seen = []
    model.head.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape[-2]))
    model(**batch)
    assert seen == [(batch["labels"] != mntp.IGNORED).sum().item()]


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_b27_only_the_adapter_trains(name):
    language_model, trunk = mntp_model(HEADS[name])
    peft_model = adapters.attach(trunk, rank=4)
    model = mntp.MaskedNextTokenModel(peft_model, language_model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)
    model(**mntp.Masking(5, 120, (0,), 0.3)(torch.randint(3, 120, (2, 16))))["loss"].backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


def test_b30_a_batch_without_masked_tokens_has_loss_zero_and_no_metrics():
    language_model, trunk = mntp_model(HEADS["llama"])
    ids = torch.randint(3, 120, (2, 8))
    model = mntp.MaskedNextTokenModel(trunk, language_model)
    outputs = model(input_ids=ids, labels=torch.full_like(ids, mntp.IGNORED))
    assert outputs["loss"] == 0
    assert mntp.token_metrics(type("P", (), {"predictions": outputs["totals"].numpy()})) == {}


# --- SimCSE -----------------------------------------------------------------------------------


@pytest.fixture
def encoder(tiny_decoder):
    return LLM2Vec.from_pretrained(tiny_decoder, device="cpu")


TEXTS = ["one sentence here", "another", "a third one, which is longer than the others"]


def test_b36_two_views_differ_in_train_mode_and_agree_in_eval_mode(encoder):
    features = encoder.preprocess(TEXTS)

    def view():
        return encoder(dict(features))["sentence_embedding"]

    with noise(encoder.backbone.auto_model, 0.3), torch.no_grad():
        encoder.train()
        assert (view() - view()).abs().max() > 1e-3
        encoder.eval()
        torch.testing.assert_close(view(), view())
    encoder.train()
    torch.testing.assert_close(view(), view())  # switched off again


def test_b36_dropout_without_effect_is_an_error(encoder, monkeypatch):
    monkeypatch.setattr(contrastive, "ATTENTION_DROPOUT", ("a_name_no_module_has",))
    silent = noise(encoder.backbone.auto_model, 0.3)
    with pytest.raises(ModelError, match="two views would be one"), silent:
        pass


def test_b36_embedding_dropout_is_noise_where_attention_has_none(encoder):
    features = encoder.preprocess(TEXTS)
    with noise(encoder.backbone.auto_model, 0.0, 0.2), torch.no_grad():
        first, second = (encoder.train()(dict(features))["sentence_embedding"] for _ in range(2))
        assert (first - second).abs().max() > 1e-3
    again = [encoder(dict(features))["sentence_embedding"] for _ in range(2)]
    torch.testing.assert_close(*again)  # switched off


def test_no_noise_at_all_is_refused():
    with pytest.raises(ValueError, match="the two views would be identical"):
        SimCSE(attention_dropout=0, lora={"dropout": 0})


def test_alignment_and_uniformity_are_those_of_the_formula():
    first, second = torch.randn(2, 6, 4)
    unit = [torch.nn.functional.normalize(v, dim=1) for v in (first, second)]
    measured = contrastive.alignment_and_uniformity(first, second)
    torch.testing.assert_close(measured["alignment"], (unit[0] - unit[1]).pow(2).sum(1).mean())
    uniformity = torch.pdist(unit[0]).pow(2).mul(-2).exp().mean().log()
    torch.testing.assert_close(measured["uniformity"], uniformity)


def test_the_two_views_loss_is_infonce(encoder):
    """Against the formula, with the vectors of both views captured from one forward."""
    features = encoder.preprocess(TEXTS)
    captured = []
    encoder[1].register_forward_hook(lambda _, a, out: captured.append(out["sentence_embedding"]))
    with noise(encoder.backbone.auto_model, 0.3):
        encoder.train()
        loss = TwoViewsLoss(encoder, 0.05)([features], None)
    (vectors,) = captured  # one forward for both views
    first, second = torch.nn.functional.normalize(vectors, dim=1).chunk(2)
    expected = torch.nn.functional.cross_entropy(first @ second.T / 0.05, torch.arange(3))
    torch.testing.assert_close(loss, expected)


# --- runs -------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tiny_decoder, tmp_path):
    words = ["cat", "sat", "mat", "looked", "another", "dog", "near", "tree", "while", "rain"]
    picks = np.random.default_rng(0)
    lines = [" ".join(picks.choice(words, 9)) + f" {i}" for i in range(200)]
    (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    stage = {"data": str(tmp_path / "texts.txt"), "held_out": 10, "learning_rate": 1e-3}
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"base": str(tiny_decoder), "max_length": 64},
            "mntp": {
                **stage, "steps": 6, "batch_size": 4, "block_length": 16,
                "log_steps": 1, "eval_steps": 3, "save_steps": 2, "lora": {"rank": 4},
            },
            "simcse": {
                **stage, "steps": 6, "batch_size": 8, "max_length": 16,
                "log_steps": 1, "save_steps": 2, "lora": {"rank": 4},
            },
        }
    )  # fmt: skip


class Result:
    name = "probe"

    def __init__(self, model):
        self.items = {"norm": np.linalg.norm(model.encode(TEXTS), axis=1)}
        self.scores = {"norm": float(self.items["norm"].mean())}


def test_a_whole_run(recipe, tmp_path):
    path = tmp_path / "run"
    encoder = Run(recipe, path, lambda model: [Result(model)]).run()
    stages = json.loads((path / "results.json").read_text())["stages"]
    assert [stage["name"] for stage in stages] == [
        "causal_mean", "causal_weighted_mean", "causal_last_token", "bidirectional",
        "mntp", "simcse",
    ]  # fmt: skip
    assert all(list(stage["scores"]) == ["probe.norm"] for stage in stages)
    assert len({stage["scores"]["probe.norm"] for stage in stages}) == 6  # each does something
    for name in ("mntp", "simcse"):
        assert (path / name / "adapter_model.safetensors").is_file()
        assert list((path / name).glob("events.out.tfevents*"))
        assert not list((path / name).glob("checkpoint-*"))
    saved = LLM2Vec.from_pretrained(path / "model", device="cpu")
    np.testing.assert_allclose(saved.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)
    logged = [json.loads(line) for line in (path / "mntp" / "metrics.jsonl").open()]
    losses = {row["step"]: row["loss"] for row in logged if "loss" in row}
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in logged if "eval_perplexity" in row] == [0, 3, 6]
    assert (path / "recipe.yaml").is_file()


def test_the_same_command_continues_and_repeats_nothing(recipe, tmp_path):
    path = tmp_path / "run"
    Run(recipe, path, lambda model: [Result(model)]).run()
    told = []
    listener = Listener(stage=told.append)
    Run(recipe, path, lambda model: pytest.fail("scored twice"), listener).run()
    assert told == ["checking texts and model"]


@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_b29_an_interrupted_stage_ends_with_the_same_weights(recipe, tmp_path, stage):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Run(recipe, whole).run()
    seen = []

    def interrupt(step, steps, measured):
        seen.append(step)
        if steps == getattr(recipe, stage).steps and step == 3 and len(seen) < 20:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Run(recipe, broken, None, Listener(step=interrupt)).run()
    assert not (broken / stage / "adapter_model.safetensors").exists()
    Run(recipe, broken).run()
    from safetensors.torch import load_file

    for name in ("mntp", "simcse"):
        a, b = (load_file(f / name / "adapter_model.safetensors") for f in (whole, broken))
        assert all(torch.equal(a[key], b[key]) for key in a)

    def losses(folder):
        rows = [json.loads(line) for line in (folder / stage / "metrics.jsonl").open()]
        return [(row["step"], row["loss"]) for row in rows if "loss" in row]

    assert losses(whole) == losses(broken)


def test_b31_the_rate_may_fall_over_more_steps_than_are_run(recipe, tmp_path):
    section = recipe.mntp.model_copy(update={"steps": 4, "schedule_steps": 10})
    Run(recipe.model_copy(update={"mntp": section, "simcse": None}), tmp_path / "run").run()
    rows = [json.loads(line) for line in (tmp_path / "run/mntp/metrics.jsonl").open()]
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    assert rates == pytest.approx([1e-3 * (1 - step / 10) for step in range(4)])


def test_another_recipe_in_the_same_folder_shows_the_difference(recipe, tmp_path):
    Run(recipe, tmp_path / "run").run()
    other = recipe.model_copy(update={"seed": 7})
    with pytest.raises(OutputError, match="seed: 42 -> 7"):
        Run(other, tmp_path / "run")


def test_a_folder_that_is_no_run_is_left_alone(recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="is not a run folder"):
        Run(recipe, tmp_path / "mine")
    (tmp_path / "mine" / "thesis.tex").rename(tmp_path / "mine" / ".recipe.yaml.aside")
    Run(recipe, tmp_path / "mine")  # a run that was killed as it began


@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_nothing_is_written_before_all_inputs_are_read(recipe, tmp_path, stage):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\n")
    section = getattr(recipe, stage).model_copy(update={"data": [str(bad)]})
    with pytest.raises(DataError, match=r"bad\.txt, line 1"):
        Run(recipe.model_copy(update={stage: section}), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stage", "changes", "says"),
    [
        ("mntp", {"data": []}, r"mntp\.data: nothing to train on was given"),
        ("simcse", {"data": ["-"]}, r"standard input cannot be read again"),
        ("simcse", {"data": ["no.txt"]}, r"no\.txt is not a file"),
        ("mntp", {"block_length": 2048}, "the held-out text has .* less than one block of 2048"),
        ("mntp", {"block_length": 1 << 20, "held_out": 0}, "the training text has .* tokens"),
        ("simcse", {"batch_size": 191}, "190 different texts to train on, fewer than one batch"),
        ("simcse", {"trainer": {"optim": "sdg"}}, r"simcse\.trainer cannot be used: .*sdg"),
        ("simcse", {"trainer": {"adam_beta": 1}}, "'adam_beta', did you mean 'adam_beta"),
        ("simcse", {"trainer": {"output_dir": "x"}}, "output_dir is set by the run. Fix: -o"),
        ("mntp", {"trainer": {"num_train_epochs": 3}}, r"num_train_epochs .* Fix: steps\."),
        ("mntp", {"trainer": {"gradient_accumulation_steps": 2}}, "Fix: gradient_accumulation"),
        ("mntp", {"trainer": {"load_best_model_at_end": True}}, "no effect in this stage"),
        ("mntp", {"trainer": {"save_only_model": True}}, "the result of a run that is continued"),
        (
            "simcse",
            {"trainer": {"dataloader_drop_last": True}},
            "dataloader_drop_last has no effect",
        ),
        ("simcse", {"lora": Lora(targets=["q_porj"])}, "match no layer. Allowed: .*q_proj"),
    ],
)
def test_what_a_later_stage_could_not_use_is_refused_at_once(
    recipe, tmp_path, stage, changes, says
):
    section = getattr(recipe, stage).model_copy(update=changes)
    with pytest.raises(UnmaskedError, match=says):
        Run(recipe.model_copy(update={stage: section}), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_inputs_longer_than_the_positions_are_refused(recipe, tmp_path, tiny_tokenizer):
    config = {"vocab_size": len(tiny_tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 2}
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(**config, n_positions=40)).save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    section = recipe.mntp.model_copy(update={"block_length": 48})
    changed = recipe.model_copy(update={"model": Model(base=str(base)), "mntp": section})
    with pytest.raises(RecipeError, match=r"mntp\.block_length: 48 .* Fix: mntp.block_length=40"):
        Run(changed, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_a_recipe_may_change_until_something_is_trained(recipe, tmp_path):
    Run(recipe, tmp_path / "run")._write_recipe()
    other = recipe.model_copy(update={"seed": 7})
    Run(other, tmp_path / "run").run()
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == other
    with pytest.raises(OutputError, match=r"seed: 7 -> 42"):
        Run(recipe, tmp_path / "run")


def test_two_runs_in_one_folder_are_refused(recipe, tmp_path):
    recipe = recipe.model_copy(update={"mntp": None, "simcse": None})
    run = Run(recipe, tmp_path / "run")
    at_work = folder_for_one(tmp_path / "run", LOCK)
    with at_work, pytest.raises(OutputError, match="another run is at work"):
        run.run()
    run.run()


def test_checkpointing_changes_nothing_but_memory(recipe, tmp_path):
    from safetensors.torch import load_file

    plain = recipe.model_copy(update={"mntp": None})
    section = plain.simcse.model_copy(update={"gradient_checkpointing": True})
    Run(plain, tmp_path / "a").run()
    Run(plain.model_copy(update={"simcse": section}), tmp_path / "b").run()
    a, b = (load_file(tmp_path / f / "simcse" / "adapter_model.safetensors") for f in "ab")
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=1e-4)


def test_a_new_mask_token_is_gone_from_the_result(recipe, tmp_path, tiny_tokenizer):
    section = recipe.mntp.model_copy(update={"mask_token": "mask", "steps": 2})
    run = Run(recipe.model_copy(update={"mntp": section, "simcse": None}), tmp_path / "run")
    model = run.run()
    weights = model.backbone.auto_model.get_input_embeddings().weight
    assert len(weights) == len(tiny_tokenizer)


def test_mntp_on_a_folder_without_a_head_is_refused(recipe, tmp_path):
    config = open_config(HEADS["llama"])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).base_model.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ModelError, match="has no language-model head"):
        loading.load_causal_lm(tmp_path / "encoder", torch.float32)


def test_mntp_from_an_adapter_has_the_head_of_its_decoder(recipe, tmp_path):
    """An adapter that was published after MNTP is trained on with texts of one's own."""
    mntp = recipe.mntp.model_copy(update={"steps": 1})
    first = recipe.model_copy(update={"mntp": mntp, "simcse": None})
    Run(first, tmp_path / "first").run()
    again = first.model_copy(update={"model": Model(base=str(tmp_path / "first" / "mntp"))})
    Run(again, tmp_path / "again").run()
    assert (tmp_path / "again" / "model" / "config.json").is_file()


# --- adapters ---------------------------------------------------------------------------------


def test_an_adapter_for_another_base_names_the_keys(tiny_decoder, tmp_path):
    _, trunk = mntp_model(HEADS["llama"])
    adapters.save_adapter(adapters.attach(trunk, rank=4), tmp_path / "adapter")
    with pytest.raises(
        ModelError, match="weights differ in shape, first .*Fix: load it on that base"
    ):
        LLM2Vec.from_pretrained(tiny_decoder, tmp_path / "adapter", device="cpu")


def test_an_attached_adapter_is_merged_into_what_is_saved(encoder, tmp_path):
    peft_model = adapters.attach(encoder.backbone.auto_model, rank=4, dropout=0.0)
    for name, weight in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    encoder.backbone.auto_model = peft_model.eval()
    encoder.save(tmp_path / "saved")
    saved = LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu")
    np.testing.assert_allclose(saved.encode(TEXTS), encoder.encode(TEXTS), atol=1e-4)
    assert encoder.backbone.auto_model is peft_model  # still training
