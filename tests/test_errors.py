"""How a program tells what stops it: one line, with the path and what to do."""

from __future__ import annotations

import errno
import io
import sys

import pytest

from adpretrain_hf.errors import InputError, MissingPathError, run_program

ELSEWHERE = "choose another place"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("this\n  and that"), "this and that"),
        (MissingPathError("no such image: a.png"), "no such image: a.png"),
        (OSError("said by us"), "said by us"),
        (OSError(errno.ENOSPC, "-"), f"No space left on device: free some space, or {ELSEWHERE}"),
        (
            FileExistsError(errno.EEXIST, "-", "out"),
            "out: File exists: a file is where a folder has to be: remove it, or",
        ),
        (OSError(errno.EROFS, "-", b"/mnt"), f"/mnt: Read-only file system: {ELSEWHERE}"),
        (PermissionError(errno.EACCES, "-", "a"), f"a: Permission denied: change its permissions, or {ELSEWHERE}"),
    ],
)
def test_what_the_user_can_mend_is_one_line(error, line, capsys):
    def run() -> int:
        raise error

    assert run_program("adpretrain", run) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"adpretrain: error: {line}") and said.count("\n") == 1
    with pytest.raises(type(error)):
        run_program("adpretrain", run, debug=True)


def test_an_interrupted_program_says_how_to_go_on(capsys):
    def run() -> int:
        raise KeyboardInterrupt

    assert run_program("pretrain", run, stopped="--resume goes on") == 130
    assert capsys.readouterr().err == "pretrain: stopped; --resume goes on\n"


def test_what_is_unforeseen_comes_through():
    def run() -> int:
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        run_program("adpretrain", run)


def test_a_terminal_that_lacks_a_character_ends_no_run(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run_program("adpretrain", lambda: print("5 of 5 images: caf\u00e9, \udce9") or 0) == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == b"5 of 5 images: caf\\xe9, \\udce9\n"
