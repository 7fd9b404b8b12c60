"""Files that are either whole or not there, tensors that fit or are refused, and short identities of both."""

import contextlib
import csv
import hashlib
import io
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adpretrain_hf.errors import BundleError, InputError, MissingPathError, reason

_LONGEST_NAME = 255  # bytes
_SAMPLE = 4096  # values of a tensor that its digest is made of


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` and moves what was written there (a file or a folder) to ``path``.

    If the block raises, the temporary is removed and ``path`` is as it was.

    Raises:
        OSError: it cannot be written; the message names ``path``.
    """
    path = Path(path)
    # Hidden, and with the same ending, for writers that go by it; no longer than names may be.
    temporary = path.with_name(f".{uuid4().hex[:8]}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _default_mode(temporary)
        yield temporary
        for written in [temporary, *temporary.rglob("*")]:
            if written.is_file() and not written.is_symlink():
                with contextlib.suppress(PermissionError):  # some mounts know no permissions
                    written.chmod(mode)
        _replace(temporary, path)
    except InputError:
        raise
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {reason(error)}") from error
    finally:
        with contextlib.suppress(NotADirectoryError):  # then there is none
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


def fitting_name(name: str, suffix: str) -> str:
    """The name of a result of ``name``, shortened and told apart by a digest where file systems would refuse it."""
    folder, slash, last = name.rpartition("/")
    if len(os.fsencode(last + suffix)) <= _LONGEST_NAME:
        return name + suffix
    short = last
    while len(os.fsencode(short)) > 200:
        short = short[:-1]
    return f"{folder}{slash}{short}~{hashlib.sha256(os.fsencode(last)).hexdigest()[:8]}{suffix}"


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be any bytes


def has_content(path: Path) -> bool:
    """Whether a file is there, and not the empty one that is left of it where a machine went down."""
    return path.is_file() and path.stat().st_size > 0


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Writes a CSV file atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def remove(path: Path) -> None:
    """Removes a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file.

    Raises:
        MissingPathError: no such file.
        BundleError: not a whole safetensors file.
    """
    if not Path(path).is_file():
        raise MissingPathError(f"{path} is missing: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} is not a whole safetensors file: {error}") from error


def check_names(
    where: str, found: Iterable[str], expected: Iterable[str], misfits: Collection[str] = (), advice: str = ""
) -> None:
    """Checks that tensors are those that are expected, no more and no less.

    Args:
        where: what errors call them.
        found, expected: their names.
        misfits: what else is wrong with them, such as a shape.
        advice: what to do.

    Raises:
        BundleError: tensors are missing, left over or do not fit; all are listed.
    """
    found, expected = set(found), set(expected)
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing or unexpected or misfits:
        raise BundleError(
            f"{where}: missing {missing}, unexpected {unexpected}, of another shape or kind {sorted(misfits)}"
            f"{advice and ': '}{advice}"
        )


def check_fit(where: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], advice: str = "") -> None:
    """Checks that tensors can take the place of others: their names, their shapes, and that they are floats.

    Raises:
        BundleError: see ``check_names``.
    """
    pairs = [(name, tensor, expected[name]) for name, tensor in tensors.items() if name in expected]
    misfits = [f"{n}: got {tuple(t.shape)}, expected {tuple(e.shape)}" for n, t, e in pairs if t.shape != e.shape]
    misfits += [f"{n}: got {t.dtype}, expected floats" for n, t, _ in pairs if not t.is_floating_point()]
    check_names(where, tensors, expected, misfits, advice)


def check_finite(where: str, tensors: dict[str, Tensor]) -> None:
    """Raises BundleError if any tensor holds NaN or infinity, listing them."""
    # A sum carries every NaN and infinity along and reads the memory once.
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not t.sum(dtype=torch.float32).isfinite()]
    if bad:
        raise BundleError(f"{where}: NaN or infinite values in {bad}; the file is damaged, get it again")


def is_intact(path: Path) -> bool:
    """Whether a file in the Hub client's cache has the checksum that the Hub announced: the name of its blob.

    Large files are named by their sha256, others by git's sha1. Where the cache has no links to blobs (Windows without
    the right to make them) there is nothing to compare with. A file that was found intact is not read again until its
    size or its time changes, which a stamp beside the blob keeps.
    """
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return True
    stamp, state = _stamp_of(blob), f"{blob.stat().st_size} {blob.stat().st_mtime_ns} {blob.name}"
    with contextlib.suppress(OSError):
        if stamp.read_text() == state:
            return True
    intact = (sha256_of if len(blob.name) == 64 else git_sha1_of)(blob) == blob.name
    if intact:
        with contextlib.suppress(OSError):  # a cache may be read-only
            stamp.write_text(state)
    return intact


def _stamp_of(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.intact")


def discard(path: Path) -> None:
    """Removes a cached file, its blob and its stamp."""
    blob = path.resolve()
    for one in (_stamp_of(blob), blob, path):
        one.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The checksum by which the Hub knows a large file."""
    return _digest(path, hashlib.sha256())


def git_sha1_of(path: Path) -> str:
    """The checksum by which the Hub, like git, knows any other file."""
    return _digest(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False))


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> bytes:
    """The identity of one tensor: of its shape and of up to 4,096 of its values, evenly spread.

    float16 and its float32 copy have the same one. It tells trainings apart and costs next to nothing; it is no
    checksum against damage.
    """
    return tensor_digests(tensor, [torch.float32])[0]


def tensor_digests(tensor: Tensor, dtypes: Sequence[torch.dtype]) -> list[bytes]:
    """The ``tensor_digest`` of one tensor as it is when it was rounded to each of some dtypes."""
    values = tensor.detach().flatten()
    sample = values[:: max(1, values.numel() // _SAMPLE)].cpu().contiguous()
    shape = str(tuple(tensor.shape)).encode()
    return [hashlib.sha256(shape + sample.to(dtype).float().numpy().tobytes()).digest() for dtype in dtypes]


def combined_digest(digests: Iterable[bytes]) -> str:
    """16 hex digits for several identities in their order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]
