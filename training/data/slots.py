"""SlotFile: tensors of one shape in a memory-mapped file that several processes fill and read at once.

Layout: an index of 8 bytes for each slot, then the slots, from a multiple of 4,096 bytes. The file is sparse: a slot
that was never written takes no room on the disk.

An index entry is written after its slot and holds its checksum. A slot counts only if that is right, which is checked
when a process first reads it: what was left behind by a killed process or a failing disk is made again. Other runs may
have the file mapped: it is never made shorter, and what its slots depend on is in its name (``identified``).
"""

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

_ENTRY = struct.Struct("<Q")
_WRITTEN = 1 << 32  # tells a checksum of 0 from an entry that was never written
_LOG = logging.getLogger(__name__)


class SlotFile:
    """A fixed number of tensors on the disk.

    Args:
        path: the file, made if it is not there; see ``identified``.
        slots: how many tensors.
        shape: of each.
        dtype: of each.

    Attributes:
        values: (slots, *shape), the file's own memory: read it only, and only slots that ``read`` or ``write`` gave.

    Raises:
        InputError: the file cannot be made or opened.
    """

    def __init__(self, path: Path, *, slots: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._name = str(path)
        self._slot_bytes = prod(shape) * dtype.itemsize
        self._start = -(-slots * _ENTRY.size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._intact: set[int] = set()
        size = self._start + slots * self._slot_bytes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            weakref.finalize(self, os.close, self._descriptor)
            os.ftruncate(self._descriptor, size)  # a whole file stays as it is
            self._map = mmap.mmap(self._descriptor, size)  # it is read only; torch warns of maps that are read-only
        except OSError as error:
            raise self._error(f" cannot be opened or written: {error}") from error
        values = torch.frombuffer(self._map, dtype=dtype, offset=self._start, count=slots * prod(shape))
        self.values = values.view(slots, *shape)

    def read(self, slot: int) -> Tensor | None:
        """The tensor of a slot, in the file's own memory, or None if it is to be written yet."""
        if slot in self._intact:
            return self.values[slot]
        (checksum,) = _ENTRY.unpack(os.pread(self._descriptor, _ENTRY.size, slot * _ENTRY.size))
        # Only written pages may be touched: where a disk is full, reading a hole of a map can end the process.
        if not checksum:
            return None
        if checksum != _checksum(self.values[slot]):
            _LOG.warning("%s: the data of slot %d are damaged; they are made again", self._name, slot)
            return None
        self._intact.add(slot)
        return self.values[slot]

    def write(self, slot: int, values: Tensor) -> Tensor:
        """Fills a slot and returns it as ``read`` does; another process may do the same at the same time.

        Raises:
            InputError: the disk is full, or fails.
        """
        # Not through the map: where a disk is full, writing to it would end the process.
        try:
            self._write_at(self._start + slot * self._slot_bytes, _bytes(values))
            self._write_at(slot * _ENTRY.size, memoryview(_ENTRY.pack(_checksum(values))))
        except OSError as error:
            raise self._error(f" cannot be opened or written: {error}") from error
        self._intact.add(slot)
        return self.values[slot]

    def check_room(self, number: int) -> None:
        """Raises InputError if the disk has no room for that many more slots."""
        status = os.fstatvfs(self._descriptor)
        free, needed = status.f_bavail * status.f_frsize, number * self._slot_bytes
        if needed > free:
            raise self._error(f": the disk has {free / 1e9:.3g} GB left, and {needed / 1e9:.3g} GB are to be written")

    def _write_at(self, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            offset, data = offset + written, data[written:]

    def _error(self, what: str) -> InputError:
        size = f"each image takes {self._slot_bytes / 1e6:.3g} MB"
        return InputError(f"{self._name}{what}. Free some room, or choose another folder; {size}")


def identified(path: Path, *identity: object) -> Path:
    """A path with a digest in its name of what the file's slots depend on: runs that differ in it have files apart."""
    digest = hashlib.sha256(repr(identity).encode(errors="surrogateescape")).hexdigest()
    return path.with_name(f"{path.stem}-{digest[:16]}{path.suffix}")


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().flatten().view(torch.uint8).numpy().data


def _checksum(values: Tensor) -> int:
    return _WRITTEN | zlib.crc32(_bytes(values))
