"""README and docs are executed, page by page, in a folder that has the files they take for given.

`nano` stands in for every model and two steps for many (`support/small_unmasked.py`); a block that
cannot be run says why in a comment before it. Cost: some minutes, so these tests are slow ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.page_files import write_page_files
from support.pages import PAGES, ROOT, Block, blocks_of

SHIM = ROOT / "tests" / "support" / "small_unmasked.py"
RUNNABLE = {
    page: [b for b in blocks_of(page) if b.language in {"bash", "python"} and b.reason is None]
    for page in PAGES
    if page != "README.ko.md"  # tests/test_korean.py holds its code to that of README.md
}
PREPARED = Path("runs") / "mine"
"""A run folder that some pages take for given, and others make."""


def run(block: Block, folder: Path, environment: dict[str, str]) -> None:
    if block.language == "bash":
        command = ["bash", "--norc", "-e", "-o", "pipefail", "-c", block.code]
    else:
        command = [sys.executable, "-c", block.code]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    said = f"{block}\n{block.code}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, said


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Programs called ``unmasked`` and ``python`` before all others, and no network."""
    programs = tmp_path_factory.mktemp("bin")
    commands = {"unmasked": f'"{sys.executable}" "{SHIM}"', "python": f'"{sys.executable}"'}
    for name, command in commands.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return {
        **os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": paths,
        "HF_HUB_OFFLINE": "1", "NO_COLOR": "1",
    }  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, environment) -> Path:
    """The files of every page, and a small run."""
    folder = tmp_path_factory.mktemp("prepared")
    write_page_files(folder)
    line = f"unmasked run nano mntp.data=texts.txt simcse.data=texts.txt -o {PREPARED}\n"
    run(Block("the prepared run", 0, "bash", line, None), folder, environment)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, some in RUNNABLE.items() if some])
def test_a_page_runs(page: str, prepared: Path, environment, tmp_path: Path):
    folder = tmp_path / "page"
    shutil.copytree(prepared, folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    if any(f"-o {PREPARED}" in block.code for block in RUNNABLE[page]):
        shutil.rmtree(folder / PREPARED)
    for block in RUNNABLE[page]:
        run(block, folder, environment)


def test_most_blocks_are_run():
    """A page whose blocks are all marked would be checked by nobody."""
    run, left = sum(map(len, RUNNABLE.values())), [
        block for page in RUNNABLE for block in blocks_of(page) if block.reason
    ]  # fmt: skip
    assert run > 2 * len(left)


def test_a_block_that_fails_is_noticed(tmp_path):
    environment = dict(os.environ)
    run(Block("a page", 1, "bash", "true\n", None), tmp_path, environment)
    with pytest.raises(AssertionError, match="a page:1"):
        run(Block("a page", 1, "bash", "false\ntrue\n", None), tmp_path, environment)
