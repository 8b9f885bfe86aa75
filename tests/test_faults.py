"""Every failure is one line and an exit code: 2 what a person can mend, 1 what the machine or Solon did."""

from __future__ import annotations

import errno
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from typer.testing import CliRunner

from solon.cli import app
from solon.cli.common import guarded
from solon.errors import InputError, Outage, printable
from solon.runs.progress import progress_line
from solon.terminal import Console, harmless, safe_streams

ESCAPES = "\x1b[2J\x9b2J\r\x07\u202e"
STEERING = set("\x1b\x9b\r\x07\u202e")


def failing(error: BaseException) -> Callable[..., Any]:
    def verb(**options: Any) -> None:
        raise error

    return guarded(verb)


def outcome(error: BaseException, capsys: pytest.CaptureFixture[str], **options: Any) -> tuple[int, str, str]:
    with pytest.raises(typer.Exit) as left:
        failing(error)(**options)
    said = capsys.readouterr()
    return left.value.exit_code, said.err, said.out


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (InputError("a.jsonl:3: wrong"), 2, "a.jsonl:3: wrong"),
        (Outage("the server answers no more"), 1, "is kept"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, "/x/y: the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 1, "read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "no permission"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x/y"), 2, "/x/y: no such file or folder"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), 2, "/x: is a folder"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "the disk is full"),
        (MemoryError(), 1, "no memory left"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), 1, "the GPU's memory is full"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1, "no memory left"),
        (KeyboardInterrupt(), 130, "stopped"),
        (ZeroDivisionError("division by zero"), 1, "fault of Solon"),
        (KeyError("x"), 1, "fault of Solon"),
    ],
)
def test_each_failure_is_one_line(error: BaseException, code: int, says: str, capsys: Any) -> None:
    found, err, _ = outcome(error, capsys)
    assert found == code and says in err
    assert err.count("\n") == 1 and "Traceback" not in err


def test_a_failure_writes_nothing_to_stdout(capsys: Any) -> None:
    _, err, out = outcome(InputError("a.jsonl:3: wrong"), capsys, json_=True)
    assert err == "solon: a.jsonl:3: wrong\n" and out == ""


def test_the_traceback_of_a_fault_is_in_a_file_or_shown_on_demand(
    capsys: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("SOLON_API_KEY", "sk-canary-0123456789")
    _, err, _ = outcome(ZeroDivisionError("by sk-canary-0123456789"), capsys)
    [kept] = tmp_path.glob("solon-fault-*.txt")
    assert str(kept) in err and "Traceback" in kept.read_text() and "ZeroDivisionError" in kept.read_text()
    assert "canary" not in kept.read_text() + err
    monkeypatch.setenv("SOLON_DEBUG", "1")
    _, err, _ = outcome(ZeroDivisionError("by sk-canary-0123456789"), capsys)
    assert "Traceback" in err and "canary" not in err


def test_what_others_wrote_never_steers_a_terminal(capsys: Any) -> None:
    _, err, out = outcome(InputError(f"id {ESCAPES} twice"), capsys, json_=True)
    assert not STEERING & set(err + out)
    with safe_streams():
        print(f"finding {ESCAPES}", file=sys.stderr)
    table = Table(title=f"[red]{ESCAPES}")
    table.add_column(f"[bold]{ESCAPES}")
    table.add_row(f"[/not] [link=http://x]a[/link] :smile: {ESCAPES}")
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    console.print(table)
    console.print(f"[red]plain {ESCAPES}")
    assert not STEERING & set(stream.getvalue() + capsys.readouterr().err)
    assert "[link=http://x]a[/link] :smile:" in stream.getvalue() and "[red]plain" in stream.getvalue()


def test_a_terminal_still_gets_colours() -> None:
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system="standard").print("plain", style="red")
    assert "\x1b[31m" in stream.getvalue()


@given(st.text())
def test_printed_json_keeps_its_meaning(text: str) -> None:
    assert json.loads(harmless(json.dumps(text, ensure_ascii=False))) == text
    assert "\n" not in printable(text) and harmless(printable(text)) == printable(text)


def test_usage_errors_are_one_line_too() -> None:
    for line in (["label", "--bad\x1b[2J"], ["nonesuch\x1b[2J"], ["critique", "--limit", "x\x1b[2J"], ["sft"]):
        done = CliRunner().invoke(app, line)
        assert done.exit_code == 2 and "\x1b" not in done.output
        assert done.stderr.count("\n") == 1 and "--help" in done.stderr


def test_a_progress_bar_moves_the_cursor_and_other_text_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with safe_streams():
        console = Console(stderr=True, force_terminal=True)
        with progress_line(console, "stage", 2, "steps") as advance:
            advance(1, {})
            print("\x1b[2J", file=sys.stderr)
            advance(1, {})
    assert "\x1b[2K" in screen.getvalue() and "\x1b[2J" not in screen.getvalue()
    assert "\\u001b[2K" not in screen.getvalue() and "\\u000d" not in screen.getvalue()
