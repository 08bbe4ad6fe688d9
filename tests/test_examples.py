"""The examples run offline on the bundled decoder, and beat chance there, untrained as it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
CHANCE = {"classification": 1 / 3, "clustering": 0.1, "retrieval": 1 / 6, "sts": 0.0}


def test_all_four_are_there():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == CHANCE.keys()


@pytest.mark.parametrize("name", CHANCE)
def test_an_example_runs(name, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() > CHANCE[name]
    assert len(capsys.readouterr().out.splitlines()) > 3
