"""The README is run and held to the command line; the tree of the architecture to the disk."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TREE = ARCHITECTURE[ARCHITECTURE.index("## The tree") :].split("```")[1].removeprefix("text\n")
COMMANDS = sorted(set(re.findall(r"^ *unmasked (\w+)", README, re.MULTILINE)))


def test_its_python_runs(tmp_path, monkeypatch, capsys):
    from sentence_transformers import SentenceTransformer

    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert "bidirectional: full" in capsys.readouterr().out
    stock = SentenceTransformer("encoder", device="cpu").encode(["a text", "another"])
    np.testing.assert_allclose(scope["vectors"], stock, atol=1e-5)


# --- the tree -----------------------------------------------------------------------------------


def paths_of(tree: str) -> list[str]:
    """Every path that an indented tree names; a folder of Python stands for its ``__init__.py``.

    A level is two spaces; names of one line are parted by one space, what they hold follows after
    two. A line that is further in than any name could be goes on with the text of the one above.
    """
    found: list[str] = []
    above: list[str] = []
    for line in filter(str.strip, tree.splitlines()):
        level, odd = divmod(len(line) - len(line.lstrip()), 2)
        if odd or level > len(above):
            continue
        del above[level:]
        names = re.split(r"  +", line.strip())[0].split()
        for name in names:
            path = "".join(above) + name
            found.append(f"{path}__init__.py" if (ROOT / path / "__init__.py").exists() else path)
        if names[-1].endswith("/"):
            above.append(names[-1])
    return [path for path in found if not path.endswith("/")]


def expected_paths() -> set[str]:
    kinds = {".py", ".yaml", ".html", ".json"}
    package = (f for f in (ROOT / "src" / "unmasked").rglob("*") if f.suffix in kinds)
    others = (f for name in ("scripts", "benchmarks", "docs", "examples")
              for f in (ROOT / name).rglob("*") if f.is_file())  # fmt: skip
    files = (f for f in (*package, *others) if "__pycache__" not in f.parts)
    return {str(file.relative_to(ROOT)) for file in files}


def test_its_tree_names_every_file_once_and_nothing_else():
    named = paths_of(TREE)
    assert sorted(expected_paths() - {*named}) == [], "not in the tree"
    assert [path for path in named if not (ROOT / path).exists()] == [], "not on the disk"
    assert len(named) == len({*named})


def test_a_tree_is_read_to_whole_paths():
    tree = """
src/unmasked/
  train/            teaches the model; the text
                    goes on here
    run.py          one run
    losses/
      mntp.py simcse.py   two at once
  gone.py
docs/design.md      why
"""
    assert paths_of(tree) == [
        "src/unmasked/__init__.py", "src/unmasked/train/__init__.py", "src/unmasked/train/run.py",
        "src/unmasked/train/losses/__init__.py", "src/unmasked/train/losses/mntp.py",
        "src/unmasked/train/losses/simcse.py", "src/unmasked/gone.py", "docs/design.md",
    ]  # fmt: skip


# --- commands -----------------------------------------------------------------------------------


def test_every_command_is_in_it():
    from unmasked.cli import app

    verbs = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert sorted([*verbs, *(group.name for group in app.registered_groups)]) == COMMANDS


@pytest.mark.parametrize("verb", COMMANDS)
def test_its_commands_exist(verb):
    from typer.testing import CliRunner

    from unmasked.cli import app

    assert CliRunner().invoke(app, [verb, "--help"]).exit_code == 0


def test_it_can_be_read_in_one_sitting():
    assert len(README.splitlines()) <= 200
