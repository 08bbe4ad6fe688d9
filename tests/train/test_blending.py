"""Merging encoders of one base, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.tiny import save_random
from transformers import AutoConfig

from unmasked import LLM2Vec
from unmasked.checkpoint import adapters
from unmasked.errors import ModelError
from unmasked.files.writing import write_text
from unmasked.recipe.schema import Recipe
from unmasked.train.blending import check_weights, merge_encoders
from unmasked.train.run import MERGED, Run

TEXTS = ["The cat sat on the mat.", "A dog barked."]


def moved(base, folder, seed, size=0.02, **options):
    """An encoder whose weights are those of a base, a little changed."""
    encoder = LLM2Vec.from_pretrained(base, device="cpu", **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(torch.randn_like(weight), alpha=size)
    encoder.save(folder)
    return folder


@pytest.fixture(scope="module")
def parts(tiny_decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return [str(moved(tiny_decoder, folder / f"part{n}", n)) for n in range(3)]


def weights_of(encoder):
    return {name: value.double() for name, value in encoder.state_dict().items()}


def test_linear_is_the_weighted_mean_and_stock_loads_it(parts, tmp_path):
    merged = merge_encoders(parts, [0.5, 0.3, 0.2])
    each = [weights_of(LLM2Vec.from_pretrained(part)) for part in parts]
    for name, value in weights_of(merged).items():
        wanted = 0.5 * each[0][name] + 0.3 * each[1][name] + 0.2 * each[2][name]
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    assert merged.report.verdict == "full"
    merged.save(tmp_path / "merged")
    stock = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    np.testing.assert_allclose(stock.encode(TEXTS), merged.encode(TEXTS), rtol=1e-4, atol=1e-5)


def test_slerp_goes_along_the_sphere(parts):
    merged = weights_of(merge_encoders(parts[:2], [0.7, 0.3], "slerp"))
    first, second = (weights_of(LLM2Vec.from_pretrained(part)) for part in parts[:2])
    bent = 0
    for name, value in merged.items():
        a, b = first[name].flatten(), second[name].flatten()
        angle = math.acos(min(1.0, float(torch.cosine_similarity(a, b, dim=0))))
        wanted = (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)
        torch.testing.assert_close(value.flatten(), wanted, rtol=1e-4, atol=1e-6)
        bent += bool((wanted - 0.7 * a - 0.3 * b).abs().max() > 1e-5)
    assert bent


def test_adapters_of_one_base_are_merged_with_it(tiny_decoder, tmp_path):
    folders = []
    for number in range(2):
        trunk = LLM2Vec.from_pretrained(tiny_decoder, device="cpu").backbone.auto_model
        torch.manual_seed(number)
        adapter = adapters.attach(trunk, rank=2, dropout=0.0)
        for name, weight in adapter.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        folders.append(str(tmp_path / f"adapter{number}"))
        adapters.save_adapter(
            adapter, tmp_path / f"adapter{number}", adapters.adapter_state(adapter)
        )
        settings = tmp_path / f"adapter{number}" / "adapter_config.json"
        said = json.loads(settings.read_text()) | {"base_model_name_or_path": str(tiny_decoder)}
        settings.write_text(json.dumps(said))
    each = [weights_of(LLM2Vec.from_pretrained(folder)) for folder in folders]
    merged = weights_of(merge_encoders(folders))
    for name, value in merged.items():
        wanted = (each[0][name] + each[1][name]) / 2
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    said["base_model_name_or_path"] = str(tmp_path / "elsewhere")
    settings.write_text(json.dumps(said))
    with pytest.raises(ModelError, match="these adapters are of different bases .*elsewhere"):
        merge_encoders(folders)


def test_what_is_not_of_one_base_is_refused(parts, tiny_decoder, tiny_tokenizer, tmp_path):
    other = str(moved(tiny_decoder, tmp_path / "other", 7, size=50.0))
    with pytest.raises(ModelError, match=r"other is not of the same base .* cosine between their"):
        merge_encoders([parts[0], other])
    config = AutoConfig.from_pretrained(tiny_decoder)
    config.num_hidden_layers = 1
    small = save_random(tmp_path / "small", config, tiny_tokenizer)
    with pytest.raises(ModelError, match="small is not of the same base .* weights are missing"):
        merge_encoders([parts[0], str(small)])
    last = moved(parts[1], tmp_path / "last", 3, pooling_mode="last_token")
    with pytest.raises(ModelError, match="last has pooling_mode last_token, and .*part0 mean"):
        merge_encoders([parts[0], str(last)])


@pytest.mark.parametrize(
    ("names", "weights", "method", "said"),
    [
        ("ab", [0.5], "linear", "1 weights for 2 encoders. Fix: --weights 0.5,0.5"),
        ("ab", [0.5, 0.6], "linear", "1.1 together and should be 1. Fix: --weights 0.4545,0.5455"),
        ("ab", [1.5, -0.5], "linear", "each should be above 0. Fix: --weights 0.5,0.5"),
        ("ab", [float("nan"), 1], "linear", "each should be above 0"),
        ("abc", None, "slerp", "slerp goes from one encoder to another, and 3 are given"),
        ("abc", [1, 1], "linear", "Fix: --weights 0.333333,0.333333,0.333334"),
        ("a", None, "linear", "one encoder is given"),
        ("aa", None, "linear", "an encoder is given twice"),
        ("ab", None, "lienar", "'lienar', did you mean 'linear'"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_those_that_do(names, weights, method, said):
    with pytest.raises(ModelError) as error:
        check_weights(list(names), weights, method)
    assert said in str(error.value)
    if "--weights " in said:
        fixed = [float(w) for w in str(error.value).split("--weights ")[1].rstrip(".").split(",")]
        assert check_weights(list(names), fixed, method) == fixed


def test_a_stage_is_merged_with_what_it_began_with(tiny_decoder, tmp_path):
    rows = [{"query": f"question {i}", "positive": f"answer {i}"} for i in range(40)]
    write_text(tmp_path / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    stage = {"steps": 2, "batch_size": 4, "held_out": 0, "warmup_steps": 0, "max_length": 16}
    stage |= {"data": str(tmp_path / "pairs.jsonl"), "learning_rate": 0.01, "merge_with_base": 0.25}
    model = {"base": str(tiny_decoder), "max_length": 32}
    recipe = Recipe.model_validate({"name": "t", "model": model, "supervised": stage})

    class Result:
        name, items = "probe", {}

        def __init__(self, encoder):
            self.scores = {"first": float(encoder.encode(["a text"])[0, 0])}

    found = Run(recipe, tmp_path / "run", lambda encoder: [Result(encoder)]).run()
    before = weights_of(LLM2Vec.from_pretrained(tiny_decoder))
    after = weights_of(LLM2Vec.from_pretrained(tiny_decoder, tmp_path / "run" / "supervised"))
    for name, value in weights_of(found).items():
        wanted = 0.75 * after[name] + 0.25 * before[name]
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    saved = LLM2Vec.from_pretrained(tmp_path / "run" / "model")
    np.testing.assert_allclose(saved.encode(TEXTS), found.encode(TEXTS), rtol=1e-5, atol=1e-6)
    stages = json.loads((tmp_path / "run" / "results.json").read_text())["stages"]
    assert [stage["name"] for stage in stages][-2:] == ["supervised", MERGED]
    again = Run(recipe, tmp_path / "run").run()  # nothing is left to do
    np.testing.assert_array_equal(again.encode(TEXTS), found.encode(TEXTS))
