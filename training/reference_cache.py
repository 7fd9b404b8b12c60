"""ReferenceCache: the patches of reference images, each image encoded once.

Backbone and reference images never change in a training, yet the released code encodes references anew for every use,
which is about two thirds of its compute.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from adpretrain_hf.errors import InputError
from training.free_memory import free_memory
from training.reference_encoding import OnUnreadable, ReferenceEncoder
from training.slot_file import SlotFile

_SHARE = 4  # one part in so many of the free memory is taken


class ReferenceCache:
    """Keeps the patches of images in memory and, beyond that, in a memory-mapped file.

    They are bit for bit what encoding the image again and rounding to the encoder's dtype gives. The first images that
    are asked for stay in memory until it is full: draws are uniform, so none of them is worth more than another.

    With a folder, everything is also written there, for later runs and for the processes of this machine that share the
    training. The file's name follows from what the numbers depend on (backbone, precision, the images' keys): where any
    of that has changed, another file is made. Without a folder, the file has no name and is gone with the process.

    Args:
        encoder: encodes what is missing.
        keys: for every position of the data set, a text that changes when the content of its image does.
        memory_bytes: of this process; by default a quarter of the free memory, shared with the processes that
            ``torchrun`` started on this machine (``LOCAL_WORLD_SIZE``).
        folder: where the file is kept between runs.
        device: where ``get`` puts its result; by default the encoder's.

    Attributes:
        encoded: how many images this object has encoded.

    Raises:
        InputError: ``memory_bytes`` below 0, or the file cannot be used.
    """

    def __init__(
        self,
        encoder: ReferenceEncoder,
        keys: Sequence[str],
        *,
        memory_bytes: int | None = None,
        folder: str | Path | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if memory_bytes is not None and memory_bytes < 0:
            raise InputError(
                f"memory_bytes is {memory_bytes}, expected at least 0, or None for a share of what is free"
            )
        if not keys:
            raise InputError("got no keys: expected one for every image of the data set")
        if memory_bytes is None:
            memory_bytes = free_memory() // _SHARE // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        levels, k, c = encoder.shape
        self._encoder, self._number = encoder, len(keys)
        self._device = torch.device(device or encoder.device)
        self._room = memory_bytes // (levels * k * c * encoder.dtype.itemsize)  # in images
        self._memory: dict[int, Tensor] = {}
        self._identity = _identity(encoder.fingerprint, keys)
        self._path = None if folder is None else Path(folder) / f"references-{self._identity[:16]}.bin"
        self._file = None if folder is None else self._open_file()
        self._lock = threading.Lock()
        self.encoded = 0

    def get(self, positions: Sequence[int]) -> list[Tensor]:
        """The patches of images below each other; what is missing is encoded and kept.

        Args:
            positions: n positions in the data set, in any order, also repeated.

        Returns:
            L tensors (n*K, C) in the encoder's dtype. The copy to a GPU is not waited for.

        Raises:
            ImageError: an image cannot be read.
            InputError: a position outside the data set, or the disk is full.
        """
        found = self._find_or_encode(positions)
        return below_each_other([found[position] for position in positions], self._encoder, self._device)

    def fill(
        self, positions: Collection[int], *, progress: bool = False, on_unreadable: OnUnreadable | None = None
    ) -> None:
        """Encodes those of some images that are missing. Several processes with one folder can each take a share.

        Args:
            positions: in the data set.
            progress: show a bar.
            on_unreadable: called with the position and the error of an image that cannot be used, which is then passed
                over; by default the error is raised.

        Raises:
            ImageError, InputError: see ``get``. The disk's room is looked at before the first image.
        """
        self._find_or_encode(positions, progress, on_unreadable)

    def _find_or_encode(
        self, positions: Collection[int], progress: bool = False, on_unreadable: OnUnreadable | None = None
    ) -> dict[int, Tensor]:
        unique = list(dict.fromkeys(positions))
        self._check_positions(unique)
        with self._lock:  # two threads would encode the same images
            found = {position: kept for position in unique if (kept := self._find(position)) is not None}
            missing = [position for position in unique if position not in found]
            self._check_room(len(missing))
            with tqdm(
                total=len(unique), initial=len(found), unit="image", desc="references", disable=not progress
            ) as bar:
                for position, patches in self._encoder.encode(missing, on_unreadable):
                    found[position] = self._keep(position, patches)
                    bar.update()
        return found

    def _find(self, position: int) -> Tensor | None:
        if position in self._memory:
            return self._memory[position]
        patches = None if self._file is None else self._file.read(position)
        if patches is not None and len(self._memory) < self._room:
            patches = self._memory[position] = patches.clone()
        return patches

    def _keep(self, position: int, patches: Tensor) -> Tensor:
        self.encoded += 1
        in_memory = len(self._memory) < self._room
        if in_memory:
            patches = self._memory[position] = patches.clone()  # a part of a batch would keep the whole batch
        if in_memory and self._path is None:
            return patches
        if self._file is None:
            self._file = self._open_file()
        written = self._file.write(position, patches)
        return patches if in_memory else written

    def _check_room(self, missing: int) -> None:
        to_disk = missing if self._path else missing - (self._room - len(self._memory))
        if to_disk > 0:
            self._file = self._file or self._open_file()
            self._file.check_room(to_disk)

    def _check_positions(self, positions: Collection[int]) -> None:
        outside = [position for position in positions if not 0 <= position < self._number]
        if outside:
            raise InputError(
                f"got the positions {outside[:10]}, expected 0 to {self._number - 1}: those of the data set"
            )

    def _open_file(self) -> SlotFile:
        shape, dtype = self._encoder.shape, self._encoder.dtype
        return SlotFile(self._path, identity=self._identity, slots=self._number, shape=shape, dtype=dtype)


class Uncached:
    """Encodes references anew for every use, as the released code does: to measure and to test the cache against.

    Args:
        encoder: encodes.
        device: where ``get`` puts its result; by default the encoder's.
    """

    def __init__(self, encoder: ReferenceEncoder, device: torch.device | str | None = None) -> None:
        self._encoder, self._device = encoder, torch.device(device or encoder.device)

    def get(self, positions: Sequence[int]) -> list[Tensor]:
        """See ``ReferenceCache.get``."""
        patches = [own for _, own in self._encoder.encode(positions)]
        return below_each_other(patches, self._encoder, self._device)


def below_each_other(patches: Sequence[Tensor], encoder: ReferenceEncoder, device: torch.device) -> list[Tensor]:
    """Puts the patches of n images (L, K, C) below each other, as ``to_rows`` has them: L tensors (n*K, C)."""
    levels, k, c = encoder.shape
    # From pinned memory a GPU takes its copy while the CPU goes on.
    rows = torch.empty(levels, len(patches), k, c, dtype=encoder.dtype, pin_memory=device.type == "cuda")
    for number, own in enumerate(patches):
        rows[:, number] = own
    return list(rows.to(device, non_blocking=True).flatten(1, 2))


def _identity(fingerprint: str, keys: Sequence[str]) -> str:
    digest = hashlib.sha256(fingerprint.encode())
    for key in keys:
        digest.update(hashlib.sha256(key.encode(errors="surrogateescape")).digest())
    return digest.hexdigest()
