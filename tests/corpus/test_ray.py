"""The engine of many processes, on a real cluster of this machine's own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from support.shard_folders import contents

from unmasked.corpus import Encoding, Local, OnRay, Shards, encode_folder
from unmasked.corpus.ray import share_of_worker
from unmasked.errors import DataError
from unmasked.files.source import Source


@pytest.mark.slow
def test_ray_writes_the_same_bytes(tiny_decoder, many_texts, tmp_path):
    """A real cluster of this machine's own: two actors, the folder of one process."""
    pytest.importorskip("ray", reason="the extra 'corpus' is not installed")
    import torch

    from unmasked import LLM2Vec

    def load():
        return LLM2Vec.from_pretrained(tiny_decoder, max_length=32, device="cpu")

    torch.set_num_threads(1)
    source = Source(str(many_texts(700)), max_bytes=2000)
    shards, encoding = Shards(rows=96, window=32, skip=True), Encoding(precision="int8")
    here, there = tmp_path / "here", tmp_path / "there"
    expected = encode_folder(Local(load), source, here, encoding, shards)
    with OnRay(load, workers=2, threads=1) as engine:
        assert encode_folder(engine, source, there, encoding, shards) == expected
        assert contents(there) == contents(here)
        # What is missing is made again, and nothing else.
        (there / "part-000003.parquet").unlink()
        before = (there / "part-000002.parquet").stat().st_mtime_ns
        encode_folder(engine, source, there, encoding, shards)
        assert contents(there) == contents(here)
        assert (there / "part-000002.parquet").stat().st_mtime_ns == before
        with pytest.raises(DataError, match="line 6: an empty text"):
            encode_folder(engine, source, tmp_path / "x", encoding, Shards(rows=96))
        with pytest.raises(DataError, match="truncate_dim 99"):
            encode_folder(engine, source, tmp_path / "x", Encoding(truncate_dim=99), shards)
        with pytest.raises(DataError, match="cannot be shared among workers"):
            encode_folder(engine, Source("-"), tmp_path / "x", None, shards)


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ([{"CPU": 8}], 2, (4, 0)),
        ([{"CPU": 8}] * 3, 2, (8, 0)),  # not 24 // 2: no node has 12
        ([{"CPU": 8}] * 3, 4, (4, 0)),
        ([{"CPU": 2}], 5, (1, 0)),
        ([{"CPU": 8, "GPU": 2}], 2, (4, 1)),
        ([{"CPU": 8, "GPU": 2}], 3, (2, 1 / 2)),  # not 2 / 3: each would need a GPU of its own
        ([{"CPU": 8, "GPU": 1}, {"CPU": 64}], 2, (4, 1 / 2)),
    ],
)
def test_all_workers_fit_into_the_nodes(nodes, workers, expected):
    assert share_of_worker(nodes, workers) == expected


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_local_cluster_listens_on_the_loopback_interface_alone():
    """In a process of its own, as Ray reads its environment when it is imported."""
    pytest.importorskip("ray", reason="the extra 'corpus' is not installed")
    code = """
        import os
        from pathlib import Path
        from unmasked.corpus import OnRay
        def sockets():  # of all processes that were started from here
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    if b"LISTENING_TEST=1" in (process / "environ").read_bytes():
                        yield from {os.readlink(handle) for handle in (process / "fd").iterdir()}
                except OSError:
                    pass
        with OnRay(lambda: None):
            ours = {name.strip("socket:[]") for name in sockets() if name.startswith("socket:")}
            for kind in ("tcp", "tcp6"):
                for line in Path("/proc/net", kind).read_text().splitlines()[1:]:
                    _, address, _, state, *_, inode = line.split()[:10]
                    if state == "0A" and inode in ours:
                        print(address.rpartition(":")[0])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"LISTENING_TEST": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    loopback = {"0100007F", "0" * 16 + "FFFF00000100007F"}  # 127.0.0.1 in IPv4 and in IPv6
    assert done.stdout.split() and {*done.stdout.split()} <= loopback
