"""The report of a run, looked at in a browser at the widths of a desk and of a phone."""

from __future__ import annotations

import json
import re
import sys
import time

import numpy as np
import pytest
import yaml
from support import browser

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra 'report')")

from unmasked.errors import DataError
from unmasked.evaluate.report.page import write_report


@pytest.fixture(scope="module")
def run_folder(tiny_decoder, tmp_path_factory):
    """A run of a few steps with a retrieval task, made by the command itself."""
    from unmasked.cli import main

    folder = tmp_path_factory.mktemp("report")
    marks = "& <b>bold</b> <!-- <script>"
    texts = [f"{word} number {n} {marks}" for n in range(20) for word in ("cat", "dog")]
    (folder / "texts.txt").write_text("\n".join(texts))
    task = folder / "pets"
    (task / "qrels").mkdir(parents=True)
    for name, prefix in (("corpus", ""), ("queries", "where is ")):
        rows = [{"_id": f"{n} {t.split()[0]}.{n}", "text": prefix + t} for n, t in enumerate(texts)]
        (task / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = [f"{n} {t.split()[0]}.{n}" for n, t in enumerate(texts)]
    lines = ["query-id\tcorpus-id\tscore", *(f"{i}\t{i}\t1" for i in ids)]
    (task / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    stage = {"data": [str(folder / "texts.txt")], "held_out": 4, "steps": 3, "batch_size": 4,
             "log_steps": 1, "eval_steps": 2, "warmup_steps": 1}  # fmt: skip
    recipe = {
        "name": "pets", "model": {"base": str(tiny_decoder), "max_length": 64},
        "mntp": {**stage, "block_length": 16}, "simcse": {**stage, "max_length": 32},
        "evaluate": {"tasks": [str(task)], "bootstrap": 50},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for words in (
        ["run", folder / "recipe.yaml", "-o", folder / "run"],
        ["report", folder / "run"],
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", ["unmasked", *map(str, words)])
            main()
        assert not ended.value.code
    return folder / "run"


def test_one_file_holds_everything(run_folder):
    page = (run_folder / "report.html").read_text()
    for wanted in (
        "Gain over the best causal pooling", "pets.ndcg@10", "learning rate", "Searches among 40",
        "block_length: 16", "unmasked run ", "torch", "causal mean", "Similarity of a few texts",
    ):  # fmt: skip
        assert wanted in page, wanted
    for mark in ("<b>bold</b>", "<!--"):
        assert mark not in page, "a text of the user's was taken for HTML"
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page), "something is loaded from elsewhere"
    names = {"stages-0", "curves-mntp", "curves-simcse", "heatmap-before", "map-after"}
    for suffix in (".png", ".svg"):
        assert names <= {file.stem for file in run_folder.glob(f"figures/*{suffix}")}
    assert len(page) < 2_000_000


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(DataError, match=r"not a run folder.*Fix"):
        write_report(tmp_path)


def test_a_run_without_scores_or_tasks_still_has_a_report(run_folder, tmp_path):
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    recipe["evaluate"]["tasks"] = []
    recipe["supervised"] = {"data": "pairs.jsonl", "steps": 1200}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page = write_report(tmp_path, environment=[("python", "3")]).read_text()
    assert "How it was made" in page and "A map of" not in page
    assert "; mntp 3 steps, simcse 3 steps, supervised 1,200 steps" in page


@pytest.fixture(scope="module", params=["light", "dark"])
def page(request, run_folder, tmp_path_factory):
    if browser.find() is None:
        pytest.skip("no chromium to look with")
    pytest.importorskip("websocket", reason="websocket-client is not installed")
    with browser.Page(tmp_path_factory.mktemp("browser"), dark=request.param == "dark") as opened:
        yield opened


@pytest.mark.parametrize(("width", "phone"), [(1280, False), (390, True)], ids=["desk", "phone"])
def test_in_a_browser(page, run_folder, tmp_path, width, phone):
    page.open(run_folder / "report.html", width, phone=phone)
    page.screenshot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 20_000
    assert page.run("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    assert page.run("document.querySelectorAll('figure svg').length") >= 7
    ink, paper = (
        [int(n) for n in re.findall(r"\d+", page.run(f"getComputedStyle(document.body).{what}"))][
            :3
        ]
        for what in ("color", "backgroundColor")
    )
    assert abs(np.mean(ink) - np.mean(paper)) > 120, "text and page look alike"
    assert (np.mean(paper) < 60) == page.dark
    small = page.run(
        "Math.min(...[...document.querySelectorAll('figure svg text')]"
        ".map(t => t.getBoundingClientRect().height))"
    )
    assert small > 5, "text too small to read"
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []


def test_hover_shows_the_text(page, run_folder):
    page.open(run_folder / "report.html", 1280)
    assert page.run("getComputedStyle(tip).display") == "none"
    page.run("document.getElementById('points-before').scrollIntoView({block: 'center'})")
    time.sleep(0.5)  # the scroll ends, which hides the tip
    box = page.run(
        "(() => { const b = document.querySelectorAll('#points-before use')[3]"
        ".getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()"
    )
    page.move(*box)
    shown = page.run("tip.style.display + '|' + tip.textContent")
    expected = json.loads(
        re.search(r'id="texts">(.*?)</script>', (run_folder / "report.html").read_text())[1]
    )
    assert shown.startswith("block|") and shown.partition("|")[2] in expected
    assert page.run("document.querySelectorAll('use.on').length") == 2, "marked in both maps"
    page.move(1, 1)
    assert page.run("tip.style.display") == "none"
    assert page.errors == []
