"""The sentences that errors share: each ends, whatever it names."""

from __future__ import annotations

import copy
import pickle

import pytest

from unmasked.errors import (
    DataError,
    MissingExtraError,
    NotBidirectionalError,
    OutputError,
    first_line,
    nearest,
    unknown,
)
from unmasked.export.exporting import DifferentVectorsError
from unmasked.export.remote import Refused


def test_a_word_that_is_unknown_names_the_nearest_and_all_allowed_ones():
    allowed = ["nano", "mistral-7b"]
    said = "unknown recipe 'nan', did you mean 'nano'? Allowed: nano, mistral-7b."
    assert unknown("recipe", "nan", allowed) == said
    assert unknown("recipe", "zzz", allowed) == "unknown recipe 'zzz'. Allowed: nano, mistral-7b."
    assert nearest("zzz", allowed) == "." and nearest("zzz", allowed, end="") == ""


def test_the_first_line_of_an_error_is_its_message_or_its_type():
    assert first_line(ValueError("\n a\nb")) == "a"
    assert first_line(DataError("")) == "DataError"
    assert str(OutputError("there is no room.")) == "there is no room."


@pytest.mark.parametrize(
    "error",
    [
        DataError("a file."),
        OutputError("a disk."),
        MissingExtraError("ray", "corpus"),
        NotBidirectionalError("a layer.", {"verdict": "impossible"}),
        DifferentVectorsError("a vector.", None),
        Refused("a server.", 429),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_back_whole_from_another_process(error):
    """A pool of workers hands it on pickled; one that cannot be read there is waited for."""
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error) and str(again) == str(error)
        assert vars(again) == vars(error) and again.args == error.args
