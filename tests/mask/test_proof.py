from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from support import tiny
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from unmasked.errors import NotBidirectionalError
from unmasked.mask import proof
from unmasked.mask.opening import attention_name, clear_module_flags, open_config
from unmasked.mask.proof import Proof, open_mask, prove, require, stock_loading

FULL = ["gemma", "gemma2", "gemma3", "gemma4", "gpt2", "llama", "mistral", "nemotron", "qwen3"]
FULL += ["stablelm"]
PARTIAL = {
    "falcon_h1": ("0 (mamba)", "1 (mamba)"),
    "jamba": ("0 (linear_attention)",),
    "lfm2": ("0 (conv)",),
}
REPAIRED = ["gpt_neo", "mpt"]
IMPOSSIBLE = ["mamba"]
PRETRAINED = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260k"


def opened(family: str, attention: str | None = None, **fields) -> PreTrainedModel:
    """As a loader does it: the flag before building, the module flags after."""
    dtype = fields.pop("dtype", torch.float32)
    model = tiny.model(open_config(tiny.config(family, **fields)), attention, dtype)
    clear_module_flags(model)
    return model


@torch.no_grad()
def states(model: PreTrainedModel, *texts: list[int]) -> list[torch.Tensor]:
    """Last states of each text, all in one right-padded batch."""
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    found = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return [found[i, : len(text)] for i, text in enumerate(texts)]


def drift(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def reach(model: PreTrainedModel, position: int, length: int) -> list[int]:
    """Which tokens the state of one token depends on, relative to it, by changing each."""
    text = list(range(100, 100 + length))
    changed = [[*text[:i], 300, *text[i + 1 :]] for i in range(length)]
    base, *others = states(model, text, *changed)
    seen = (i for i, other in enumerate(others) if drift(other[position], base[position]) > 1e-5)
    return [i - position for i in seen]


def small_report(verdict: str, attention: str = "sdpa") -> Proof:
    return Proof(verdict, "one layer", ("3 (conv)",), 8, float("nan"), attention, "lfm2")


# --- the proof tells open from causal ---


@pytest.mark.parametrize("family", FULL)
def test_b21_open_families_are_proved_full(family):
    report = prove(opened(family))
    assert (report.verdict, report.causal_layers, report.layers) == ("full", (), 2)
    assert report.padding_drift < 2e-5


@pytest.mark.parametrize("family", ["gemma3", "llama", "mistral", "qwen3", "stablelm"])
def test_b21_eager_is_proved_as_well_as_sdpa(family):
    report = prove(opened(family, "eager"))
    assert (report.verdict, report.attention) == ("full", "eager")


@pytest.mark.parametrize("family", [*FULL, *PARTIAL, *REPAIRED, *IMPOSSIBLE])
def test_b21_flag_off_reads_as_causal(family):
    report = prove(tiny.model(family))
    assert report.verdict == "impossible"
    assert "does not see the next one" in report.reason
    assert len(report.causal_layers) == report.layers == 2


@pytest.mark.parametrize("family", ["llama", "gemma4", "stablelm"])
def test_the_proof_agrees_with_a_plain_count_of_what_each_token_sees(family):
    assert reach(opened(family), 3, 8) == [-3, -2, -1, 0, 1, 2, 3, 4]
    assert reach(tiny.model(family), 3, 8) == [-3, -2, -1, 0]


@pytest.mark.parametrize("family", PARTIAL)
def test_hybrids_are_partial_and_their_layers_named(family):
    report = prove(opened(family))
    assert (report.verdict, report.causal_layers) == ("partial", PARTIAL[family])


@pytest.mark.parametrize("family", IMPOSSIBLE)
def test_families_that_cannot_be_opened_are_impossible(family):
    report = prove(opened(family))
    assert report.verdict == "impossible"
    with pytest.raises(NotBidirectionalError, match=family.split("_")[0]):
        require(report, allow_partial=True)


def test_a_forward_that_fails_is_a_verdict_that_says_how():
    report = flag_alone("mpt", "eager")
    assert "the forward fails: AttributeError" in report.reason
    assert report.as_dict()["padding_drift"] is None


@pytest.mark.parametrize("window", [2, 4, 64])
def test_b21_windows_shorter_and_longer_than_the_probe(window):
    assert prove(opened("mistral", sliding_window=window)).verdict == "full"
    assert prove(tiny.model("mistral", sliding_window=window)).verdict == "impossible"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_a_deep_model(dtype):
    report = prove(opened("qwen3", dtype=dtype, num_hidden_layers=16))
    assert (report.verdict, report.layers) == ("full", 16)
    closed = tiny.model("qwen3", dtype=dtype, num_hidden_layers=16)
    assert len(prove(closed).causal_layers) == 16


def test_usual_small_weights_show_enough():
    assert prove(opened("llama", initializer_range=0.02)).verdict == "full"
    assert prove(tiny.model("llama", initializer_range=0.02)).verdict == "impossible"


@pytest.mark.parametrize("vocabulary", [64, 128_000])
def test_vocabularies_of_any_size(vocabulary):
    assert prove(opened("llama", vocab_size=vocabulary)).verdict == "full"


@pytest.mark.skipif(not PRETRAINED.exists(), reason="shared/data/models/stories260k is absent")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pretrained_weights_show_enough(dtype):
    config = AutoConfig.from_pretrained(PRETRAINED)
    closed = AutoModel.from_pretrained(PRETRAINED, config=config, dtype=dtype)
    live = AutoModel.from_pretrained(PRETRAINED, config=open_config(config), dtype=dtype)
    assert len(prove(closed).causal_layers) == config.num_hidden_layers
    assert prove(live).verdict == "full"


# --- single layers, and padding ---


def test_b21_one_causal_layer_is_reported_by_its_number():
    model = opened("stablelm", "sdpa", num_hidden_layers=3)
    model.layers[1].self_attn.is_causal = True
    assert prove(model).causal_layers == (1,)


def flag_alone(family: str, attention: str) -> Proof:
    """The proof of a model that has got ``is_causal=False`` and nothing else."""
    config = tiny.config(family)
    config.is_causal, config.use_cache = False, False
    return prove(tiny.model(config, attention))


def test_b21_chunked_layers_hide_from_an_end_to_end_test_under_eager():
    report = flag_alone("llama4", "eager")
    assert (report.verdict, report.causal_layers) == ("partial", ("0 (chunked_attention)",))
    report = flag_alone("llama4", "sdpa")
    assert report.verdict == "impossible" and "depend on padding" in report.reason


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_b21_chunked_layers_become_full_ones(attention):
    model = opened("llama4", attention)
    assert prove(model).verdict == "full"
    assert stock_loading(model) == "same"


# --- what the flag does not reach is repaired in the loaded model ---


@pytest.mark.parametrize("family", REPAIRED)
def test_b21_a_repaired_family_is_full_here_and_causal_in_stock(family):
    assert flag_alone(family, "eager").verdict == "impossible"
    model = tiny.model(open_config(tiny.config(family)))
    assert open_mask(model).verdict == open_mask(model).verdict == "full"
    assert prove(copy.deepcopy(model)).verdict == "full"
    assert stock_loading(model) == "causal"
    assert prove(model).verdict == "full"


def test_b21_a_mirrored_local_layer_sees_as_far_to_the_right():
    model = tiny.model("gpt_neo", attention_types=[[["local"], 2]], window_size=3, num_layers=2)
    model.h = model.h[:1]
    open_mask(model)
    assert reach(model, 6, 12) == [-2, -1, 0, 1, 2]


def test_b21_a_batch_of_a_family_that_needs_a_mask():
    model = tiny.model(open_config(tiny.config("mpt")))
    open_mask(model)
    text, longer = [*range(100, 107)], [*range(200, 215)]
    assert drift(states(model, text, longer)[0], states(model, text)[0]) < 2e-5


@pytest.mark.parametrize("family", ["stablelm", "nemotron"])
def test_b22_the_flag_alone_stays_causal_on_sdpa_without_padding(family):
    model = tiny.model(open_config(tiny.config(family)), "sdpa")
    report = prove(model)
    assert report.verdict == "impossible"
    assert "a token without padding does not see the next one" in report.reason
    assert clear_module_flags(model) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert prove(model).verdict == "full"


def test_b22_stablelm_sdpa_padded_and_unpadded_agree():
    model, text, longer = opened("stablelm", "sdpa"), [*range(100, 107)], [*range(200, 215)]
    assert drift(states(model, text, longer)[0], states(model, text)[0]) < 2e-5


@pytest.mark.parametrize("family", FULL)
def test_b24_states_do_not_depend_on_batch_size_order_or_padding(family):
    model = opened(family)
    texts = [[*range(100, 109)], [*range(200, 202)], [*range(300, 317)]]
    together, turned = states(model, *texts), states(model, *texts[::-1])[::-1]
    for text, first, second in zip(texts, together, turned, strict=True):
        alone = states(model, text)[0]
        assert drift(first, alone) < 2e-5
        assert drift(second, alone) < 2e-5


def test_b24_states_that_depend_on_padding_are_refused():
    model = opened("llama")
    # every state gets something of the mean over all positions, padding included
    mix = lambda _, __, out: out + out.mean(1, keepdim=True)  # noqa: E731
    hook = model.embed_tokens.register_forward_hook(mix)
    report = prove(model)
    assert report.verdict == "impossible" and "depend on padding" in report.reason
    assert report.padding_drift > 1e-2
    hook.remove()
    assert prove(model).verdict == "full"


def test_states_that_are_not_finite_are_refused():
    model = opened("llama")
    torch.nn.init.constant_(model.norm.weight, torch.nan)
    assert prove(model).reason.startswith("the states are not finite")


# --- the flag ---


@pytest.mark.parametrize("family", FULL)
def test_open_config_leaves_the_given_config_alone(family):
    config = tiny.config(family)
    before = copy.deepcopy(vars(config))
    live = open_config(config)
    assert vars(config) == before
    assert (config.use_cache, live.use_cache) == (True, False)
    assert type(live) is type(config)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gpt2", "llama", "mistral", "lfm2"])
def test_the_plain_flag(family):
    live = open_config(tiny.config(family))
    assert live.is_causal is False
    assert not getattr(live, "use_bidirectional_attention", None)


@pytest.mark.parametrize(("family", "value"), [("gemma3", True), ("gemma4", "all")])
def test_the_native_key_and_its_window(family, value):
    live = open_config(tiny.config(family, sliding_window=8))
    assert live.use_bidirectional_attention == value
    assert live.sliding_window == 5  # exclusive: 4 to each side
    assert live.to_dict()["sliding_window"] == 8
    assert vars(open_config(live)) == vars(live)


def test_gemma3_never_has_both_flags():
    assert not hasattr(open_config(tiny.config("gemma3")), "is_causal")


def test_gemma3_that_was_opened_the_other_way_is_kept():
    config = tiny.config("gemma3")
    config.is_causal = False
    live = open_config(config)
    assert (live.is_causal, live.use_bidirectional_attention) == (False, False)
    assert live.sliding_window == config.sliding_window


def test_gemma3_without_a_window_gets_the_plain_flag():
    config = tiny.config("gemma3", layer_types=["full_attention", "full_attention"])
    config.sliding_window = None
    assert open_config(config).is_causal is False


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_windows_are_symmetric(attention):
    one = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    gemma = opened("gemma3", attention, sliding_window=8, **one)
    assert reach(gemma, 8, 17) == list(range(-4, 5))
    mistral = opened("mistral", attention, sliding_window=4, num_hidden_layers=1)
    assert reach(mistral, 8, 17) == list(range(-4, 5))


def test_b21_gemma1_native_key_alone_is_caught_and_mended():
    trap = tiny.config("gemma", use_bidirectional_attention=True)
    report = prove(tiny.model(trap, "sdpa"))
    assert report.verdict == "impossible"
    assert "a token with padding does not see the next one" in report.reason
    assert report.causal_layers == (0, 1)  # seen in the padded batch only
    assert prove(tiny.model(open_config(trap), "sdpa")).verdict == "full"


def test_a_config_with_a_text_config_inside():
    from transformers import Gemma3Config, LlavaConfig

    gemma = Gemma3Config(text_config=tiny.config("gemma3").to_dict())
    live = open_config(gemma)
    assert live.text_config.use_bidirectional_attention is True
    assert gemma.text_config.use_bidirectional_attention is False
    live = open_config(LlavaConfig(text_config=tiny.config("llama").to_dict()))
    assert (live.is_causal, live.text_config.is_causal) == (False, False)


# --- loaded models, wrappers, and what is left behind ---


@pytest.mark.parametrize("family", FULL)
def test_open_mask_on_a_loaded_model(family):
    model = tiny.model(family)
    assert open_mask(model).verdict == "full"
    assert model.config.use_cache is False


def test_open_mask_leaves_an_open_gemma3_as_it_is():
    model = tiny.model(open_config(tiny.config("gemma3")))
    before = vars(copy.deepcopy(model.config))
    assert open_mask(model).verdict == "full"
    assert vars(model.config) == before


def test_language_model_head_and_peft_are_looked_through():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    head = AutoModelForCausalLM.from_config(tiny.config("stablelm"))
    assert prove(head).verdict == "impossible"
    assert open_mask(head).verdict == "full"
    for inner in (head, tiny.model("stablelm")):
        wrapped = get_peft_model(inner, LoraConfig(target_modules="all-linear"))
        assert open_mask(wrapped).verdict == "full"
        assert not any(getattr(m, "is_causal", False) for m in wrapped.modules())


@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_prove_leaves_no_trace(family):
    model = opened(family)
    model.train()
    model.get_input_embeddings().eval()
    modules = dict(model.named_modules())
    training = {name: module.training for name, module in modules.items()}
    config, random = copy.deepcopy(vars(model.config)), torch.get_rng_state()
    prove(model)
    assert {name: module.training for name, module in modules.items()} == training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules.values())
    assert vars(model.config) == config
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "gpt2", "lfm2", "llama", "mistral"])
def test_a_saved_folder_reloads_with_the_same_proof(family, tmp_path):
    model = opened(family)
    model.save_pretrained(tmp_path)
    again, expected = prove(AutoModel.from_pretrained(tmp_path)), prove(model)
    assert again.verdict == expected.verdict != "impossible"
    assert again.causal_layers == expected.causal_layers
    text = [*range(100, 110)]
    stock = AutoModel.from_pretrained(tmp_path)
    assert drift(states(stock, text)[0], states(model, text)[0]) < 2e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_b22_a_saved_stablelm_needs_eager_named(attention, tmp_path):
    model = opened("stablelm", attention)
    assert stock_loading(model) == "eager"
    assert attention_name(model) == attention
    assert clear_module_flags(model) == []
    model.save_pretrained(tmp_path)
    assert prove(AutoModel.from_pretrained(tmp_path)).verdict == "impossible"
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attn_implementation": "eager"}))
    assert prove(AutoModel.from_pretrained(tmp_path)).verdict == "full"


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt2", "lfm2", "llama", "mamba"])
def test_stock_loaders_need_nothing_more_for_most_families(family):
    assert stock_loading(opened(family)) == "same"
    assert stock_loading(opened(family, "eager")) == "same"


# --- the report ---


def test_require_lets_full_pass_and_partial_when_allowed():
    require(small_report("full"))
    require(small_report("partial"), allow_partial=True)


@pytest.mark.parametrize(
    ("verdict", "allow", "said"),
    [
        ("partial", False, "verdict 'partial', allowed: full. Reason: one layer. Fix: pass allow_"),
        ("impossible", True, "verdict 'impossible', allowed: full, partial. Reason: one layer."),
    ],
)
def test_require_names_given_allowed_and_fix(verdict, allow, said):
    report = small_report(verdict)
    with pytest.raises(NotBidirectionalError) as caught:
        require(report, allow_partial=allow)
    assert said in str(caught.value)
    assert "attn_implementation='eager'" in str(caught.value)
    assert caught.value.report is report


def test_require_does_not_advise_the_attention_that_failed():
    with pytest.raises(NotBidirectionalError) as caught:
        require(small_report("impossible", "eager"))
    assert str(caught.value).endswith("Fix: choose a decoder with attention in every layer.")


def test_report_as_json_and_as_a_line():
    report = small_report("partial")
    kept = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert kept["causal_layers"] == ["3 (conv)"] and kept["padding_drift"] is None
    assert report.summary() == "bidirectional: partial (lfm2, sdpa): one layer"


def deep(spread: float) -> PreTrainedModel:
    """Sound, and so deep in bfloat16 that one text rounds otherwise beside a longer one."""
    fields = {"num_hidden_layers": 24, "hidden_size": 32, "intermediate_size": 32}
    return opened("llama", dtype=torch.bfloat16, initializer_range=spread, **fields)


def test_the_limit_for_padding_follows_how_a_deep_model_rounds(monkeypatch):
    report = prove(deep(0.35))
    assert 0.1 < report.padding_drift < 0.25 and report.verdict == "full"
    monkeypatch.setattr(proof, "_rounding", lambda decoder: 0.0)  # as if it rounded less
    assert prove(deep(0.35)).verdict == "impossible"


def test_beyond_the_largest_limit_no_rounding_is_an_excuse():
    report = prove(deep(0.55))
    assert report.padding_drift > 0.25 and "depend on padding" in report.reason


def test_padding_that_is_seen_is_found_in_a_deep_model_too():
    model = deep(0.2)
    assert prove(model).verdict == "full"
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
    )
    report = prove(model)
    assert report.verdict == "impossible" and "depend on padding" in report.reason
