"""The sentences that errors share: each ends, whatever it names."""

from __future__ import annotations

import copy
import errno
import os
import pickle
from pathlib import Path

import pytest
from support.raised import RaisedErrors

from unmasked.cli.failures import explain
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
    rest = "Allowed: nano, mistral-7b. Fix: give one of these."
    near = "unknown recipe 'nan', did you mean 'nano'?"
    assert unknown("recipe", "nan", allowed) == f"{near} {rest}"
    assert unknown("recipe", "zzz", allowed) == f"unknown recipe 'zzz'. {rest}"
    none = "unknown recipe 'zzz'. There is none. Fix: leave it out."
    assert unknown("recipe", "zzz", []) == none
    assert nearest("NANO", allowed) == ", did you mean 'nano'?", "in capitals"
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
        DifferentVectorsError("a vector."),
        Refused("a server.", 429),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_back_whole_from_another_process(error):
    """A pool of workers hands it on pickled; one that cannot be read there is waited for."""
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error) and str(again) == str(error)
        assert vars(again) == vars(error) and again.args == error.args


ELSEWHERE = {
    "compat/seed.py: raise RecipeError(f'--{flag} {value}: {reason}')": "REFUSED holds it",
    "corpus/ray.py: raise kinds.get(returned['error'], errors.ModelError)(returned['message'])": (
        "a worker's own error"
    ),
    "evaluate/scorer.py: raise DataError(f'task {name}: {error}') from error": "the task's error",
    "export/exporting.py: raise DifferentVectorsError(f'{found.engine} could not be compared: "
    "{found.notes[-1]}, or --accept, to keep the export all the same.')": "how to install it",
    "export/verifying.py: raise DataError(f'every text was refused. {notes[0]}')": (
        "what the server answered"
    ),
    "files/writing.py: raise OutputError(taken) from error": "each caller's own fix",
    "recipe/files.py: raise RecipeError('\\n'.join([*problems, *_explained_by(error, problems)])) "
    "from None": "the last line says which command explains the settings",
    "serve/served_model.py: raise Refusal(400, str(error), 'invalid_input') from None": (
        "the encoder's error"
    ),
}
"""Errors whose fix is in what they pass on."""


def test_every_error_that_a_user_meets_names_a_fix(tmp_path):
    """In the source, so that one that no test provokes counts as well."""
    writes = ("fault_error", "FaultyCell", "MissingExtraError")
    source = Path(__file__).parents[1] / "src" / "unmasked"
    found = RaisedErrors(source, ["UnmaskedError", "Refusal"], writes)
    assert {"DataError", "DifferentVectorsError", "Refused"} <= found.users
    assert found.without_fix() == sorted(ELSEWHERE)

    (tmp_path / "bad.py").write_text(
        "def one(x):\n    said = f'{x} is bad'\n    raise DataError(said)\n"
        "def two(x):\n    said = 'Fix: mend it.'\n    raise DataError(f'{x}. {said}')\n"
        "def three() -> DataError:\n    return DataError('no way')\n"
        "def four():\n    raise three()\n"
    )
    assert RaisedErrors(tmp_path, ["DataError"], []).without_fix() == [
        "bad.py: raise DataError(said)",
        "bad.py: raise three()",
    ]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EISDIR, errno.EACCES, errno.EIO])
def test_an_error_of_the_operating_system_names_the_file_and_a_fix(number):
    code, said = explain(OSError(number, os.strerror(number), "a.txt"), "encode")
    assert (code, said.startswith(f"error: a.txt: {os.strerror(number)}. Fix: ")) == (2, True)
