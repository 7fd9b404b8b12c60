"""SlotFile: tensors of one shape in a memory-mapped file that several processes fill and read at once.

Layout: 32 bytes that identify the content, an index of 8 bytes for each slot, then the slots, from a multiple of 4,096
bytes. The file is sparse: a slot that was never written takes no room on the disk.

An index entry is written after its slot and holds the slot's checksum. Whatever a process that was killed, a machine
that crashed or a failing disk left behind, a slot counts only if its data are those that were meant; it is checked when
a process reads it for the first time.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import struct
import tempfile
import weakref
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from adpretrain_hf.errors import InputError

_ENTRY = struct.Struct("<Q")
_WRITTEN = 1 << 32  # tells a checksum of 0 from an entry that was never written
_HEADER = 32
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOG = logging.getLogger(__name__)


class SlotFile:
    """A fixed number of tensors on the disk.

    Args:
        path: the file, made if it is not there; None for one without a name in the system's folder for temporary files
            (``TMPDIR``), which is gone with the process, however that ends.
        identity: 64 hex digits: what the content depends on.
        slots: how many tensors.
        shape: of each.
        dtype: of each.

    Raises:
        InputError: the file cannot be made or opened, or is not what it should be.
    """

    def __init__(
        self, path: Path | None, *, identity: str, slots: int, shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        self._name = str(path or f"a temporary file in {tempfile.gettempdir()}")
        self._slot_bytes = prod(shape) * dtype.itemsize
        self._start = -(-(_HEADER + slots * _ENTRY.size) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._intact: set[int] = set()
        size = self._start + slots * self._slot_bytes
        try:
            self._descriptor = _open(path)
            weakref.finalize(self, os.close, self._descriptor)
            self._prepare(size, bytes.fromhex(identity))
            self._map = mmap.mmap(self._descriptor, size)  # it is read only; torch warns of maps that are read-only
        except OSError as error:
            raise self._explained(error) from error
        values = torch.frombuffer(self._map, dtype=dtype, offset=self._start, count=slots * prod(shape))
        self._values = values.view(slots, *shape)

    def read(self, slot: int) -> Tensor | None:
        """The tensor of a slot, in the file's own memory (do not write to it), or None if it is to be written yet."""
        if slot in self._intact:
            return self._values[slot]
        (entry,) = _ENTRY.unpack(os.pread(self._descriptor, _ENTRY.size, _HEADER + slot * _ENTRY.size))
        # Only written pages may be touched: where a disk is full, reading a hole of a map can end the process.
        if not entry:
            return None
        if entry != _checksum(self._values[slot]):
            _LOG.warning("%s: the data of slot %d are damaged; they are made again", self._name, slot)
            return None
        self._intact.add(slot)
        return self._values[slot]

    def write(self, slot: int, values: Tensor) -> Tensor:
        """Fills a slot and returns it as ``read`` does; another process may do the same at the same time.

        Raises:
            InputError: the disk is full, or fails.
        """
        # Not through the map: where a disk is full, writing to it would end the process.
        try:
            self._write_at(self._start + slot * self._slot_bytes, _bytes(values))
            entry = _ENTRY.pack(_checksum(values))
            self._write_at(_HEADER + slot * _ENTRY.size, memoryview(entry))
        except OSError as error:
            raise self._explained(error) from error
        self._intact.add(slot)
        return self._values[slot]

    def check_room(self, number: int) -> None:
        """Raises InputError if the disk has no room for that many more slots."""
        status = os.fstatvfs(self._descriptor)
        free, needed = status.f_bavail * status.f_frsize, number * self._slot_bytes
        if needed > free:
            raise InputError(
                f"{self._name}: the disk has {free / 1e9:.3g} GB left, and {needed / 1e9:.3g} GB of references are to "
                f"be written. {self._remedy()}"
            )

    def _prepare(self, size: int, identity: bytes) -> None:
        # Every process does all of this, in any order and at the same time: it comes to the same file.
        if os.fstat(self._descriptor).st_size == 0:
            os.ftruncate(self._descriptor, size)
        header = os.pread(self._descriptor, _HEADER, 0)
        if header == bytes(_HEADER):
            self._write_at(0, memoryview(identity))
            header = identity
        found = os.fstat(self._descriptor).st_size
        if found != size or header != identity:
            what = f"has {found} bytes, expected {size}" if found != size else "does not begin with its identity"
            raise InputError(f"{self._name} is damaged, or no reference cache: it {what}. Delete it, it is made again")

    def _write_at(self, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            offset, data = offset + written, data[written:]

    def _explained(self, error: OSError) -> InputError:
        if error.errno in _FULL:
            return InputError(f"{self._name} cannot be written, the disk is full: {error}. {self._remedy()}")
        return InputError(
            f"{self._name} cannot be opened or written: {error}. Choose another folder for the references"
        )

    def _remedy(self) -> str:
        return (
            f"Free some room (references-*.bin beside it are of other runs), draw from fewer images, or choose another "
            f"folder; an image's references take {self._slot_bytes / 1e6:.3g} MB"
        )


def _open(path: Path | None) -> int:
    if path is None:
        with tempfile.TemporaryFile(prefix="references-") as file:
            return os.dup(file.fileno())
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().flatten().view(torch.uint8).numpy().data


def _checksum(values: Tensor) -> int:
    return _WRITTEN | zlib.crc32(_bytes(values))
