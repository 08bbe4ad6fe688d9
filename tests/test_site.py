"""The pages as a site: each has its place, the reference is current, nothing is loaded."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
import yaml
from support.pages import PAGES, ROOT

DOCS = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named(entries) -> list[str]:
    """The pages below an entry of the navigation."""
    if isinstance(entries, str):
        return [entries]
    inner = entries.values() if isinstance(entries, dict) else entries
    return [page for entry in inner for page in named(entry)]


def test_every_page_has_its_place():
    pages = named(SETTINGS["nav"])
    assert sorted(pages) == sorted(DOCS) and len(pages) == len({*pages})


@pytest.mark.parametrize("page", ["commands.md", "settings.md", "python.md"])
def test_the_reference_is_current(page: str):
    """If it is not: python scripts/reference.py."""
    written = (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
    assert written == reference().PAGES[page]()


def test_the_reference_has_every_verb_and_setting():
    from unmasked.recipe.settings import settings

    module = reference()
    assert "## encode" in module.commands_page() and "`-o`, `--output`" in module.commands_page()
    assert all(one.name in module.settings_page() for one in settings())


def test_every_row_of_the_commands_has_three_cells_and_a_default_that_is_one():
    page = reference().commands_page()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}
    assert "Ellipsis" not in page and "Default: ``" not in page
    assert "`A B [C ...]`" in page and "nearest SKIP documents of a query. Default: `0`." in page


def test_the_site_is_built_without_a_warning_and_loads_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = [*tmp_path.rglob("*.html")]
    assert len(pages) >= len(DOCS)
    loaded = re.compile(
        r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)"
    )
    for page in pages:
        shown = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        found = [x for x in loaded.findall(shown) if 'rel="canonical"' not in x]
        assert found == [], page
    styles = "".join(file.read_text(encoding="utf-8") for file in tmp_path.rglob("*.css"))
    assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", styles)
    assert "troubleshooting" in (tmp_path / "search" / "search_index.json").read_text()
