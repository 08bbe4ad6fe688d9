"""Does the memory of `encode` grow with the corpus? The peak of a process at several sizes.

A tiny random model, so that a million rows take a minute or so and what is measured is the way of
the data: reading, windows, writing, the manifest. Each size runs in a process of its own, whose
peak resident memory the system keeps.

    python benchmarks/memory.py                   # 100 thousand and 1 million rows
    python benchmarks/memory.py --rows 10000 20000
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    "the",
    "of",
    "a",
    "model",
    "reads",
    "words",
    "and",
    "sees",
    "what",
    "stands",
    "on",
    "either",
    "side",
    "of",
    "them",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--format", default="parquet", choices=["parquet", "npy", "safetensors"])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # what each process is given
    options = parser.parse_args()
    if options.one:
        encode(*options.one)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        print(
            "| rows | shards | peak after the first shard, MiB | peak at the end, MiB | seconds |"
        )
        print("|---|---|---|---|---|")
        for rows in options.rows:
            write_texts(folder / "texts.txt", rows)
            command = [sys.executable, __file__, "--one", str(folder), str(rows), options.format]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            facts = json.loads(said.splitlines()[-1])
            print(
                f"| {rows:,} | {facts['shards']} | {facts['first']:,.0f} | {facts['peak']:,.0f} "
                f"| {facts['seconds']:,.0f} |",
                flush=True,
            )


def make_model(folder: Path) -> None:
    """A random Llama of one layer and width 32, with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *dict.fromkeys(WORDS), *map(str, range(100))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_texts(path: Path, rows: int) -> None:
    """Different texts of 3 to 12 words, a line each."""
    with path.open("w") as file:
        for row in range(rows):
            digits = f"{row // 10000 % 100} {row // 100 % 100} {row % 100}"
            file.write(f"{digits} {' '.join(WORDS[row % 5 : row % 5 + row % 10])}\n")


def encode(folder: str, rows: str, kind: str) -> None:
    """One size, in this process; prints its facts as JSON."""
    from unmasked import LLM2Vec
    from unmasked.corpus import Encoding, Local, Shards, encode_folder
    from unmasked.files.source import Source

    root = Path(folder)
    model = LLM2Vec.from_pretrained(root / "model", device="cpu")
    output, first, begun = root / f"vectors-{rows}", 0.0, time.monotonic()
    shards = Shards(f".{kind}")

    def told(done: int, tokens: int | None) -> None:
        nonlocal first
        if done <= shards.rows:
            first = peak()

    encode_folder(
        Local(lambda: model),
        Source(str(root / "texts.txt")),
        output,
        Encoding(batch_size=1024),  # the model is nothing; large forwards save time
        shards,
        begin=lambda done, total: told,
    )
    facts = {
        "shards": len(list(output.glob("part-*"))),
        "first": first,
        "peak": peak(),
        "seconds": time.monotonic() - begun,
    }
    print(json.dumps(facts))


def peak() -> float:
    """Of this process, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # what the system counts otherwise has the parent in it, too
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1024 if sys.platform == "linux" else used / 1024**2


if __name__ == "__main__":
    main()
