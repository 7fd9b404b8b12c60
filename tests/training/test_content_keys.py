"""Content keys: equal while an image stays as it is, different when it changes."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from adpretrain_hf.errors import InputError
from training.content_keys import content_keys


def key_of(path: object = None, data: bytes | None = None) -> str:
    entry: dict[str, Any] = {"bytes": data, "path": None if path is None else str(path)}
    (key,) = content_keys([entry])
    return key


def test_a_file(tmp_path: Path) -> None:
    path, other = tmp_path / "a.png", tmp_path / "b.png"
    for name in (path, other):
        name.write_bytes(b"content")
        os.utime(name, ns=(5, 5))
    before = key_of(path)
    assert before == key_of(path) != key_of(other)
    path.write_bytes(b"changed")
    os.utime(path, ns=(5, 6))
    touched = key_of(path)
    path.write_bytes(b"longer content")
    os.utime(path, ns=(5, 5))
    assert len({before, touched, key_of(path)}) == 3
    path.unlink()
    assert key_of(path).endswith("missing")


def test_bytes() -> None:
    assert key_of(data=b"content") == key_of("some name", b"content") != key_of(data=b"Content")


def test_a_member_of_a_zip(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"

    def key_with(content: bytes) -> str:
        with zipfile.ZipFile(archive, "w") as opened:
            opened.writestr("bolt/OK/1.jpg", content)
        return key_of(f"zip://bolt/OK/1.jpg::{archive}")

    assert key_with(b"content") == key_with(b"content") != key_with(b"Content")
    with pytest.raises(InputError, match="has no member bolt/OK/2.jpg"):
        key_of(f"zip://bolt/OK/2.jpg::{archive}")
    archive.write_bytes(b"no zip")
    with pytest.raises(InputError, match="cannot be read as a zip"):
        key_of(f"zip://bolt/OK/1.jpg::{archive}")


def test_neither_bytes_nor_path() -> None:
    with pytest.raises(InputError, match="neither bytes nor a path"):
        key_of()
