"""The house rules that no linter knows: how large a room may be, and that a name means one thing.

`[tool.importlinter]` in pyproject.toml holds which room may import which.
"""

from __future__ import annotations

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

SOURCE = Path(__file__).parents[1] / "src" / "unmasked"
TREES = {
    str(file.relative_to(SOURCE)): ast.parse(file.read_text(encoding="utf-8"))
    for file in sorted(SOURCE.rglob("*.py"))
}
FOLDERS = sorted({str(Path(file).parent) for file in TREES} - {"."})

LINES_OF_A_FILE, LINES_OF_A_FUNCTION, FILES_OF_A_FOLDER = 350, 60, 10
LINES_OF_ALL = 30_500

SHARED_NAMES = {"main"}
"""Names of functions in more than one file: what a command begins with is called `main`."""


def lines_of(file: str) -> int:
    return len((SOURCE / file).read_text(encoding="utf-8").splitlines())


def commands() -> set[tuple[str, str]]:
    """(file, name) of every verb of the command line, which is called what its room's work is."""
    from unmasked.cli import app

    groups = [app, *(group.typer_instance for group in app.registered_groups)]
    called = [command.callback for group in groups for command in group.registered_commands]
    return {("/".join(c.__module__.split(".")[1:]) + ".py", c.__name__) for c in called}


def test_no_file_is_too_long():
    assert {file: lines_of(file) for file in TREES if lines_of(file) > LINES_OF_A_FILE} == {}


def length_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: what a call takes should be said at length."""
    said = function.body[0] if ast.get_docstring(function) else None
    docstring = said.end_lineno - said.lineno + 1 if said else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_no_function_is_too_long():
    lengths = {
        f"{file}::{node.name}": length_of(node)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(lengths) > 500
    assert {name: size for name, size in lengths.items() if size > LINES_OF_A_FUNCTION} == {}


def test_no_folder_holds_too_many_files():
    counts = Counter(str(Path(file).parent) for file in TREES)
    assert {name: count for name, count in counts.items() if count > FILES_OF_A_FOLDER} == {}


def test_the_whole_is_within_its_budget():
    assert sum(map(lines_of, TREES)) <= LINES_OF_ALL


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_room_says_what_it_answers(folder):
    """The question of a room, the shape of the answer, what it costs; of a part, what it holds."""
    said = ast.get_docstring(TREES[f"{folder}/__init__.py"]) or ""
    room = "/" not in folder
    assert len(said) > (100 if room else 40), f"{folder}/__init__.py says too little: {said}"
    assert not room or "?" in said, f"{folder}/__init__.py names no question"


def test_no_two_classes_or_public_functions_share_a_name():
    verbs = commands()
    homes: dict[str, list[str]] = {}
    for file, tree in TREES.items():
        for node in tree.body:
            function = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
            if (function or isinstance(node, ast.ClassDef)) and (file, node.name) not in verbs:
                homes.setdefault(node.name, []).append(file)
    assert len(homes) > 300
    twice = {name: files for name, files in homes.items() if len(files) > 1}
    assert {name: files for name, files in twice.items() if name not in SHARED_NAMES} == {}
    assert twice.keys() >= SHARED_NAMES, "a name of SHARED_NAMES is not shared any more"


def test_no_two_files_share_a_name():
    homes: dict[str, list[str]] = {}
    for file in TREES:
        homes.setdefault(Path(file).name, []).append(file)
    del homes["__init__.py"]
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def test_no_circle_of_files():
    """Of single files, a room's ``__init__`` and imports for types alone included.

    The package itself is left out: its public names are imported when they are used.
    """
    graph = grimp.build_graph("unmasked")
    arrows = {
        module: graph.find_modules_directly_imported_by(module) - {"unmasked"}
        for module in graph.modules - {"unmasked"}
    }
    assert "unmasked.errors" in arrows["unmasked.recipe.files"]
    TopologicalSorter(arrows).prepare()  # a CycleError names the circle


def test_no_room_takes_a_public_name_from_the_package():
    """``from unmasked import LLM2Vec`` would be an arrow upwards that no import contract sees."""
    taken = {
        (file, alias.name)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module, node.level) == ("unmasked", 0)
        for alias in node.names
    }
    rooms = {"errors", "demo", "model", *FOLDERS}
    assert {(file, name) for file, name in taken if name not in {"__version__", *rooms}} == set()
