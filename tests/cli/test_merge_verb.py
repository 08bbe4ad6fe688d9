"""merge, and fewer layers, as a user meets them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from support.commands import listing

from unmasked import LLM2Vec


@pytest.fixture
def parts(tiny_decoder, tmp_path):
    for number in range(2):
        encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
        torch.manual_seed(number)
        with torch.no_grad():
            for weight in encoder.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.02)
        encoder.save(tmp_path / f"part{number}")
    return ["part0", "part1"]


def test_a_merged_encoder_is_saved_with_its_parts_and_scored_beside_them(
    cli, parts, tasks, tmp_path
):
    code, out, err = cli("merge", *parts, "-o", "both", "--weights", "0.7,0.3")
    assert code == 0, err
    assert out.startswith("bidirectional: full")
    assert "saved  both\nnext   unmasked evaluate both part0 part1 --tasks TASK\n" in out
    card = (tmp_path / "both" / "README.md").read_text(encoding="utf-8")
    assert "| part0 | 0.7 |\n| part1 | 0.3 |" in card
    code, out, err = cli("evaluate", "both", *parts, "--tasks", tasks[0])
    assert code == 0, err
    assert [len(re.findall(rf"\b{name}\b", out)) for name in ("both", *parts)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--weights", "0.7,0.4"], "the weights are 1.1 together"),
        (["--weights", "0.7;0.3"], "should be numbers separated by commas"),
        (["--weights", "1"], "1 weights for 2 encoders. Fix: --weights 0.5,0.5"),
        (["--method", "slerp", "part2"], "slerp goes from one encoder to another"),
        (["absent"], "absent"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_nothing_is_written(cli, parts, tmp_path, given, said):
    before = listing(tmp_path)
    code, out, err = cli("merge", *parts, *given, "-o", "both")
    assert (code, out) == (2, "")
    assert said in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert listing(tmp_path) == before


def test_convert_keeps_the_first_layers(cli, tiny_decoder, sentences, tmp_path):
    code, out, err = cli("convert", tiny_decoder, "-o", "one", "--layers", 1)
    assert code == 0, err
    assert out.startswith("bidirectional: full")
    whole = LLM2Vec.from_pretrained(tiny_decoder, layers=1, device="cpu")
    found = LLM2Vec.from_pretrained("one", device="cpu")
    np.testing.assert_allclose(found.encode(sentences), whole.encode(sentences), atol=1e-5)
    for count, said in ((0, "'--layers': Input should be greater"), (3, "has 2 layers")):
        code, _, err = cli("convert", tiny_decoder, "-o", "two", "--layers", count)
        assert code == 2
        assert said in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "two").exists()


def test_evaluate_shows_quality_beside_cost(cli, tiny_decoder, tasks, tmp_path):
    options = ["--tasks", tasks[0], "--layers", 1, "--dimensions", 8, "--json", "cuts.json"]
    code, out, err = cli("evaluate", tiny_decoder, *options)
    assert code == 0, err
    rows = re.findall(r"^ *([12]) +(\d+) +(\d+ %) +(\d+) +(-?[\d.]+) +(-?[\d.]+ %)", out, re.M)
    assert [row[:4] for row in rows] == [
        ("2", "32", "100 %", "128"), ("2", "8", "100 %", "32"),
        ("1", "32", "50 %", "128"), ("1", "8", "50 %", "32"),
    ]  # fmt: skip
    assert rows[0][5] == "100.0 %"
    found = json.loads((tmp_path / "cuts.json").read_text())
    found = [r for r in found if r["cost"]["dimensions"] == 32 and r["metric"] == "spearman"]
    main = {row["cost"]["layers"]: row for row in found}
    whole, half = (100 * main[count]["score"] for count in (2, 1))
    assert [rows[0][4], rows[2][4]] == [f"{whole:.2f}", f"{half:.2f}"]
    code, _, err = cli("evaluate", tiny_decoder, "nano", *options[:4])
    assert code == 2
    assert "work on one model alone" in " ".join(err.replace("│", " ").split())


def test_a_student_is_trained_from_a_named_teacher(cli, tiny_decoder, tmp_path):
    rows = [{"query": f"question {i}", "positive": f"answer {i}"} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", "supervised", "--base", tiny_decoder, "--data", "pairs.jsonl", "-o", "run"]
    short = ["steps=2", "batch_size=4", "held_out=4", "lora.rank=2", "log_steps=1"]
    taught = [f"teacher={tiny_decoder}", "teacher.loss=kl"]
    code, _, err = cli(*words, *(f"supervised.{setting}" for setting in (*short, *taught)))
    assert code == 0, err
    lines = (tmp_path / "run" / "supervised" / "metrics.jsonl").read_text().splitlines()
    assert any("teacher_loss" in json.loads(line) for line in lines)
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert f"model: {tiny_decoder}" in recipe
