"""SlotFile: tensors of one shape in a memory-mapped file that several processes fill and read at once.

Layout: 32 bytes that identify the content, an index of 16 bytes for each slot, then the slots, from a multiple of 4,096
bytes. The file is sparse: a slot that was never written takes no room on the disk.

An index entry is written after its slot and holds the key of what the slot was made of, and its checksum. A slot counts
only if both are right, which is checked when a process first reads it: what has changed, or was left behind by a killed
process or a failing disk, is made again.
"""

import fcntl
import hashlib
import logging
import mmap
import os
import struct
import weakref
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from adpretrain_hf.errors import InputError

_ENTRY = struct.Struct("<QQ")
_WRITTEN = 1 << 32  # tells a checksum of 0 from an entry that was never written
_HEADER = 32
_LOG = logging.getLogger(__name__)


class SlotFile:
    """A fixed number of tensors on the disk.

    Args:
        path: the file, made if it is not there, and anew if it is of other contents.
        identity: what the contents of all slots depend on.
        slots: how many tensors.
        shape: of each.
        dtype: of each.

    Attributes:
        values: (slots, *shape), the file's own memory: read it only, and only slots that ``read`` or ``write`` gave.

    Raises:
        InputError: the file cannot be made or opened.
    """

    def __init__(self, path: Path, *, identity: str, slots: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._name = str(path)
        self._slot_bytes = prod(shape) * dtype.itemsize
        self._start = -(-(_HEADER + slots * _ENTRY.size) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._intact: dict[int, int] = {}
        size = self._start + slots * self._slot_bytes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            weakref.finalize(self, os.close, self._descriptor)
            self._prepare(size, hashlib.sha256(f"{identity} {slots} {shape} {dtype}".encode()).digest())
            self._map = mmap.mmap(self._descriptor, size)  # it is read only; torch warns of maps that are read-only
        except OSError as error:
            raise self._error(f" cannot be opened or written: {error}") from error
        values = torch.frombuffer(self._map, dtype=dtype, offset=self._start, count=slots * prod(shape))
        self.values = values.view(slots, *shape)

    def read(self, slot: int, key: str) -> Tensor | None:
        """The tensor of a slot, in the file's own memory, or None if it is to be written yet, or of another key."""
        digest = _digest(key)
        if self._intact.get(slot) == digest:
            return self.values[slot]
        found, checksum = _ENTRY.unpack(os.pread(self._descriptor, _ENTRY.size, _HEADER + slot * _ENTRY.size))
        # Only written pages may be touched: where a disk is full, reading a hole of a map can end the process.
        if not checksum or found != digest:
            return None
        if checksum != _checksum(self.values[slot]):
            _LOG.warning("%s: the data of slot %d are damaged; they are made again", self._name, slot)
            return None
        self._intact[slot] = digest
        return self.values[slot]

    def write(self, slot: int, key: str, values: Tensor) -> Tensor:
        """Fills a slot and returns it as ``read`` does; another process may do the same at the same time.

        Raises:
            InputError: the disk is full, or fails.
        """
        # Not through the map: where a disk is full, writing to it would end the process.
        digest = _digest(key)
        try:
            self._write_at(self._start + slot * self._slot_bytes, _bytes(values))
            entry = _ENTRY.pack(digest, _checksum(values))
            self._write_at(_HEADER + slot * _ENTRY.size, memoryview(entry))
        except OSError as error:
            raise self._error(f" cannot be opened or written: {error}") from error
        self._intact[slot] = digest
        return self.values[slot]

    def check_room(self, number: int) -> None:
        """Raises InputError if the disk has no room for that many more slots."""
        status = os.fstatvfs(self._descriptor)
        free, needed = status.f_bavail * status.f_frsize, number * self._slot_bytes
        if needed > free:
            raise self._error(f": the disk has {free / 1e9:.3g} GB left, and {needed / 1e9:.3g} GB are to be written")

    def _prepare(self, size: int, identity: bytes) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)  # one process begins the file anew, the others find it
        if os.pread(self._descriptor, _HEADER, 0) != identity or os.fstat(self._descriptor).st_size != size:
            os.ftruncate(self._descriptor, 0)
            os.ftruncate(self._descriptor, size)
            self._write_at(0, memoryview(identity))
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _write_at(self, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            offset, data = offset + written, data[written:]

    def _error(self, what: str) -> InputError:
        size = f"each image takes {self._slot_bytes / 1e6:.3g} MB"
        return InputError(f"{self._name}{what}. Free some room, or choose another folder; {size}")


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().flatten().view(torch.uint8).numpy().data


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


def _checksum(values: Tensor) -> int:
    return _WRITTEN | zlib.crc32(_bytes(values))
