"""Docstrings as text: parsed, never imported; a fifth of all modules is never trained on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from sentence_transformers import SentenceTransformer

from unmasked import demo
from unmasked.errors import DataError
from unmasked.files.docstrings import Docstring, collect, pairs

MODULE = '''
"""Sorts things in several ways.

Longer text about sorting that explains at length what the first sentence only says in short.
"""
raise RuntimeError("imported")

def quick(items):
    """Sort items quickly.  The pivot is chosen at random, so that no input is bad for long, and
    the smaller half is sorted first, which keeps the stack small."""

class Heap:
    """A heap."""
'''


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "packages"
    for index in range(60):
        folder = root / f"package{index}"
        folder.mkdir(parents=True)
        text = MODULE.replace("things", f"things{index}").replace("items", f"items{index}")
        (folder / "module.py").write_text(text.replace("at length", f"at length {index}"))
    (root / "package0" / "broken.py").write_text("def f(:\n")
    (root / "package0" / "latin.py").write_bytes(b'"""caf\xe9 and more text than that."""')
    (root / "package0" / "tests").mkdir()
    (root / "package0" / "tests" / "t.py").write_text('"""Text of a test, which is left out."""')
    return root


def test_files_are_parsed_and_never_run(tree):
    found = collect([tree], workers=1)
    assert len({d.summary for d in found}) == len(found) == 61  # "A heap." is too short
    (one,) = (d for d in found if d.name == "quick")  # the same body in every other module
    assert one.summary.startswith("Sort items")
    assert one.body.startswith("The pivot is chosen")
    assert not any("left out" in d.text for d in found)


def test_the_order_is_fixed_and_a_limit_ends_early(tree):
    assert collect([tree], workers=1) == collect([tree], workers=2)
    assert collect([tree], limit=5, workers=1) == collect([tree], workers=1)[:5]


def test_a_fifth_of_all_modules_is_held_out():
    share = sum(Docstring(f"package.module{i}", "", "", "").held_out for i in range(5000)) / 5000
    assert share == pytest.approx(0.2, abs=0.03)


def test_the_demo_never_trains_on_what_it_asks(tree, tmp_path, monkeypatch):
    found = collect([tree], workers=1)
    monkeypatch.setattr(demo, "FEWEST", 1)
    monkeypatch.setattr(demo, "collect", lambda limit: found)
    demo.write_data(tmp_path / "run", demo.QUICK)
    data = tmp_path / "run" / "data"

    def texts(name):
        return [json.loads(line)["text"] for line in (data / name).open(encoding="utf-8")]

    asked = texts("docstrings/queries.jsonl")
    assert asked == [d.summary for d in pairs(found) if d.held_out]
    trained = "\n".join([*texts("train.jsonl"), *texts("passages.jsonl")])
    assert not any(question in trained for question in asked)
    assert len(texts("docstrings/corpus.jsonl")) == len(asked)


def test_too_few_docstrings_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "collect", lambda limit: [])
    with pytest.raises(DataError, match="only 0 usable docstrings"):
        demo.write_data(tmp_path / "run", demo.QUICK)


def test_the_quick_demo_ends_with_a_folder_that_stock_loads(tmp_path):
    """The command itself, from an empty folder, on the bundled decoder and real packages."""
    command = [sys.executable, "-m", "unmasked", "demo", "--quick"]
    shown = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    stages = json.loads((tmp_path / "runs" / "demo" / "results.json").read_text())["stages"]
    assert [stage["name"] for stage in stages][-3:] == ["mntp", "simcse", "supervised"]
    for metric in demo.METRICS:
        assert f"{metric}: supervised" in shown.stdout
        assert all(0 <= stage["scores"][metric] <= 1 for stage in stages)
    assert shown.stdout.count("search: ") == demo.SEARCHES
    model = SentenceTransformer(str(tmp_path / "runs" / "demo" / "model"), device="cpu")
    assert model.encode(["a b"]).shape == (1, 256)
