"""Every text decoder that transformers has, looked at from all sides (see `zoo`).

Which families a test is for is read from docs/models.md, and the first test holds that page to what
is found. So no test here has to skip.
"""

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

NOT_STOCK = {
    "git": "sentence-transformers wants its image processor",
    "phi4_multimodal": "sentence-transformers wants its image processor",
}
"""Known gaps: families whose vectors stock sentence-transformers does not give."""

DECODERS = zoo.listed("full", "partial", "impossible")
USABLE = zoo.listed("full", "partial")
PACKED = zoo.listed("full", packed="yes")
ONLY_HERE = zoo.listed("full", "partial", stock="causal")
IN_STOCK = [family for family in USABLE if family not in ONLY_HERE]


def of(families: list[str], gaps: dict[str, str] | None = None) -> pytest.MarkDecorator:
    """What was found of each of these families, as the argument ``found``; gaps have to fail."""
    marks = {
        family: pytest.mark.xfail(reason=why, strict=True) for family, why in (gaps or {}).items()
    }
    values = [pytest.param(family, marks=marks.get(family, ())) for family in families]
    return pytest.mark.parametrize("found", values, indirect=True)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for models this small a second one only waits
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found(request):
    return zoo.examine(request.param)


def rounded(line: str) -> str:
    """A line of the table without the digits of small numbers, which differ between machines."""
    return re.sub(r"\d\.\de-\d\d", "#", line)


@of(zoo.FAMILIES)
def test_the_table_says_what_is_found(found):
    """Also fails for a family that a newer transformers brought, until it is in the table."""
    cells = zoo.table().get(found.family)
    said = f"| {' | '.join([found.family, *cells.values()])} |" if cells else "not there"
    found = zoo.row(found)
    normal = [rounded(re.sub(r"[ |]+", " ", line)) for line in (said, found)]
    assert normal[0] == normal[1], (
        f"docs/models.md says {said}. Write it anew: see tests/support/zoo.py"
    )


def test_the_table_has_no_other_families_and_says_what_its_columns_mean():
    assert [*zoo.table()] == zoo.FAMILIES
    text = zoo.TABLE.read_text(encoding="utf-8")
    assert text.startswith(zoo.introduction([cells["verdict"] for cells in zoo.table().values()]))


def test_at_least_a_hundred_families_are_full():
    assert len(zoo.listed("full")) >= 100


@of(DECODERS)
def test_b21_with_the_flag_off_it_is_causal(found):
    assert found.closed == "impossible"


@of(DECODERS)
def test_b21_eager_and_sdpa_agree_unless_the_family_lacks_one(found):
    verdicts = {v for v in found.attentions.values() if v in ("full", "partial", "impossible")}
    assert found.verdict in verdicts
    assert found.family in DIFFER or len(verdicts) == 1


@of(USABLE)
def test_b24_states_do_not_depend_on_the_batch(found):
    assert found.right < 1e-4
    assert found.order < 1e-4


@of(PACKED)
def test_packed_vectors_equal_padded_ones(found):
    assert not found.unpacked
    assert found.packed < 1e-5


@of(USABLE)
def test_gradient_reaches_the_last_token(found):
    assert found.gradient


@pytest.fixture(scope="module")
def saved(found, tiny_tokenizer, tmp_path_factory):
    """A family's encoder and the folder it was saved to."""
    from unmasked import LLM2Vec

    model = zoo.opened(zoo.config(found.family))
    encoder = LLM2Vec(model, tiny_tokenizer, device="cpu", report=prove(model))
    folder = tmp_path_factory.mktemp(found.family)
    encoder.save(folder)
    return encoder, folder


@of(IN_STOCK)
def test_b22_stock_auto_model_loads_it_open(found, saved):
    report = prove(AutoModel.from_pretrained(saved[1]))
    assert (report.verdict, report.causal_layers) == (found.verdict, found.report.causal_layers)


@of(ONLY_HERE)
def test_what_only_unmasked_opens_is_causal_in_stock(found, saved):
    assert prove(AutoModel.from_pretrained(saved[1])).verdict == "impossible"


def test_few_families_are_open_here_only():
    assert ONLY_HERE == ["gpt_neo", "mpt", "openai-gpt"]


@of(IN_STOCK, gaps=NOT_STOCK)
def test_b22_stock_sentence_transformers_gives_the_same_vectors(saved, sentences):
    from sentence_transformers import SentenceTransformer

    stock = SentenceTransformer(str(saved[1]), device="cpu").encode(sentences[:3])
    ours = saved[0].encode(sentences[:3])
    assert np.linalg.norm(stock - ours) / np.linalg.norm(ours) < 1e-5


@pytest.mark.slow
@of(USABLE)
def test_b25_a_step_of_each_stage_then_merged_saved_and_reloaded(
    found, tiny_tokenizer, sentences, tmp_path
):
    """LoRA on, one MNTP step, one SimCSE step, merge, save, reload: the trained vectors."""
    from unmasked import LLM2Vec
    from unmasked.checkpoint import adapters
    from unmasked.train.losses.mntp import MaskedNextTokenModel
    from unmasked.train.losses.simcse import TwoViewsLoss

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


DIFFER = {"modernbert-decoder"}
"""Families that one of eager and sdpa fails on; `loading` finds the other."""
