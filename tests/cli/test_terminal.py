"""What is shown while a command works, on a terminal and elsewhere."""

from __future__ import annotations

import pytest

from unmasked.cli import run_display, terminal
from unmasked.cli.tables import show_hits
from unmasked.corpus.search.looking import Hit


@pytest.fixture
def clock(monkeypatch):
    """Seconds that go by only when they are told to."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_come_every_few_seconds_and_at_the_end(capsys, clock):
    with terminal.Line() as line:
        line.begin("encoding")
        for done in (0, 10, 20, 30, 40):
            line.advance(done, 40, f"{done} texts/s")
            clock[0] += 3
        line.begin("saving")
    assert capsys.readouterr().err.splitlines() == [
        "encoding",
        "encoding 0/40  0 texts/s",
        "encoding 20/40  20 texts/s  ETA 0:00:06",
        "encoding 40/40  40 texts/s",
        "saving",
    ]


def test_on_a_terminal_the_line_is_live_and_notes_stay_above(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    with terminal.Line() as line:
        line.begin("mntp [bold]")
        line.note("a note")
        line.advance(1, 2, "loss 1.0")
        line._live.refresh()
    err = capsys.readouterr().err
    assert "a note" in err and "mntp [bold] 1/2  loss 1.0" in err
    assert err.count("\n") < err.count("\r"), "every state of the line is a line of its own"


def test_one_process_of_several_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    terminal.show("twice")
    terminal.say("twice")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    terminal.show("once")
    assert capsys.readouterr().out == "once\n"


@pytest.mark.parametrize(
    ("number", "unit", "shown"),
    [(512, "B", "512 B"), (1234, "B", "1.2 kB"), (6.5e6, "", "6.5 M"), (2e9, "B", "2.0 GB")],
)
def test_short_numbers(number, unit, shown):
    assert terminal.short(number, unit) == shown


def test_a_run_is_told_by_its_newest_measures(capsys, clock):
    with terminal.Line() as line:
        heard = run_display.listener(line)
        heard.stage("mntp")
        heard.step(1, 3, {"loss": 2.0, "eval_loss": 3.0})
        heard.step(3, 3, {"eval_loss": 2.5, "eval_token_loss": 2.75, "tokens_per_second": 1234.5})
        heard.step(3, 3, {"train_runtime": 9.0, "loss": 7.0})
        heard.stage("simcse")
        heard.step(2, 2, {"loss": 0.5})
        heard.scored("simcse", {"sts.spearman": 0.5, "sts.pearson": 0.25, "beir.ndcg@10": 0.125})
    assert capsys.readouterr().err.splitlines() == [
        "mntp",
        "mntp 1/3  loss 2.0000  held-out 3.0000",
        "mntp 3/3  loss 2.0000  held-out 2.7500  1,234 tokens/s",
        "simcse",
        "simcse 2/2  loss 0.5000",
        "simcse: sts.spearman 50.00, beir.ndcg@10 12.50",
    ]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_table_that_is_too_wide_is_told_row_by_row(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    numbers = ["45.11", "[43.20, 47.01]", "+0.12", "[-0.31, 0.62]", "not clear: may be chance"]
    columns = ["metric", "encoder", "score", "95 % interval", "gain", "95 % interval", "is it?"]
    rows = [
        ["sts.spearman", "runs/a-long-name/model", *numbers],
        ["sts.spearman", "nano", "1"] + [""] * 4,
    ]
    terminal.show_table(columns, rows)
    shown = capsys.readouterr().out
    for cell in ("sts.spearman", "runs/a-long-name/model", *numbers):
        assert cell in shown, "a cell was broken"
    assert max(map(len, shown.splitlines())) <= width
    assert ("\n  95 % interval  [43.20" in shown) == (width < 120)


def test_a_text_of_a_corpus_commands_no_terminal(capsys):
    """Escape sequences clear screens, change titles and write to clipboards."""
    show_hits(
        [
            Hit(
                0.5,
                0,
                "\x1b[2Jid\x9b1m",
                None,
                None,
                None,
                "a\x1b]52;c;eA==\x07 text, 한국어 \u200d",
            )
        ]
    )
    assert (
        capsys.readouterr().out == "0.5000  �[2Jid�1m\n        a�]52;c;eA==� text, 한국어 \u200d\n"
    )
