"""A stage that was cut off continues on the texts it began with, or says what differs."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from unmasked.errors import DataError
from unmasked.recipe.schema import Recipe
from unmasked.train.callback import Listener
from unmasked.train.checkpoints import COMPLETE
from unmasked.train.data.record import digest_of, write_facts
from unmasked.train.run import Run

LINES = {
    "texts.txt": [f"the cat sat on mat {i}" for i in range(100)],
    "pairs.jsonl": [
        json.dumps({"query": f"q {i}", "positive": f"p {i}", "negative": f"n {i}"})
        for i in range(100)
    ],
}
STAGES = {
    "mntp": ("texts.txt", {"block_length": 16, "batch_size": 2}),
    "simcse": ("texts.txt", {"batch_size": 4, "max_length": 16}),
    "supervised": ("pairs.jsonl", {"batch_size": 4, "max_length": 16, "warmup_steps": 0}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_other_texts_are_refused_with_the_difference(tiny_decoder, tmp_path, stage):
    name, settings = STAGES[stage]
    path, lines = tmp_path / name, LINES[name]
    path.write_text("\n".join(lines), encoding="utf-8")
    common = {"data": str(path), "steps": 4, "log_steps": 1, "save_steps": 2, "held_out": 0}
    recipe = Recipe.model_validate(
        {"name": "t", "model": {"base": str(tiny_decoder)}, stage: {**common, **settings}}
    )

    def stop(step, steps, measured):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(recipe, tmp_path / "run", None, Listener(step=stop)).run()
    for rows, said in (
        (lines[:90], rf"100 texts then, 90 now; {path} had \d[\d,]* bytes and has"),
        ([line.replace("1", "7") for line in lines], "100 texts, but others"),
    ):
        path.write_text("\n".join(rows), encoding="utf-8")
        told = f"texts of {stage} have changed since its last checkpoint: {said}"
        with pytest.raises(DataError, match=told):
            Run(recipe, tmp_path / "run").run()
    path.write_text("\n".join(lines), encoding="utf-8")
    os.utime(path, ns=(0, 0))  # as after a copy: the texts are the same
    Run(recipe, tmp_path / "run").run()
    assert not list((tmp_path / "run" / stage).glob("checkpoint-*"))


def test_what_was_read_is_compared_only_with_a_checkpoint(tmp_path):
    now = {"source": digest_of(["a", "b"]), "texts": 2, "files": {"a.txt": 4, "b.txt": 9}}
    write_facts(tmp_path, {"source": "other", "texts": 1, "files": {}})
    write_facts(tmp_path, now)  # nothing was trained yet
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / COMPLETE).touch()
    write_facts(tmp_path, now)
    other = now | {"source": digest_of(["b", "a"]), "files": {"a.txt": 5, "c.txt": 9}}
    told = "2 texts, but others; a.txt had 4 bytes and has 5; b.txt is gone; c.txt is new. Fix: "
    with pytest.raises(DataError, match=re.escape(told)):
        write_facts(tmp_path, other)
    many = now | {"source": digest_of(["x"]), "files": {f"{i}.txt": i for i in range(20)}}
    with pytest.raises(DataError, match="and 17 files more"):
        write_facts(tmp_path, many)
    assert json.loads((tmp_path / "data.json").read_text()) == now
    (tmp_path / "data.json").write_text(json.dumps({"source": digest_of(["no sizes then"])}))
    with pytest.raises(DataError, match="texts of"):
        write_facts(tmp_path, now)
    (tmp_path / "data.json").write_text('{"source": "5f0c7e1b2a3d4e5f", "texts": 2}')
    with pytest.raises(DataError, match="an earlier version of this package made the last .* Fix:"):
        write_facts(tmp_path, now)
    shutil.rmtree(tmp_path / "checkpoint-2")
    write_facts(tmp_path, other)
