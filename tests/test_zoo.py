"""Every text decoder that transformers has, looked at from all sides (see `zoo`)."""

from __future__ import annotations

import re

import pytest
import torch
import zoo

TABLE = dict(re.findall(r"^\| ([\w-]+) (\|.*)$", zoo.TABLE.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for models this small a second one only waits
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=zoo.FAMILIES)
def found(request):
    return zoo.examine(request.param)


@pytest.fixture
def decoder(found):
    if not found.attentions:
        pytest.skip(f"{found.family}: {found.verdict}")
    return found


@pytest.fixture
def usable(decoder):
    if decoder.verdict == "impossible":
        pytest.skip(f"{decoder.family} is impossible: {decoder.report.reason}")
    return decoder


def test_the_table_says_what_is_found(found):
    """Also fails for a family that a newer transformers brought, until it is in the table."""
    said = TABLE.get(found.family)
    assert said, f"not in docs/models.md: {zoo.row(found)} Run python -m tests.zoo > docs/models.md"
    assert said.split(" | ")[0].strip("| ") == zoo.row(found).split(" | ")[1]


def test_b21_with_the_flag_off_it_is_causal(decoder):
    assert decoder.closed == "impossible"


def test_b21_eager_and_sdpa_agree_unless_the_family_lacks_one(decoder):
    verdicts = {v for v in decoder.attentions.values() if v in ("full", "partial", "impossible")}
    assert decoder.verdict in verdicts
    assert decoder.family in DIFFER or len(verdicts) == 1


def test_b24_states_do_not_depend_on_the_batch(usable):
    assert usable.right < 1e-4
    assert usable.order < 1e-4


def test_packed_vectors_equal_padded_ones(usable):
    assert usable.unpacked or usable.packed < 1e-5


def test_gradient_reaches_the_last_token(usable):
    assert usable.gradient


def test_at_least_a_hundred_families_are_full():
    verdicts = [line.split(" | ")[0] for line in TABLE.values()]
    assert verdicts.count("| full") >= 100


def test_the_table_names_every_family():
    assert set(zoo.FAMILIES) <= set(TABLE)


DIFFER = {"modernbert-decoder"}
"""Families that one of eager and sdpa fails on; `loading` finds the other."""
