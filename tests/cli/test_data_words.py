"""Columns are named behind a path, the same in train, mine and recipes; advice works as printed."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import yaml

TRAINING = ["steps=1", "batch_size=4", "held_out=0", "max_length=16"]


@pytest.fixture
def pairs(tmp_path):
    rows = [{"ask": f"question {i}", "say": f"answer {i} {i * 7}", "id": i} for i in range(12)]
    (tmp_path / "a file.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "a file.jsonl"


def advised(message: str) -> str:
    """The word that an error advises in place of the path."""
    return shlex.split(re.search(r"Fix: give (.+) in place of", message)[1])[0]


@pytest.mark.parametrize("verb", ["train", "mine", "run"])
def test_what_an_error_advises_works_as_printed(cli, caplog, tiny_decoder, tmp_path, pairs, verb):
    def call(data: str) -> tuple[int, str, str]:
        settings = [f"supervised.{setting}" for setting in TRAINING]
        if verb == "mine":
            return cli("mine", tiny_decoder, data, "-o", "mined.jsonl", "--margin", "0")
        if verb == "train":
            base = ["--base", tiny_decoder, "-o", "out"]
            return cli("train", "supervised", *base, "--data", data, *settings)
        recipe = {"name": "r", "model": {"base": str(tiny_decoder)}, "supervised": {"data": [data]}}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
        return cli("run", "r.yaml", "-o", "out", *settings)

    code, _, err = call(pairs)
    assert code == 2 and "no columns 'query' and 'positive' among ask, say, id" in err
    word = advised(err)
    assert word == f"{pairs}:query=NAME,positive=NAME"
    code, _, err = call(word.replace("NAME", "ask", 1).replace("NAME", "sai"))
    assert code == 2 and "no column 'sai' among ask, say, id, did you mean 'say'" in err
    assert advised(err) == f"{pairs}:query=ask,positive=say"
    assert err.endswith(f" in place of '{pairs}:query=ask,positive=sai'.\n")
    code, out, err = call(advised(err))
    assert code == 0, err
    assert "query: ask; positive: say; negatives: none; not used: id" in err + caplog.text
    assert "saved" in out or "12 rows" in out


def test_a_setting_behind_a_path_that_does_not_exist_is_named(cli, tiny_decoder, pairs):
    for verb in (["mine", tiny_decoder, f"{pairs}:qury=ask", "-o", "m.jsonl"],
                 ["train", "supervised", "--base", tiny_decoder, "-o", "out",
                  "--data", f"{pairs}:qury=ask"]):  # fmt: skip
        code, _, err = cli(*verb)
        assert code == 2 and "unknown key, did you mean 'query'?" in err


def test_texts_of_another_column(cli, tiny_decoder, tmp_path, pairs):
    options = ["train", "simcse", "--base", tiny_decoder, "-o", "out"]
    settings = [f"simcse.{setting}" for setting in TRAINING]
    code, _, err = cli(*options, "--data", pairs, *settings)
    assert code == 2 and advised(err) == f"{pairs}:text=NAME"
    code, out, err = cli(*options, "--data", advised(err).replace("NAME", "say"), *settings)
    assert code == 0, err
    assert "saved" in out
