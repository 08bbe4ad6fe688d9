"""Every text decoder that transformers has, looked at from all sides (see `zoo`)."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from support import zoo
from transformers import AutoModel, AutoModelForCausalLM

from unmasked.errors import ModelError
from unmasked.mask.opening import open_config, window
from unmasked.mask.proof import prove

TABLE = dict(
    re.findall(r"^\| ([\w-]+) (\|.*)$", zoo.TABLE.read_text(encoding="utf-8"), re.MULTILINE)
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for models this small a second one only waits
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=zoo.FAMILIES)
def found(request):
    return zoo.examine(request.param)


@pytest.fixture
def decoder(found):
    if not found.attentions:
        pytest.skip(f"{found.family}: {found.verdict}")
    return found


@pytest.fixture
def usable(decoder):
    if decoder.verdict == "impossible":
        pytest.skip(f"{decoder.family} is impossible: {decoder.report.reason}")
    return decoder


def test_the_table_says_what_is_found(found):
    """Also fails for a family that a newer transformers brought, until it is in the table."""
    said = TABLE.get(found.family)
    assert said, f"not in docs/models.md: {zoo.row(found)} Run python -m tests.zoo > docs/models.md"
    assert said.split(" | ")[0].strip("| ") == zoo.row(found).split(" | ")[1]


def test_b21_with_the_flag_off_it_is_causal(decoder):
    assert decoder.closed == "impossible"


def test_b21_eager_and_sdpa_agree_unless_the_family_lacks_one(decoder):
    verdicts = {v for v in decoder.attentions.values() if v in ("full", "partial", "impossible")}
    assert decoder.verdict in verdicts
    assert decoder.family in DIFFER or len(verdicts) == 1


def test_b24_states_do_not_depend_on_the_batch(usable):
    assert usable.right < 1e-4
    assert usable.order < 1e-4


def test_packed_vectors_equal_padded_ones(usable):
    assert usable.unpacked or usable.packed < 1e-5


def test_gradient_reaches_the_last_token(usable):
    assert usable.gradient


@pytest.fixture(scope="module")
def saved(found, tiny_tokenizer, tmp_path_factory):
    """A family's encoder, its vectors, and the folder it was saved to."""
    from unmasked import LLM2Vec

    if not found.attentions or found.verdict == "impossible":
        pytest.skip(f"{found.family}: {found.verdict}")
    model = zoo.opened(zoo.config(found.family))
    encoder = LLM2Vec(model, tiny_tokenizer, device="cpu", report=prove(model))
    folder = tmp_path_factory.mktemp(found.family)
    encoder.save(folder)
    return encoder, folder


def test_b22_stock_auto_model_loads_it_open(found, saved):
    report = prove(AutoModel.from_pretrained(saved[1]))
    if found.stock == "causal":
        assert found.family in ONLY_HERE and report.verdict == "impossible"
        return
    assert (report.verdict, report.causal_layers) == (found.verdict, found.report.causal_layers)


def test_b22_stock_sentence_transformers_gives_the_same_vectors(found, saved, sentences):
    from sentence_transformers import SentenceTransformer

    if found.stock == "causal":
        pytest.skip(f"{found.family}: only unmasked opens its mask, and says so when it is saved")
    if found.family in NOT_STOCK:
        pytest.skip(f"{found.family}: {NOT_STOCK[found.family]}")
    stock = SentenceTransformer(str(saved[1]), device="cpu").encode(sentences[:3])
    ours = saved[0].encode(sentences[:3])
    assert np.linalg.norm(stock - ours) / np.linalg.norm(ours) < 1e-5


@pytest.mark.slow
def test_b25_a_step_of_each_stage_then_merged_saved_and_reloaded(
    found, tiny_tokenizer, sentences, tmp_path
):
    """LoRA on, one MNTP step, one SimCSE step, merge, save, reload: the trained vectors."""
    from unmasked import LLM2Vec
    from unmasked.checkpoint import adapters
    from unmasked.train.losses.mntp import MaskedNextTokenModel
    from unmasked.train.losses.simcse import TwoViewsLoss

    if not found.attentions or found.verdict == "impossible":
        pytest.skip(f"{found.family}: {found.verdict}")
    small = zoo.config(found.family)
    model = zoo.opened(small)
    try:
        peft_model = adapters.attach(model, rank=2)
    except ModelError as error:  # what it advises is what works
        model = zoo.opened(small)
        advised = {"dropout": 0} if "lora.dropout=0" in str(error) else {"method": "full"}
        assert "lora.dropout=0" in str(error) or "lora.method=full" in str(error)
        peft_model = adapters.attach(model, rank=2, **advised)
    encoder = LLM2Vec(peft_model, tiny_tokenizer, device="cpu", report=prove(model))
    before = encoder.encode(sentences[:3])
    head = AutoModelForCausalLM.from_config(open_config(small))
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)
    encoder.train()

    batch = encoder.preprocess(sentences[:3])
    ids, attention = batch["input_ids"], batch["attention_mask"]
    labels = torch.where(attention.bool() & (torch.arange(ids.shape[1]) % 3 == 2), ids, -100)
    losses = [MaskedNextTokenModel(peft_model, head)(ids, labels, attention)["loss"]]
    losses[0].backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
    optimiser.step()
    losses.append(TwoViewsLoss(encoder)([batch], torch.arange(3)))
    optimiser.zero_grad()
    losses[1].backward()
    optimiser.step()
    assert all(torch.isfinite(loss) for loss in losses)

    encoder.eval()
    trained = encoder.encode(sentences[:3])
    assert np.linalg.norm(trained - before) / np.linalg.norm(before) > 1e-3
    encoder.save(tmp_path)
    again = LLM2Vec.from_pretrained(tmp_path, allow_partial=True, device="cpu", dtype="float32")
    assert again.report.verdict == found.verdict
    reloaded = again.encode(sentences[:3])
    assert np.linalg.norm(reloaded - trained) / np.linalg.norm(trained) < 1e-4


WINDOWED = ["exaone4", "gemma2", "gemma3_text", "gpt_oss", "mistral", "modernbert-decoder"]
WINDOWED += ["cohere2", "gemma4_unified_text", "mimo_v2_flash", "vaultgemma"]


@pytest.mark.parametrize("family", WINDOWED)
@torch.no_grad()
def test_b21_windows_are_symmetric_and_as_stated(family):
    config = zoo.config(family)
    if getattr(config, "layer_types", None):
        config.layer_types = ["sliding_attention"] * len(config.layer_types)
    model = zoo.opened(config)
    model.layers, model.config.num_hidden_layers = model.layers[:1], 1
    middle, length = 14, 29
    text = torch.arange(100, 100 + length)
    rows = torch.where(torch.eye(length, dtype=torch.bool), 300, text)
    states = model(input_ids=torch.cat([text[None], rows])).last_hidden_state[:, middle]
    apart = (states[1:] - states[0]).norm(dim=1) / states[0].norm()
    side = window(model.config)
    assert apart.gt(1e-5).nonzero().flatten().tolist() == [*range(middle - side, middle + side + 1)]


def test_at_least_a_hundred_families_are_full():
    verdicts = [line.split(" | ")[0] for line in TABLE.values()]
    assert verdicts.count("| full") >= 100


def test_the_table_names_every_family():
    assert set(zoo.FAMILIES) <= set(TABLE)


DIFFER = {"modernbert-decoder"}
"""Families that one of eager and sdpa fails on; `loading` finds the other."""

ONLY_HERE = {"gpt_neo", "mpt", "openai-gpt"}
"""Families that are open in this process only."""

NOT_STOCK = {
    "git": "sentence-transformers wants its image processor",
    "phi4_multimodal": "sentence-transformers wants its image processor",
}
"""Known gaps: vectors that stock sentence-transformers does not give."""
