"""`unmasked data check` on the command line."""

from __future__ import annotations

import json


def test_data_check_reports_and_writes_what_is_left(cli, tmp_path):
    texts = ["one text of the training data", "a text of the test", "One text of the training data"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "sts.tsv").write_text(
        "score\tsentence1\tsentence2\n1\ta text of the test\tb\n2\tc\td\n"
    )
    command = ["data", "check", "a.jsonl", "--against", "sts.tsv"]
    code, out, err = cli(*command)
    assert code == 0, err
    assert "a text of sts.tsv" in out and "exact copy of another row" in out
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "sts.tsv"}
    code, out, err = cli(*command, "--write", "clean.jsonl")
    assert code == 0, err
    assert json.loads((tmp_path / "clean.jsonl").read_text()) == {"text": texts[0]}
    assert len((tmp_path / "clean.removed.jsonl").read_text().splitlines()) == 2
    code, _, err = cli(*command, "--write", "clean.jsonl")
    assert (code, "clean.jsonl exists" in err) == (2, True)
    (tmp_path / "clean.jsonl").unlink()
    code, _, err = cli(*command, "--write", "clean.jsonl")
    assert (code, "clean.removed.jsonl exists" in err) == (2, True)
    assert not (tmp_path / "clean.jsonl").exists()
    code, _, err = cli(*command, "--write", "clean.txt")
    assert (code, "Fix: --write clean.jsonl" in err) == (2, True)
    code, _, err = cli("data", "check", "b.jsonl")
    assert (code, "did you mean 'a.jsonl'?" in err) == (2, True)
