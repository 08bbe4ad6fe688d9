from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from unmasked.cli import main


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Runs a command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unmasked", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out, err

    return run


@pytest.fixture
def texts(tmp_path, sentences) -> Path:
    path = tmp_path / "texts.txt"
    lines = [f"{number} {text}" for number in range(12) for text in sentences]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tasks(tmp_path, sentences) -> list[str]:
    pairs = [(i, j) for i in range(8) for j in range(i)]
    rows = [f"{(3 * i + j) % 5}\t{sentences[i]}\t{sentences[j]}" for i, j in pairs]
    (tmp_path / "sts.tsv").write_text("score\tsentence1\tsentence2\n" + "\n".join(rows) + "\n")
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "text": text} for i, text in enumerate(sentences)]
    queries = [{"_id": f"q{i}", "text": text[:12]} for i, text in enumerate(sentences)]
    for name, records in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    judged = [f"q{i}\td{i}\t1" for i in range(8)]
    table = "query-id\tcorpus-id\tscore\n" + "\n".join(judged) + "\n"
    (folder / "qrels" / "test.tsv").write_text(table)
    return ["sts.tsv", "beir"]


@pytest.fixture
def recipe(tmp_path, tiny_decoder, texts, tasks) -> Path:
    common = {"data": texts.name, "batch_size": 2, "log_steps": 1}
    path = tmp_path / "recipe.yaml"
    content = {
        "name": "tiny",
        "model": {"base": str(tiny_decoder), "max_length": 64},
        "mntp": {**common, "steps": 3, "block_length": 16, "held_out": 4, "eval_steps": 2},
        "simcse": {**common, "steps": 2, "max_length": 16, "held_out": 0},
        "evaluate": {"tasks": tasks, "bootstrap": 50},
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path
