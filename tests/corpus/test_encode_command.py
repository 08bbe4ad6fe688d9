"""`unmasked encode` as a user meets it: folders, what is refused, Ctrl-C and the same command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support.commands import COMMAND, hear_interrupts


@pytest.fixture
def cli(cli):
    """Runs `encode` in an empty folder: (exit code, stdout, stderr)."""
    return partial(cli, "encode")


@pytest.fixture
def corpus(tmp_path, sentences) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [{"id": i, "text": text, "year": 2000 + i} for i, text in enumerate(sentences)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "b.jsonl").write_text('{"id": 8, "text": "", "year": 2008}\n')
    (folder / "notes.md").touch()
    return folder


def test_a_folder_of_shards(cli, tiny_decoder, corpus, sentences):
    import pyarrow.parquet as pq

    from unmasked import LLM2Vec

    command = [tiny_decoder, "corpus", "-o", "out", "--keep", "year", "--shard-rows", "4"]
    code, out, err = cli(*command)
    assert (code, out) == (2, "")
    assert "error: corpus/b.jsonl, line 1: an empty text" in err and "--on-error skip" in err
    command += ["--on-error", "skip", "--normalize", "--truncate-dim", "16"]
    code, out, err = cli(*command)
    assert (code, out) == (
        0,
        "8 vectors of 16 numbers in out; 1 rows skipped, listed in out/_manifest.jsonl\n",
    )
    assert "left out, files of another kind: 1 .md (corpus/notes.md)" in err
    assert "encoding 9/9" in err and "texts/s" in err
    table = pq.read_table("out")
    assert table.column_names == ["row", "id", "file", "year", "vector"]
    expected = LLM2Vec.from_pretrained(tiny_decoder, device="cpu").encode(
        sentences, truncate_dim=16, normalize_embeddings=True
    )
    np.testing.assert_allclose(np.array(table["vector"].to_pylist()), expected, atol=1e-5)

    assert cli(*command)[:2] == (0, out)  # done already
    code, _, err = cli(*command, "--prompt", "x")
    assert code == 2 and 'prompt: null there, "x" now' in err
    assert cli(*command, "--prompt", "x", "--overwrite")[0] == 0


def test_many_machines_and_kinds(cli, tiny_decoder, corpus):
    base = [tiny_decoder, "corpus/a.jsonl", "-o", "out/", "--shard-rows", "3"]
    for shard in ("2/2", "1/2"):
        options = ["--format", "npy", "--precision", "int8", "--shard", shard]
        assert cli(*base, *options)[0] == 0
    parts = [np.load(path) for path in sorted(Path("out").glob("part-*"))]
    assert [part.shape for part in parts] == [(3, 32), (3, 32), (2, 32)]
    assert {str(part.dtype) for part in parts} == {"int8"}
    one = [tiny_decoder, "corpus/a.jsonl", "-o", "v.npy", "--precision", "int8"]
    assert cli(*one, "--ranges", "out/_ranges.npy")[0] == 0
    np.testing.assert_array_equal(np.load("v.npy"), np.concatenate(parts))
    assert Path("v.npy.ranges.npy").read_bytes() == Path("out/_ranges.npy").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.txt", "-o", "out"], "nowhere.txt is not a file"),
        (["corpus/notes.md", "-o", "out"], "unknown kind of file. Allowed: .txt, .jsonl"),
        (["corpus/a.jsonl", "-o", "out.csv"], "unknown kind of output. Allowed: .npy, .parquet"),
        (["corpus/a.jsonl", "-o", "v.npy", "--shard", "1/2"], "v.npy is one file"),
        (["corpus/a.jsonl", "-o", "v.npy", "--engine", "ray"], "v.npy is one file"),
        (["corpus/a.jsonl", "-o", "v.npy", "--format", "npy"], "leave out --format"),
        (["corpus/a.jsonl", "-o", "out", "--shard", "3/2"], "i from 1 to n"),
        (["corpus/a.jsonl", "-o", "out", "--keep", "yaer"], "did you mean 'year'"),
        (["corpus", "-o", "corpus/out"], "in the folder that is read"),
        (["corpus/a.jsonl", "-o", "corpus"], "has other files in it (a.jsonl, b.jsonl, notes.md)"),
        (["no/where", "-o", "out"], "cannot be read as a Hugging Face data set"),
    ],
)
def test_what_is_refused(cli, tiny_decoder, corpus, arguments, said, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    code, out, err = cli(tiny_decoder, *arguments)
    assert (code, out) == (2, "")
    assert said in err and "Traceback" not in err
    assert not list(Path("out").glob("part-*")) and not Path("v.npy").exists()


def test_control_c_keeps_whole_shards_and_the_same_command_continues(
    tiny_decoder, sentences, tmp_path
):
    (tmp_path / "a.txt").write_text("\n".join(sentences * 1500) + "\n")
    command = [*COMMAND, "encode", str(tiny_decoder), "a.txt", "-o", "v", "--shard-rows", "512"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
        preexec_fn=hear_interrupts,
    )  # fmt: skip
    while not (tmp_path / "v" / "part-000001.parquet").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.endswith("v has whole shards only; run the same command to continue\n")
    assert not list((tmp_path / "v").glob("*.aside"))
    there = {p: p.stat().st_mtime_ns for p in sorted((tmp_path / "v").glob("part-*"))}
    assert 2 <= len(there) < 24
    there.popitem()  # the last may be in its place and not yet recorded: it is made again
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.stdout == "12,000 vectors of 32 numbers in v\n"
    assert len(list((tmp_path / "v").glob("part-*"))) == 24
    assert all(p.stat().st_mtime_ns == time for p, time in there.items())


def test_control_c_says_what_one_file_keeps(cli, tiny_decoder, corpus, monkeypatch):
    """A folder is continued by the same command, but one file begins again."""
    from unmasked import corpus as room

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "encode_corpus", interrupted)
    code, out, err = cli(tiny_decoder, "corpus/a.jsonl", "-o", "v.npy")
    assert (code, out) == (130, "")
    assert err.endswith(
        "interrupted: nothing was kept; the same command begins again; "
        "a folder (-o NAME/) can be continued\n"
    )
    monkeypatch.setattr(room, "encode_folder", interrupted)
    code, _, err = cli(tiny_decoder, "corpus/a.jsonl", "-o", "v")
    assert code == 130 and err.endswith("run the same command to continue\n")


def test_an_output_that_is_read_is_refused_before_the_model_is_loaded(cli, corpus):
    code, _, err = cli("no-such-model", "corpus", "-o", "corpus/v.npy")
    assert code == 2 and "corpus/v.npy is in the folder that is read. Fix: " in err
    code, _, err = cli("no-such-model", "corpus/a.jsonl", "-o", "corpus/v.npy", "--overwrite")
    assert code == 2 and "in the folder that is read" not in err
