from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
from support.given_files import give


@pytest.fixture(scope="session")
def model(tiny_decoder):
    """Shared by all tests of corpora: nobody may change it."""
    from unmasked import LLM2Vec

    return LLM2Vec.from_pretrained(tiny_decoder, max_length=32, device="cpu")


@pytest.fixture
def given(tmp_path):
    return partial(give, tmp_path)


@pytest.fixture
def many_texts(tmp_path, sentences) -> Path:
    def write(count: int) -> Path:
        picked = random.Random(1)
        lines = [" ".join(picked.choices(sentences, k=picked.randint(1, 3))) for _ in range(count)]
        lines[5::97] = ["" for _ in lines[5::97]]
        (tmp_path / "many.txt").write_text("\n".join(lines) + "\n")
        return tmp_path / "many.txt"

    return write
