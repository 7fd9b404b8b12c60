"""ReferenceEncoder: images -> reference patches whose numbers do not depend on what else is encoded with them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.images import read_ahead, to_host
from adpretrain_hf.matching import to_rows

OnUnreadable = Callable[[int, ImageError], None]
Load = Callable[[int], Tensor]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LOG = logging.getLogger(__name__)


class ReferenceEncoder:
    """Encodes normal images, each to the same bits whenever, in whatever order and company it is encoded.

    Matrix products may add up in another order for another number of rows, and even for rows at another place of a
    batch of fixed size. So images are encoded one at a time, which costs a CPU a tenth more time. On a GPU batches are
    much faster: larger ones, always filled up to their size, are used if a trial shows that there a row's bits do not
    depend on its place and on the others.

    Args:
        extractor: whose backbone encodes; square images of its ``image_size``.
        load: position in the data set -> prepared image (3, S, S); called in several threads.
        dtype: what the patches are rounded to: float16, bfloat16 or float32.
        autocast: precision that the backbone computes in, bfloat16 where the training's queries are encoded so.
        batch_size: images at a time; by default 1 on a CPU, else 16, if the trial allows it.

    Attributes:
        shape: L, K and C of an image's patches.
        batch_size: images at a time.

    Raises:
        InputError: another ``dtype``, or a batch size below 1.
    """

    def __init__(
        self,
        extractor: ADPretrainFeatureExtractor,
        load: Load,
        *,
        dtype: torch.dtype = torch.float16,
        autocast: torch.dtype | None = None,
        batch_size: int | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise InputError(f"dtype is {dtype}, expected one of {_DTYPES}")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, expected at least 1")
        config = extractor.config
        self._extractor, self._load, self._autocast = extractor, load, autocast
        self.dtype, self.device = dtype, extractor.device
        self.shape = (len(config.layers), (config.image_size // config.patch_size) ** 2, config.hidden_size)
        wanted = batch_size or (1 if self.device.type == "cpu" else 16)
        self.batch_size = wanted if self._rows_are_independent(wanted) else 1
        if self.batch_size != wanted:
            _LOG.warning("references are encoded one by one: in batches of %d their numbers would differ", wanted)

    @property
    def fingerprint(self) -> str:
        """64 hex digits, equal where the same image gives the same bits: also the number of threads counts on a CPU."""
        if self.device.type == "cuda":
            machine = [torch.cuda.get_device_name(self.device), torch.get_float32_matmul_precision()]
        else:
            machine = [self.device.type, torch.backends.cpu.get_cpu_capability(), str(torch.get_num_threads())]
        parts = {
            "config": self._extractor.config.fingerprint,
            "backbone": self._extractor.backbone.digest(),
            "precision": [str(self._extractor.dtype), str(self._autocast), str(self.dtype)],
            "shape": self.shape,
            "batch_size": self.batch_size,
            "machine": machine,
            "torch": torch.__version__,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def encode(
        self, positions: Iterable[int], on_unreadable: OnUnreadable | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Reads and encodes images, decoding ahead in threads.

        Args:
            positions: in the data set.
            on_unreadable: called with the position and the error of an image that cannot be used, which is then left
                out; by default the error is raised.

        Returns:
            An iterator of positions and patches (L, K, C) on the CPU, in order.

        Raises:
            ImageError: an image cannot be read.
            InputError: patches that the dtype cannot hold, or images of another size.
        """
        calls = ((position, partial(_read, self._load, position)) for position in positions)
        images = read_ahead(calls, 2 * self.batch_size + 2, on_unreadable)
        batches = iter(lambda: list(islice(images, self.batch_size)), [])
        encoded = ((batch, [self._encode_batch([image for _, image in batch])]) for batch in batches)
        for batch, (patches,) in to_host(encoded, self.device):
            for (position, _), own in zip(batch, patches, strict=False):  # those that fill up the batch are left
                if not own.isfinite().all():
                    raise InputError(
                        f"the patches of reference image {position} do not fit {self.dtype}, or are not finite: use "
                        "bfloat16, and check the backbone"
                    )
                yield position, own

    def _encode_batch(self, images: Sequence[Tensor]) -> Tensor:
        shapes = sorted({tuple(image.shape) for image in images})
        size = self._extractor.config.image_size
        if shapes != [(3, size, size)]:
            raise InputError(f"got reference images of shapes {shapes}, expected {(3, size, size)}")
        filled = torch.stack([*images, *[images[0]] * (self.batch_size - len(images))])
        levels, k, c = self.shape
        rows = torch.stack([to_rows(level) for level in self._forward(filled)])  # (L, B*K, C)
        return rows.view(levels, -1, k, c).transpose(0, 1).to(self.dtype).contiguous()

    @torch.no_grad()
    def _forward(self, images: Tensor) -> list[Tensor]:
        # The same with and without an autocast of the caller's.
        with torch.autocast(self.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            return self._extractor.encode(images)

    def _rows_are_independent(self, batch_size: int) -> bool:
        if batch_size == 1:
            return True
        size = self._extractor.config.image_size
        images = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
        in_order, alone = self._forward(images), self._forward(images[:1].expand_as(images))
        shifts = {1, batch_size // 2, batch_size - 1}
        moved = [[level.roll(-shift, 0) for level in self._forward(images.roll(shift, 0))] for shift in sorted(shifts)]
        return all(map(_equal, [in_order] * len(moved), moved)) and _equal([level[:1] for level in in_order], alone)


def _equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(bool((one == two).all()) for one, two in zip(first, second, strict=True))


def _read(load: Load, position: int) -> Tensor:
    try:
        return load(position)
    except ImageError:
        raise
    except OSError as error:
        raise ImageError(f"reference image {position} cannot be read: {error}") from error
