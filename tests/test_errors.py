"""The sentences that errors share: each ends, whatever it names."""

from __future__ import annotations

from unmasked.errors import DataError, OutputError, first_line, nearest, unknown


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
