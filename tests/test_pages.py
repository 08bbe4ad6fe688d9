"""README and docs are held to the program: commands, code, links, languages. Nothing is run here;
`tests/test_pages_run.py` does that."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from support.pages import LANGUAGES, PAGES, ROOT, Block, blocks, blocks_of, read, without_code

COMMANDS = [(block, line) for block in blocks("bash") for line in block.commands()]
OTHER_PROGRAMS = {"cd", "curl", "docker", "git", "mkdir", "source", "export"}
"""Programs that are not ours, of which no more is checked than that a line can be pasted."""


def test_there_are_pages_and_commands():
    assert {"README.md", "docs/design.md"} <= {*PAGES}
    assert len(COMMANDS) > 40 and len(blocks("python")) > 5


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page):
    """A fence without a language would escape every check below; so would one within a list."""
    text = read(page)
    assert {block.language for block in blocks_of(page)} <= LANGUAGES
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(blocks_of(page))
    assert text.count("<!-- not run:") == sum(block.reason is not None for block in blocks_of(page))
    for block in blocks_of(page):
        assert block.reason is None or len(block.reason.split()) > 2, f"{block} gives no reason"


# --- commands -----------------------------------------------------------------------------------


def words_of(line: str) -> list[str]:
    """The words of a command, without variables before it and without what is piped or sent on."""
    words = shlex.split(line, comments=True)
    ends = [i for i, word in enumerate(words) if word in {"|", ">", "&", "&&"}]
    words = words[: ends[0]] if ends else words
    while words and re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    return words


def understand(words: list[str]) -> None:
    """What the command line makes of the words, without running the verb."""
    import typer

    from unmasked.cli import app

    group = typer.main.get_command(app)
    context = group.make_context("unmasked", list(words))
    while hasattr(group, "resolve_command"):
        name, group, words = group.resolve_command(context, list(words))
        try:
            context = group.make_context(name, list(words), parent=context)
        except typer.Exit as ended:  # an option that shows something, such as --formats
            assert ended.exit_code == 0
            return
    check_settings(context.params)


def check_settings(given: dict) -> None:
    """SECTION.KEY=VALUE of run, plan and train are settings that a recipe has."""
    from unmasked.recipe.files import load_recipe, make_recipe, shipped_recipes

    overrides = list(given.get("overrides") or [])
    if "stage" in given:
        stage = {"data": list(given["data"])}
        make_recipe({"name": "a", "model": {"base": "nano"}, given["stage"]: stage}, overrides)
    elif "recipe" in given:
        name = given["recipe"]
        assert name in shipped_recipes() or name.endswith(".yaml"), f"there is no recipe {name}"
        load_recipe(name if name in shipped_recipes() else "nano-supervised", overrides)


def understand_launcher(words: list[str]) -> None:
    """``accelerate launch [OPTIONS] -m unmasked VERB ...``, and torchrun, which both hand on."""
    assert "unmasked" in words, words
    understand(words[words.index("unmasked") + 1 :])


def understand_python(words: list[str]) -> None:
    """A module or file of the repository whose text knows the options."""
    target = words[2].replace(".", "/") if words[1] == "-m" else words[1]
    options = words[3:] if words[1] == "-m" else words[2:]
    if target == "unmasked":
        return understand(options)
    candidates = [ROOT / target, ROOT / f"{target}.py", ROOT / target / "__main__.py"]
    (file,) = [place for place in candidates if place.is_file()]
    known = file.read_text(encoding="utf-8")
    if file.name == "__main__.py":
        known += (file.parent / "encode.py").read_text(encoding="utf-8")
    if file.name.startswith("train_"):
        return None  # its flags are those of the seed system, which tests/compat knows
    for option in (word.partition("=")[0] for word in options if word.startswith("--")):
        assert f'"{option}"' in known, f"{file} has no option {option}"
    return None


def understand_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert {word for word in words[1:] if "=" not in word} <= {*targets}


def understand_pip(words: list[str]) -> None:
    from packaging.requirements import Requirement
    from test_dependencies import EXTRAS

    for word in words[2:]:
        found = re.match(r"(?:unmasked|\.)\[([\w,]+)\]", word)
        assert not found or {*found[1].split(",")} <= {*EXTRAS}, word
        if not word.startswith(("-", ".")):
            Requirement(word)


READERS = {
    "unmasked": lambda words: understand(words[1:]), "accelerate": understand_launcher,
    "torchrun": understand_launcher, "python": understand_python, "make": understand_make,
    "pip": understand_pip,
}  # fmt: skip


@pytest.mark.parametrize(("block", "line"), COMMANDS, ids=lambda given: str(given)[:60])
def test_a_command_is_understood(block: Block, line: str):
    words = words_of(line)
    assert words[0] in {*READERS, *OTHER_PROGRAMS}, f"{block}: {line}"
    if words[0] in READERS:
        READERS[words[0]](words)


@pytest.mark.parametrize(
    "line",
    [
        "unmasked encoed nano a.txt -o b",
        "unmasked encode nano a.txt",
        "unmasked recipes explian",
        "unmasked serve nano --prot 1",
        "unmasked run nano mntp.stpes=3",
        "unmasked run nao",
        "unmasked export nano --to onx -o o",
        "torchrun -m unmasked rnu nano",
        "python -m benchmarks.encode --quik",
        "make tset",
        "pip install '.[srve]'",
    ],
)
def test_a_command_with_a_slip_is_noticed(line: str):
    words = words_of(line)
    with pytest.raises((Exception, SystemExit)):
        READERS[words[0]](words)


@pytest.mark.parametrize("shell", [["bash", "--norc"], ["zsh", "-f"]], ids=["bash", "zsh"])
def test_commands_can_be_pasted(shell, tmp_path):
    """No word of them means something else to a shell, in an empty folder."""
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is not installed")
    every = sorted({line for _, line in COMMANDS})
    lines = [line for line in every if not {*"|>&$<"} & {*re.sub(r"'[^']*'", "", line)}]
    told = "\n".join(f'printf "%s\\0" {line}\nprintf "\\n"' for line in lines)
    done = subprocess.run(
        [*shell, "-c", told], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    seen = [row.split("\0")[:-1] for row in done.stdout.splitlines()]
    assert seen == [shlex.split(line, comments=True) for line in lines]


def test_every_line_that_zsh_would_expand_is_quoted():
    """What `zsh -f` would refuse, told without it: brackets, stars, and braces outside quotes."""
    for block, line in COMMANDS:
        bare = re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", line)
        assert not re.search(r"[\[\]*?{}()!^]|(?<==)~", bare), f"{block}: {line}"


# --- Python, YAML -------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles_and_its_names_of_ours_exist(block: Block):
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unmasked"):
            module = importlib.import_module(node.module)
            assert [a.name for a in node.names if not hasattr(module, a.name)] == []


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_read_and_a_recipe_is_one(block: Block, tmp_path):
    said = yaml.safe_load(block.code)
    if {"name", "model"} <= said.keys():
        from unmasked.recipe.files import load_recipe

        (tmp_path / "recipe.yaml").write_text(block.code, encoding="utf-8")
        load_recipe(str(tmp_path / "recipe.yaml"), [])


# --- links --------------------------------------------------------------------------------------


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ +(.*)$", without_code(page.read_text(encoding="utf-8")), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {re.sub(r" ", "-", heading.strip()) for heading in plain}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(read(page))):
        if re.match(r"[a-z]+:", target):
            assert target.startswith(("https://", "mailto:")), target
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors_of(file), f"{page}: {target}"


def test_no_page_names_a_verb_or_an_extra_that_is_not():
    """In prose too: `unmasked VERB` and `unmasked[EXTRA]`."""
    from test_dependencies import EXTRAS

    from unmasked.cli import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    verbs |= {group.name for group in app.registered_groups}
    for page in PAGES:
        text = read(page)
        assert {*re.findall(r"`unmasked ([a-z]+)", text)} <= verbs, page
        assert {*re.findall(r"unmasked\[(\w+)\]", text)} <= {*EXTRAS}, page
