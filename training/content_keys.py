"""Short texts that change when the content of an image does, without reading any image."""

from __future__ import annotations

import functools
import hashlib
import os
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

from adpretrain_hf.errors import InputError


def content_keys(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """One key for each image.

    A file goes by its path, size and time of change, a member of a zip by its name, size and checksum in the zip's
    directory, bytes by their sha256.

    Args:
        entries: of an ``Image(decode=False)`` column: ``bytes``, or the ``path`` of a file or of a zip's member,
            ``zip://<member>::<zip>``.

    Raises:
        InputError: a zip cannot be read, or lacks a member.
    """
    directories = functools.cache(_directory)  # each zip's is read once, and forgotten when the keys are made
    return [_key(entry, directories) for entry in entries]


def _key(entry: Mapping[str, Any], directories: Any) -> str:
    if entry["bytes"] is not None:
        return f"bytes {hashlib.sha256(entry['bytes']).hexdigest()}"
    path = entry["path"]
    if path is None:
        raise InputError("an image has neither bytes nor a path: expected one of them")
    if not path.startswith("zip://"):
        return _file_key(path)
    member, _, archive = path.removeprefix("zip://").partition("::")
    if member not in directories(archive):
        raise InputError(f"{archive} has no member {member}: it is another zip than the one the data set was made from")
    return f"{path} {directories(archive)[member]}"


def _file_key(path: str) -> str:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return f"{path} missing"  # an error only when it is read
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _directory(archive: str) -> dict[str, str]:
    try:
        with zipfile.ZipFile(archive) as opened:
            return {member.filename: f"{member.file_size} {member.CRC:08x}" for member in opened.infolist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{archive} cannot be read as a zip: {error}") from error
