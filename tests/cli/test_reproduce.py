"""`unmasked reproduce`: the whole path on a tiny decoder, local tasks in the place of MTEB."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from typer.testing import CliRunner

from unmasked.cli import app
from unmasked.recipe.files import as_published, load_recipe, shipped_recipes


@pytest.fixture
def published(recipe, tiny_decoder, texts, monkeypatch, tmp_path):
    """The recipe of a few steps with two published benchmarks, and its data as published."""
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content |= {"evaluate": {"bootstrap": 50}, "published_data": {"mntp": texts.name}}
    content["mntp"]["data"] = []
    anchor = {"base": str(tiny_decoder), "source": "a paper, table 5"}
    content["anchors"] = [
        {**anchor, "benchmark": "One cheap task", "tasks": "sts.tsv",
         "scores": {"causal_mean": 1, "mntp": 100, "mntp+simcse": 12.5, "simcse": 99}},
        {**anchor, "benchmark": "Both (v1)", "tasks": ["sts.tsv", "beir"],
         "scores": {"bidirectional": 35.05, "mntp+simcse": 49.42}},
    ]  # fmt: skip
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    return recipe


def reproduce(*words):
    shown = CliRunner().invoke(app, ["reproduce", *map(str, words)], terminal_width=160)
    assert shown.exit_code == 0, shown.output
    return shown.stdout


def scored(folder, benchmark):
    file = folder / "benchmarks" / benchmark / "results.json"
    return {s["name"]: s["scores"] for s in json.loads(file.read_text(encoding="utf-8"))["stages"]}


def test_ours_stand_beside_the_published_figures_cheapest_benchmark_first(published, tmp_path):
    run = tmp_path / "runs" / "tiny-reproduced"
    out = reproduce(published)
    first = scored(run, "one-cheap-task")
    assert list(first) == ["causal_mean", "mntp", "simcse"], "nothing without a figure is scored"
    assert not (run / "benchmarks" / "both-v1").exists() and not (run / "results.json").exists()
    ours = 100 * first["mntp"]["sts.spearman"]
    (row,) = re.findall(r"^mntp .*$", out, re.MULTILINE)
    assert re.search(rf"{ours:.2f} .*\[.*\].* 100\.00 +{ours - 100:+.2f} +outside", row)
    assert re.search(r"^simcse .* 12\.50 ", out, re.MULTILINE), "not the figure of SimCSE alone"
    assert "One cheap task, mean of 1 tasks; published: a paper, table 5" in out
    assert "also published: Both (v1); the same command with --all" in out
    stamps = {p: p.stat().st_mtime_ns for p in run.glob("*/adapter_model.safetensors")}

    out = reproduce(published, "--all")
    assert len(stamps) == 2 and all(p.stat().st_mtime_ns == t for p, t in stamps.items())
    both = scored(run, "both-v1")
    assert list(both) == ["bidirectional", "simcse"] and scored(run, "one-cheap-task") == first
    mean = 50 * (both["simcse"]["sts.spearman"] + both["simcse"]["beir.ndcg@10"])
    assert re.search(
        rf"^simcse +{mean:.2f} +\[.*\] +49\.42 +{mean - 49.42:+.2f}", out, re.MULTILINE
    )
    assert out.count("nothing to do") == 1 and "also published" not in out
    assert reproduce(published, "--all").count("nothing to do") == 2

    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra 'report')")
    shown = CliRunner().invoke(app, ["report", str(run)])
    assert shown.exit_code == 0, shown.output
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Beside the published figures: Both (v1)" in page and "a paper, table 5" in page
    assert "<dt>scored on</dt><dd>One cheap task, Both (v1)</dd>" in page
    assert f"<td>{mean:.2f}<small>[" in page and "<td>49.42</td>" in page


def test_figures_are_held_only_to_the_base_and_the_stages_they_are_of(published):
    def refused(*overrides):
        shown = CliRunner().invoke(app, ["reproduce", str(published), *overrides])
        assert shown.exit_code == 2
        return " ".join(shown.output.split())

    assert "has no published figures (model.base=nano, stages mntp, simcse)" in refused(
        "model.base=nano"
    )
    assert "its anchors: none at all. Fix: unmasked reproduce sheared-llama-1.3b" in refused(
        "anchors=[]"
    )
    alone = load_recipe(published, ["mntp=null"])
    assert alone.anchors[0].of_stages(["simcse"]) == {"causal_mean": 1, "simcse": 99}


def test_published_texts_fill_only_what_names_none(published):
    recipe = as_published(load_recipe(published, ["simcse.data=mine.txt"]))
    assert (recipe.mntp.data, recipe.simcse.data) == (["texts.txt"], ["mine.txt"])
    assert as_published(load_recipe(published, ["mntp=null"])).mntp is None


PAPER = {
    "sheared-llama-1.3b": [35.05, None, 41.43, 49.42],
    "llama-2-7b": [44.54, None, 45.70, 55.36],
    "mistral-7b": [42.46, 46.86, 49.43, 56.80],
    "llama-3-8b": [43.98, 30.56, 48.84, 56.23],
}
SUPERVISED = {"sheared-llama-1.3b": 61.85, "llama-2-7b": 64.14, "mistral-7b": 64.80}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_56_task_means_stand_in_its_recipes(name):
    recipe = load_recipe(name)
    (whole,) = (a for a in recipe.published() if a.tasks == ["MTEB(eng, v1)"])
    names = ["causal_weighted_mean", "bidirectional", "mntp", "simcse"]
    expected = {n: v for n, v in zip(names, PAPER[name], strict=True) if v is not None}
    assert whole.of_stages(["mntp", "simcse"]) == expected
    assert list(as_published(recipe).published_data) == ["mntp", "simcse"]
    mixed = load_recipe("e5-public", [f"model.base={recipe.model.base}"])
    (supervised,) = mixed.published()
    figure = supervised.of_stages(["mntp", "supervised"])["supervised"]
    assert figure == SUPERVISED.get(name, 65.01)


def test_anchors_are_of_the_base_of_their_recipe_or_of_the_e5_mix():
    for name in shipped_recipes():
        recipe = load_recipe(name)
        if name != "e5-public":
            assert recipe.published() == recipe.anchors, name
        assert recipe.model.licence or name in ("nano", "nano-supervised", "distil"), name


def test_another_base_has_not_the_licence_of_the_one_before():
    assert load_recipe("mistral-7b").model.licence == "apache-2.0"
    assert load_recipe("mistral-7b", ["model.base=mine"]).model.licence is None
