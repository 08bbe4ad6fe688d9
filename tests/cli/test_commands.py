"""What holds for every command: help, imports, how it ends.

Most commands run in this process, through the same entry as the installed script; what hangs on
the process itself (imports, signals, pipes) runs in one of its own.
"""

from __future__ import annotations

import errno
import inspect
import os
import re
import subprocess
import sys

import pytest
from support.commands import COMMAND, heavy_modules_after, listing

from unmasked.cli import main
from unmasked.cli.failures import explain
from unmasked.errors import DataError


def test_help_names_the_verbs():
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    for verb in ("demo", "convert", "run", "train", "encode", "evaluate", "doctor", "recipes"):
        assert re.search(rf"\b{verb}\b", done.stdout)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "-h"], ["recipes", "list"]])
def test_light_verbs_load_nothing_heavy(arguments):
    code = f"""
import sys
sys.argv = ["unmasked", *{arguments}]
from unmasked.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    assert heavy_modules_after(code) == set()


def test_the_choices_are_those_of_the_rooms():
    """The literals stand in the command line, too, for the rooms are not imported for --help."""
    from typing import Literal, get_args, get_origin

    from unmasked.cli import encode_verb, options, training_verbs
    from unmasked.corpus import OUTPUTS, PRECISIONS, Shards
    from unmasked.forward.precision import NAMES
    from unmasked.forward.quantization import KINDS
    from unmasked.recipe.schema import Model, Recipe

    def choices(annotated):
        kind = get_args(annotated)[0]
        return next(get_args(k) for k in (kind, *get_args(kind)) if get_origin(k) is Literal)

    assert get_args(options.Pooling) == get_args(Model.model_fields["pooling"].annotation)
    assert get_args(options.Dtype) == NAMES
    assert choices(encode_verb.PRECISION) == PRECISIONS
    assert {f".{name}" for name in choices(encode_verb.FORMAT)} == set(OUTPUTS)
    assert set(choices(encode_verb.QUANTIZE)) == set(KINDS)
    stage = inspect.get_annotations(training_verbs.train, eval_str=True)["stage"]
    left_out = [name for name, field in Recipe.model_fields.items() if field.default is None]
    assert list(choices(stage)) == left_out
    assert inspect.signature(encode_verb.encode).parameters["shard_rows"].default == Shards().rows


def test_version(cli):
    assert cli("--version") == (0, "unmasked 0.1.0\n", "")


def test_a_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    for arguments in (["recipes", "list"], ["recipes", "show", "nano"], ["--help"]):
        done = subprocess.run([*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE)
        assert done.stderr == b"", arguments
        assert done.returncode in (0, 1), arguments
    os.close(writer)


def test_errors_of_the_user_show_no_traceback_unless_asked(cli, monkeypatch, tmp_path):
    code, out, err = cli("run", "nano", "mntp.stepz=3")
    assert (code, out) == (2, "")
    assert err == (
        "error: mntp.stepz: unknown key, did you mean 'steps'? (override 'mntp.stepz=3')\n"
        "Fix: see what is allowed: unmasked recipes explain mntp\n"
    )
    for arguments in (["--debug", "run", "nano"], ["run", "nano", "--debug"]):
        monkeypatch.setattr(sys, "argv", ["unmasked", *arguments, "mntp.stepz=3"])
        with pytest.raises(ValueError, match=r"mntp\.stepz"):
            main()
    code, _, err = cli("run", "nanoo")
    assert code == 2
    assert "did you mean 'nano'?" in err
    assert not listing(tmp_path)


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["train", "mtnp", "--base", "nano", "--data", "x", "-o", "y"], "mntp"),
        (["train", "SIMCSE", "--base", "nano", "--data", "x", "-o", "y"], "simcse"),
        (["export", "nano", "--to", "onx", "-o", "y"], "onnx"),
        (["encode", "nano", "x", "-o", "y", "--format", "parquett"], "parquet"),
    ],
)
def test_a_choice_that_is_none_names_the_nearest(cli, words, near):
    code, _, err = cli(*words)
    assert code == 2 and f"Did you mean '{near}'?" in err and "Value error" not in err


def test_a_full_disk_is_told_without_a_traceback(cli, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("unmasked.cli.run_display.run_recipe", write)
    code, _, err = cli("run", "nano")
    assert code == 2
    assert err == "error: No space left on device. Fix: make room and run the same command.\n"


@pytest.mark.parametrize(
    ("error", "verb", "code", "message"),
    [
        (KeyboardInterrupt(), "run", 130, "interrupted: nothing new was written; run the same"),
        (KeyboardInterrupt(), "evaluate", 130, "interrupted: finished public tasks are kept"),
        (KeyboardInterrupt(), "convert", 130, "interrupted: nothing was written"),
        (DataError("a.txt is empty."), "run", 2, "error: a.txt is empty."),
        (PermissionError(13, "Permission denied", "a.txt"), "x", 2, "error: a.txt: Permission "),
        (type("OutOfMemoryError", (RuntimeError,), {})(), "x", 2, "error: the device is out of"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe", "a"), "encode", 1, ""),
        (ZeroDivisionError("a fault of ours"), "run", 1, ""),
    ],
)  # fmt: skip
def test_every_error_has_its_end(error, verb, code, message):
    found = explain(error, verb)
    assert found[0] == code and found[1].startswith(message) and bool(found[1]) == bool(message)
    if isinstance(error, OSError) and message:
        assert "Fix: change its permissions, or name another place." in found[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("encode x a.txt -o v --workers 2",
         "--workers 2 has no effect without --engine ray. Fix: add --engine ray, or leave out"),
        ("evaluate x --tasks t.tsv --base nano",
         "--base nano has no effect without --against causal. Fix: add --against causal, or"),
        ("export x --to gguf -o out --opset 18",
         "--opset 18 has no effect without --to onnx. Fix: "),
        ("search a.txt --model x --texts a.txt",
         "--texts goes with vectors, but a.txt holds texts. Fix: leave it out."),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_refused(cli, tmp_path, words, said):
    (tmp_path / "a.txt").write_text("one\n")
    code, _, err = cli(*words.split())
    assert (code, err[: len(said) + 7]) == (2, f"error: {said}")


def test_completion_knows_recipes_and_settings():
    for words, expected in (
        ("unmasked run nano-s", "nano-supervised"),
        ("unmasked run nano mntp.learning", "mntp.learning_rate="),
        ("unmasked train sim", "simcse"),
    ):
        asked = {"_UNMASKED_COMPLETE": "complete_bash", "COMP_WORDS": words,
                 "COMP_CWORD": str(len(words.split()) - 1)}  # fmt: skip
        code = "import sys; sys.argv = ['unmasked']; from unmasked.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **asked},
            capture_output=True,
            text=True,
        )
        assert done.stdout.split() == [expected], done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("encode MODEL a.txt -o v.npy --chunk 8", "vectors only, and a passage needs"),
        ("encode MODEL a.txt -o v.npy --prompt a --prompt-name b", "were both given"),
        ("encode MODEL a.txt -o v.npy --precision int8 --ranges none.npy", "none.npy holds no"),
        ("encode MODEL a.txt -o a.txt/v.npy", "a.txt is not a folder"),
        ("search none.txt --model MODEL words", "none.txt is not a file"),
        ("search a.txt --model MODEL words --prompt a --prompt-name b", "were both given"),
        ("search a.txt --model MODEL words --chunk 4 --overlap 9", "an overlap of 9"),
        ("convert MODEL -o a.txt/v", "a.txt is not a folder"),
        ("convert MODEL -o v --layers 0", "--layers"),
        ("evaluate MODEL --tasks a.tsv --dimensions 0", "--dimensions"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(cli, tmp_path, words, said):
    (tmp_path / "a.txt").write_text("a text\n")
    (tmp_path / "a.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t1\nc\td\t0\ne\tf\t0.5\n")
    before = sorted(tmp_path.iterdir())
    code, _, err = cli(*words.replace("MODEL", "no/such-model").split())
    assert code == 2 and said in err, err
    assert "cannot load no/such-model" not in err
    assert sorted(tmp_path.iterdir()) == before
