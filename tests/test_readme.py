"""The README is run: its Python, and the commands and files it names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_python_runs(tmp_path, monkeypatch, capsys):
    from sentence_transformers import SentenceTransformer

    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert "bidirectional: full" in capsys.readouterr().out
    stock = SentenceTransformer("encoder", device="cpu").encode(["a text", "another"])
    np.testing.assert_allclose(scope["vectors"], stock, atol=1e-5)


def test_its_tree_names_every_file():
    tree = README[README.index("## The tree") :]
    package = ROOT / "src" / "unmasked"
    for file in package.rglob("*.py"):
        shown = file.parent.name if file.name == "__init__.py" else file.name
        assert shown in tree, f"{file.relative_to(ROOT)} is not in the README's tree"
    for name in re.findall(r"^ +([a-z_]+\.py) ", tree, re.MULTILINE):
        assert list(package.rglob(name)), f"the README's tree names {name}, which is not there"


@pytest.mark.parametrize("verb", re.findall(r"^unmasked (\w+)", README, re.MULTILINE))
def test_its_commands_exist(verb):
    from typer.testing import CliRunner

    from unmasked.cli import app

    assert CliRunner().invoke(app, [verb, "--help"]).exit_code == 0
