"""Write `docs/faults.md`: which test holds which fault of earlier implementations.

    python scripts/faults.py

A test that holds fault 7 is named ``test_b7_...``; one that holds several, ``test_b1_b2_...``. What
it holds is the first line of its docstring, or else its name.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.compile(r"test_((?:b\d+_)+)(\w+)")

HEAD = """# Faults of earlier implementations

Faults found in the original `llm2vec` package, in the seed system (training-LLM2VEC-PyTorch) and in
LLM2Vec-Gen, with the tests that keep them out of this package. Written by
`python scripts/faults.py` from the names and docstrings of the tests.

| fault | what the test checks | test |
|---|---|---|
"""


def collect(tests: Path) -> dict[int, list[tuple[str, str]]]:
    """Fault number → (what holds, ``file::test``), in the order of files and lines."""
    held: dict[int, list[tuple[str, str]]] = {}
    for file in sorted(tests.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or not (match := NAMED.match(node.name)):
                continue
            said = (ast.get_docstring(node) or match[2].replace("_", " ")).splitlines()[0]
            what = said[0].upper() + said[1:].rstrip(".:")
            for number in re.findall(r"\d+", match[1]):
                held.setdefault(int(number), []).append(
                    (what, f"{file.relative_to(tests)}::{node.name}")
                )
    return held


def page(held: dict[int, list[tuple[str, str]]]) -> str:
    """The whole page."""
    rows = [
        f"| B{number} | {what} | `{test}` |"
        for number in sorted(held)
        for what, test in held[number]
    ]
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "faults.md").write_text(page(collect(ROOT / "tests")), encoding="utf-8")
