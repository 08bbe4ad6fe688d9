from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml


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
