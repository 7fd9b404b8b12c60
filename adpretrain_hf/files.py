"""Files that are either whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from adpretrain_hf.errors import InputError


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` and moves what was written there (a file or a folder) to ``path``.

    If the block raises, the temporary is removed and ``path`` is as it was.

    Raises:
        OSError: it cannot be written; the message names ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, and with the same ending, for writers that go by it; no longer than names may be.
    temporary = path.with_name(f".{uuid4().hex[:8]}{path.suffix}")
    try:
        mode = _default_mode(temporary)
        yield temporary
        for written in [temporary, *temporary.rglob("*")]:
            if written.is_file() and not written.is_symlink():
                written.chmod(mode)
        _replace(temporary, path)
    except InputError:
        raise
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        remove(temporary)


def _replace(temporary: Path, path: Path) -> None:
    if not (temporary.is_dir() and path.exists()):
        os.replace(temporary, path)
        return
    aside = temporary.with_name(f"{temporary.name}.old")  # a folder can only be renamed to a free name
    os.replace(path, aside)
    os.replace(temporary, path)
    remove(aside)


def _default_mode(probe: Path) -> int:
    """The permissions that the user's umask gives; some writers leave files that only their owner can read."""
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be any bytes


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Writes a CSV file atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def remove(path: Path) -> None:
    """Removes a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
