"""A look inside a model: by hand on small vectors, and as the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from unmasked import LLM2Vec
from unmasked.errors import DataError
from unmasked.evaluate.analysis import analyse, compare_states, measure_shape


def test_shape_by_hand():
    x = np.array([[2.0, 0.0], [0.0, 1.0]])
    y = np.array([[3.0, 0.0], [1.0, 1.0]])
    shape = measure_shape(x, y)
    half = 2 - 2 * np.sqrt(0.5)  # squared distance of vectors 45 degrees apart
    assert shape.alignment == pytest.approx(half / 2)
    others = [2, half, 2, half]  # x0-x1, x0-y1, y0-x1, y0-y1
    assert shape.uniformity == pytest.approx(np.log(np.mean(np.exp(-2 * np.array(others)))))
    assert shape.mean_cosine == pytest.approx((0 + np.sqrt(0.5)) / 2)


def test_vectors_in_one_direction_are_anisotropic():
    random = np.random.default_rng(0)
    around = random.standard_normal((100, 16))
    narrow = measure_shape(around + 20 * np.eye(16)[0], around + 20 * np.eye(16)[0] + 0.1)
    wide = measure_shape(around, around + 0.1)
    assert narrow.mean_cosine > 0.9 > 0.1 > abs(wide.mean_cosine)
    assert narrow.uniformity > wide.uniformity
    assert wide.first_direction < 0.3


def test_layers_are_those_of_the_model(tiny_decoder):
    closed = LLM2Vec.from_pretrained(tiny_decoder, enable_bidirectional=False, device="cpu")
    opened = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    cosines = compare_states(closed, opened, "The cat sat on the mat.")
    assert cosines.shape[0] == 3 and np.allclose(cosines[0], 1, atol=1e-5)
    states = [
        m.encode(["The cat sat on the mat."], output_value="token_embeddings")[0]
        for m in (closed, opened)
    ]
    last = torch.nn.functional.cosine_similarity(*states, dim=-1).numpy()
    np.testing.assert_allclose(cosines[-1], last, atol=1e-4)
    assert last[0] < 0.999, "the first token sees the others now"
    assert np.allclose(compare_states(opened, opened, "The cat."), 1, atol=1e-5)


def test_the_command(tiny_decoder, tmp_path, cli):
    rows = "".join(f"{n % 5}\tsentence {n}\tanother {n}\n" for n in range(40))
    (tmp_path / "sts.tsv").write_text("score\tsentence1\tsentence2\n" + rows)
    (tmp_path / "topics.tsv").write_text("label\ttext\na\tx\nb\ty\n")
    options = ["--task", "sts.tsv", "--json", "seen.json"]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra 'report')")
    code, out, err = cli("analyse", tiny_decoder, *options, "-o", "figures")
    assert not code, err
    assert "embedding" in out and "layer 2" in out and "uniformity" in out
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["layers"][0] == pytest.approx(1, abs=1e-5) and len(seen["layers"]) == 3
    assert set(seen["shapes"]) == {"causal", "bidirectional"}
    assert {f"{n}.{s}" for n in ("layers", "shape") for s in ("png", "svg")} == {
        file.name for file in (tmp_path / "figures").iterdir()
    }

    LLM2Vec.from_pretrained(tiny_decoder, device="cpu").save(tmp_path / "saved")
    code, out, _ = cli("analyse", "saved", "--task", "sts.tsv")
    assert not code and "no closed mask to compare with" in out
    code, _, err = cli("analyse", tiny_decoder, "--task", "topics.tsv")
    assert code == 2 and "no texts that belong together" in err
    with pytest.raises(DataError):
        analyse(str(tiny_decoder), "topics.tsv")
