"""Which errors of the source tell the user no way out, found by reading the source."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

FIX = "Fix: "


class RaisedErrors:
    """Every ``raise`` of an error that a user sees.

    A message has a fix where its text holds the word, or a constant, a variable or a function that
    it is made of. Functions that give a message are known by what they return.

    Attributes:
        users: the names of the classes of errors that a user sees.
        fixing: what writes a fix, whatever it is given, and the constants that hold one.
    """

    def __init__(self, folder: Path, bases: Iterable[str], fixing: Iterable[str]) -> None:
        self.trees = {
            path.relative_to(folder).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
            for path in sorted(folder.rglob("*.py"))
        }
        self.users, self.fixing = set(bases), set(fixing)
        nodes = [node for tree in self.trees.values() for node in ast.walk(tree)]
        for node in nodes * 3:  # the depth of the hierarchy; and a helper may call a helper
            if isinstance(node, ast.ClassDef) and self.users & set(map(_name, node.bases)):
                self.users.add(node.name)
            elif isinstance(node, ast.FunctionDef) and self._gives_fix(node):
                self.fixing.add(node.name)
            elif isinstance(node, ast.Assign) and not node.col_offset and self._has_fix(node.value):
                self.fixing.add(_name(node.targets[0]))

    def without_fix(self) -> list[str]:
        """``file: the statement``, in the order of the alphabet."""
        return sorted(
            f"{file}: {ast.unparse(node)}"
            for file, tree in self.trees.items()
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            for node in _inside(function)
            if isinstance(node, ast.Raise) and not self._is_fine(node, function)
        )

    def _is_fine(self, statement: ast.Raise, function: ast.FunctionDef) -> bool:
        raised = statement.exc
        if not isinstance(raised, ast.Call):  # an error that was made, or caught, elsewhere
            return True
        kind = _name(raised.func)
        if (kind[:1].isupper() and kind not in self.users) or self._has_fix(raised):
            return True
        used = {node.id for node in ast.walk(raised) if isinstance(node, ast.Name)}
        return any(
            self._has_fix(node.value)
            for node in _inside(function)
            if isinstance(node, ast.Assign | ast.AugAssign)
            and used & {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        )

    def _has_fix(self, tree: ast.AST) -> bool:
        return any(
            (isinstance(node, ast.Constant) and FIX in str(node.value))
            or (isinstance(node, ast.Name) and node.id.isupper() and node.id in self.fixing)
            or (isinstance(node, ast.Call) and _name(node.func) in self.fixing)
            for node in ast.walk(tree)
        )

    def _gives_fix(self, function: ast.FunctionDef) -> bool:
        returned = ast.unparse(function.returns) if function.returns else ""
        if returned not in {*self.users, "Fault", "Fault | None", "str"}:
            return False
        return any(
            self._has_fix(node.value)
            for node in _inside(function)
            if isinstance(node, ast.Return | ast.Assign) and node.value
        )


def _name(node: ast.AST) -> str:
    return str(getattr(node, "attr", getattr(node, "id", "")))


def _inside(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """What stands in a function, and not in one inside it."""
    waiting: list[ast.AST] = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)
