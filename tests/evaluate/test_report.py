"""The report of a run, looked at in a browser at the widths of a desk and of a phone."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time

import numpy as np
import pytest
import yaml
from support import browser
from support.tasks import by_text

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra 'report')")

from unmasked.compat.origin import RESULTS
from unmasked.errors import DataError
from unmasked.evaluate.bootstrap import PAIR_METRICS
from unmasked.evaluate.report import searches
from unmasked.evaluate.report.glossary import MEANINGS
from unmasked.evaluate.report.page import _before, write_report
from unmasked.evaluate.report.samples import Query, Sample
from unmasked.recipe.schema import BEFORE, BIDIRECTIONAL, Recipe

MARKS = [
    "& <b>bold</b> <!-- <script>",
    "<script>window.broken = 1</script>",
    "</script><script>window.broken = 1</script>",
    "<!--<script>--><!--</script>",
    "--> --!> <!-- <![CDATA[ ]]>",
    "<img src=x onerror=window.broken=1>",
    "<svg/onload=window.broken=1>",
    "\"><svg onload='window.broken=1'>",
    "' onmouseover='window.broken=1",
    "<iframe src=javascript:window.broken=1></iframe>",
    "<a href=javascript:window.broken=1>x</a>",
    "</title></style></textarea></pre></dl></table><h1>out</h1>",
    "<base href=//elsewhere.invalid><link rel=stylesheet href=//elsewhere.invalid/x>",
    "<meta http-equiv=refresh content=0;url=//elsewhere.invalid>",
    "{{ 7 * 191 }} {% raw %} ${7*191} #{7*191}",
    "&lt;script&gt; &#60;script&#62; \\u003cscript\\u003e",
    '\\";window.broken=1// `${window.broken=1}`',
    "\u2028 \u2029 \u202e turned \u2066 \ufeff \x0b\x7f",
    "<form><input autofocus onfocus=window.broken=1>",
    "<math><mtext></p><style><!--</style><img src=x onerror=window.broken=1>",
]
"""What has broken out of pages: tags, comments, scripts, attributes, templates, escapes."""
TASK = "pets<img src=x onerror=window.broken=1>$x^$"


@pytest.fixture(scope="module")
def run_folder(tiny_decoder, tmp_path_factory):
    """A run of a few steps with a retrieval task, made by the command itself."""
    from unmasked.cli import main

    folder = tmp_path_factory.mktemp("report")
    texts = [f"{word} number {n} {MARKS[n]}" for n in range(20) for word in ("cat", "dog")]
    base = shutil.copytree(tiny_decoder, folder / "<svg onload=window.broken=1>")
    (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    task = folder / TASK
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
        "name": "pets", "model": {"base": str(base), "max_length": 64},
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
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    for wanted in (
        "<h1>run</h1>", "recipe pets", "Gain of the last stage", "the best causal pooling",
        "learning rate", "Searches among 40", "block_length: 16", "unmasked run ", "torch",
        "causal mean", "Similarity of a few texts", "mntp</dt><dd>3 steps, 0:00:0",
        "Masked next token prediction", "How high the wanted documents rank", "Use it",
        "The machine it ran on", "from unmasked import LLM2Vec", "/texts.txt</dd>",
    ):  # fmt: skip
        assert wanted in page, wanted
    scripts = re.findall(r"<script[^>]*>", page)
    assert len(scripts) == 2 and page.count("<!--") == page.count("<!-- Created with") == 0
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page), "something is loaded from elsewhere"
    names = {"stages-0", "curves-mntp", "curves-simcse", "heatmap-before", "map-after"}
    for suffix in (".png", ".svg"):
        assert names <= {file.stem for file in run_folder.glob(f"figures/*{suffix}")}
    assert len(page) < 2_000_000


def test_a_search_shows_what_was_wanted_and_the_shares_of_all(run_folder):
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    assert page.count('<div class="search">') == 4
    assert page.count("<dt>wanted</dt>") == 4 == page.count("<dt>first after</dt>")
    better, worse = map(int, re.findall(r"<b>(\d+) %</b>", page))
    assert better >= 0 and 0 <= worse <= 100 - better


def test_searches_leave_out_the_document_with_the_id_of_the_query():
    documents = [("q", "a"), ("d", "b"), ("e", "c")]
    vectors = {"a": [1, 0], "b": [1, 1], "c": [0, 1]}
    queries = [Query("a", frozenset({1}), 0), Query("c", frozenset({0}), None)]
    sample = Sample([], [], [], queries, documents)
    found = searches.search(sample, by_text(vectors))
    assert [(one.rank, one.first) for one in found] == [(1, 1), (3, 2)]
    told = searches.shares(found, [searches.Search(1, 1), searches.Search(1, 0)])
    assert (told.queries, told.better, told.worse) == (2, 0.5, 0.0)
    assert (told.median, told.first) == ((2.0, 1.0), (0.5, 1.0))


def test_every_stage_and_metric_is_explained():
    metrics = {"ndcg@10", "recall@1", "recall@10", "mrr@10", "map", "v_measure", "accuracy"}
    names = {*PAIR_METRICS, *metrics, BEFORE, BIDIRECTIONAL, "causal", *RESULTS} - {"model"}
    assert set(MEANINGS) == names


def test_a_run_that_began_with_an_open_encoder_says_before_this_stage(run_folder, tmp_path):
    """As it is after `train supervised --base RUN/model` where the decoder is not to be had."""
    folder = tmp_path / "second"
    base = shutil.copytree(run_folder / "model", tmp_path / "first" / "model")
    shutil.copytree(run_folder / "model", folder / "model")
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text(encoding="utf-8"))
    recipe |= {"model": {"base": str(base)}, "mntp": None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (folder / "scores").mkdir()
    stages = json.loads((run_folder / "results.json").read_text(encoding="utf-8"))["stages"]
    kept = [{**stages[3], "name": BEFORE}, stages[-1]]
    (folder / "results.json").write_text(json.dumps({"stages": kept}), encoding="utf-8")
    for old, new in (("bidirectional", BEFORE), ("simcse", "simcse")):
        shutil.copy(run_folder / "scores" / f"{old}.npz", folder / "scores" / f"{new}.npz")
    page = write_report(folder).read_text(encoding="utf-8")
    assert f"simcse over {BEFORE}" in page and f"<td>{BEFORE}" in page
    told = page.replace(MEANINGS[BIDIRECTIONAL], "")
    assert "ausal" not in told[: told.index("How it was made")], "nothing is called causal"


def test_a_run_without_intervals_has_none_in_its_report(run_folder, tmp_path):
    plain = shutil.copytree(run_folder, tmp_path / "plain")
    recipe = yaml.safe_load((plain / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["evaluate"]["bootstrap"] = 0
    (plain / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    page = write_report(plain).read_text(encoding="utf-8")
    for words in ("95 % interval", "chance", "bootstrap interval"):
        assert words not in page, page[page.index(words) - 200 :][:400]
    assert "Highest scores" in page


def test_before_is_loaded_as_the_run_loads_it(tiny_decoder):
    model = {"base": str(tiny_decoder), "layers": 1, "include_instruction": True}
    before = _before(Recipe.model_validate({"name": "x", "model": model}), None)
    assert before.backbone.auto_model.config.num_hidden_layers == 1
    assert not before.settings.skip_instruction


def test_a_stage_that_was_cut_off_says_how_far_it_came(run_folder, tmp_path):
    cut = shutil.copytree(run_folder, tmp_path / "cut")
    (cut / "simcse" / "adapter_config.json").unlink()
    file = cut / "simcse" / "metrics.jsonl"
    kept = [n for n in file.read_text().splitlines() if json.loads(n)["step"] < 3]
    file.write_text("".join(f"{line}\n" for line in kept) + '{"step": 3, "lo')  # and no further
    page = write_report(cut).read_text(encoding="utf-8")
    assert "mntp 3 steps, simcse 2 of 3 steps so far" in page
    assert "simcse</dt><dd>2 of 3 steps so far" in page


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
    assert "; mntp 0 of 3 steps so far, simcse 0 of 3 steps so far, supervised 0 of 1,200" in page


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
    assert page.run("typeof window.broken") == "undefined", "a text was run"
    assert page.run("document.querySelectorAll('script, img, iframe, form, base').length") == 2
    assert page.run("document.querySelectorAll('h1').length") == 1
    assert page.run("texts.length") == 80
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
