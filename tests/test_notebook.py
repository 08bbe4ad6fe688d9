"""The notebook is executed, with few steps, cell by cell in one scope, as a kernel would do."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "examples" / "adapt_your_domain.ipynb"
NOTEBOOK = json.loads(FILE.read_text(encoding="utf-8"))
CELLS = [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK["cells"]]
SETTINGS, *CODE = [source for kind, source in CELLS if kind == "code"]
FEWER = {"STEPS": {"mntp": 3, "simcse": 3}, "DOCSTRINGS": 2500, "DOCUMENTS": 40}


def test_it_is_kept_without_results():
    """What a machine computed, and when, is not for a repository."""
    assert NOTEBOOK["nbformat"] == 4
    for cell in NOTEBOOK["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(CELLS)


def test_its_code_is_python_and_its_shell_commands_exist():
    from test_pages import understand

    for code in (SETTINGS, *CODE):
        ast.parse(code)
    told = "".join(source for kind, source in CELLS if kind == "markdown")
    commands = [c for c in re.findall(r"`unmasked ([^`]+)`", told) if "..." not in c]
    assert len(commands) == 3
    for command in commands:
        understand(command.split())


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    scope: dict = {}
    exec(compile(SETTINGS, FILE.name, "exec"), scope)
    assert FEWER.keys() <= scope.keys(), "the first cell has other settings"
    scope.update(FEWER)
    for number, code in enumerate(CODE):
        exec(compile(code, f"{FILE.name}:{number}", "exec"), scope)
    assert all(len(losses) > 1 for losses in scope["losses"].values())
    assert scope["compared"].last == "simcse" and len(scope["scores"]) == 6
    assert scope["gain"].low <= scope["gain"].difference <= scope["gain"].high
    shape = scope["similarity"]["after"].shape
    assert shape == (12, 12) and len(scope["neighbours"]) == 6
    assert "gain over causal" in capsys.readouterr().out
    assert (tmp_path / "runs" / "notebook" / "model" / "modules.json").is_file()
