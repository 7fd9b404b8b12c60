"""The references of a training: which normal images may be drawn, their patches, and matching against them.

Backbone and reference images never change, yet the released code encodes references anew for every use, about two
thirds of its compute. Here every image of the pool is encoded once; its patches stay on the device if they fit a share
of a GPU's memory, else in a file that is mapped into memory, from where those of the next step are copied ahead.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.images import read_ahead, to_device, to_host
from training.data.slots import SlotFile, identified
from training.data.table import refuse
from training.run import distributed
from training.seeds import generator, named_generator

_DTYPE = torch.float16  # of the patches that are kept
_SHARE = 0.5  # of a GPU's free memory that patches may take
_BATCH = 64  # images that a GPU encodes at a time
_CENTER_REFERENCES = 4  # of each normal image, as in the released code
_SIMILARITIES = 2**28  # at a time: 1 GB
_LOG = logging.getLogger(__name__)


class ReferencePool:
    """Normal images by category and view, at most some of each, to draw references from.

    The published run draws from all normal images, whose patches take 100 GB at ViT-L and 224 px. A fixed pool of a few
    dozen of each category and view keeps them in memory. Which images are in it follows from the seed, the category's
    own images and their order alone, so that other categories may come and go.

    Args:
        categories, views: of every image of the data set, by its position.
        is_good: whether it may be a reference. The images of a damaged part are none, even where they show no damage
            and count as normal: the released code, too, draws from the ``OK`` folders alone.
        among: positions that may be used, e.g. those of the training images; all by default.
        pool_size: N, images of each category and view; None for all.
        seed: of the choice.

    Attributes:
        members: positions of the chosen images, in rising order; their places are the references' numbers.

    Raises:
        InputError: a category and view without a good image (all such are named).
    """

    def __init__(
        self,
        categories: Sequence[str],
        views: Sequence[str],
        is_good: Sequence[bool],
        *,
        among: Iterable[int] | None = None,
        pool_size: int | None = 64,
        seed: int = 0,
    ) -> None:
        self._kinds = list(zip(list(categories), list(views), strict=True))  # quicker than Arrow's columns
        good = list(is_good)
        positions = range(len(self._kinds)) if among is None else sorted(set(among))
        groups: dict[tuple[str, str], list[int]] = {self._kinds[position]: [] for position in positions}
        for position in positions:
            if good[position]:
                groups[self._kinds[position]].append(position)
        chosen = {kind: _choose(kind, group, pool_size, seed) for kind, group in groups.items()}
        self.members = sorted(position for group in chosen.values() for position in group)
        self._places = {position: place for place, position in enumerate(self.members)}
        self._groups = {kind: np.array([self._places[p] for p in group], np.int64) for kind, group in chosen.items()}
        self._check()

    def draw(self, position: int, number: int, random: np.random.Generator) -> np.ndarray:
        """Draws references of an image's category and view, with replacement as published (released ``train.py``).

        The image itself is not drawn where there is another one: its residual against itself is exactly 0, which no
        image at test time has. The published run does not exclude it, but draws from hundreds of images, where it is
        rarely met; in a small pool it often would be.

        Args:
            position: of the image in the data set.
            number: how many; 1, 4 or 8 in the published run.
            random: where chance comes from.

        Returns:
            (number,), int64, places in ``members``.
        """
        group = self._groups[self._kinds[position]]
        own = self._places.get(position)
        others = group[group != own] if own is not None and len(group) > 1 else group
        return others[random.integers(len(others), size=number)]

    def leave_out(self, unusable: Collection[int]) -> None:
        """Draws some images no more, e.g. such that cannot be read; others do not take their place.

        Raises:
            InputError: none is left of a category and view.
        """
        gone = [self._places[position] for position in unusable]
        self._groups = {kind: group[~np.isin(group, gone)] for kind, group in self._groups.items()}
        self._check()

    @property
    def drawn(self) -> list[int]:
        """The positions of the images that can be drawn, in rising order."""
        return sorted(self.members[place] for group in self._groups.values() for place in group)

    def _check(self) -> None:
        empty = [f"{category} {view}" for (category, view), group in self._groups.items() if not len(group)]
        remedy = "add good images, or leave these categories out"
        refuse(empty, "categories and views have no good image to be a reference", remedy)


def _choose(kind: tuple[str, str], group: list[int], pool_size: int | None, seed: int) -> list[int]:
    if pool_size is None or len(group) <= pool_size:
        return group
    random = named_generator(seed, *kind)
    return sorted(group[index] for index in random.choice(len(group), pool_size, replace=False))


class ReferencePatches:
    """The patches of all images of a pool, each encoded once, by one of the processes; see ``encode_ahead``.

    Args:
        extractor: whose backbone encodes; square images of its ``image_size``.
        load: position in the data set -> prepared image (3, S, S); called in several threads.
        pool: of the run; images that cannot be read are left out of it.
        keys: for every position of the data set, a text that changes when the content of its image does.
        file: where the patches are kept if they are not to stay on the device, and what is found there is used; what
            they depend on is added to its name.
        keep: use the file in any case.
        precision: of autocast, ``"bfloat16"`` or ``"float32"``.
        memory_gb: that the patches may take of a GPU's memory; half of what is free by default.

    Raises:
        InputError: no image is left of a category and view, patches that float16 cannot hold, or the disk is full.
    """

    def __init__(
        self,
        extractor: ADPretrainFeatureExtractor,
        load: Callable[[int], Tensor],
        pool: ReferencePool,
        keys: Sequence[str],
        *,
        file: Path,
        keep: bool = False,
        precision: str = "float32",
        memory_gb: float = 0.0,
    ) -> None:
        config, self._device, self._pool = extractor.config, extractor.device, pool
        self._extractor, self._load, self._precision = extractor, load, precision
        side = config.image_size // config.patch_size
        slots, shape = len(pool.members), (len(config.layers), side**2, config.hidden_size)
        fits = self._fits(slots * int(np.prod(shape)) * _DTYPE.itemsize, memory_gb)
        self._file: SlotFile | None = None
        if keep or not fits:
            made_by = (config.fingerprint, extractor.backbone.digest(), precision, extractor.dtype, self._device.type)
            made_of = [keys[position] for position in pool.members]
            self._file = SlotFile(identified(file, made_by, made_of), slots=slots, shape=shape, dtype=_DTYPE)
            self._values = self._file.values  # (N, L, K, C)
        if fits:
            self._values = torch.empty(slots, *shape, dtype=_DTYPE, device=self._device)
        self._fill()

    def gather(self, references: Tensor) -> list[Tensor]:
        """The patches of B images' references below each other; nothing is waited for.

        Args:
            references: (B, R), places in the pool's ``members``, on the CPU.

        Returns:
            L tensors (B, R * K, C), float16, on the device.
        """
        if self._values.is_cuda:
            index = to_device(references, self._device, torch.int64)
            return [level[index].flatten(1, 2) for level in self._values.unbind(1)]
        flat, levels = references.flatten(), []
        for level in self._values.unbind(1):
            rows = torch.empty(len(flat), *level.shape[1:], dtype=_DTYPE, pin_memory=self._device.type == "cuda")
            torch.index_select(level, 0, flat, out=rows)
            levels.append(rows.to(self._device, non_blocking=True).unflatten(0, references.shape).flatten(1, 2))
        return levels

    def statistics(self, seed: int) -> tuple[Tensor, list[float]]:
        """Means (L, C) and mean lengths (L) of the normal residuals (paper, section 3.4; released ``get_center``).

        Of the pool's images, each against four others; the released code takes all normal images. Sums are in float64.

        Raises:
            InputError: residuals that are not finite, or all 0 at a level.
        """
        sums = lengths = torch.zeros((), dtype=torch.float64, device=self._device)
        patches = 0
        places = {position: place for place, position in enumerate(self._pool.members)}
        positions = iter(tqdm(self._pool.drawn, unit="image", desc="centres", disable=distributed.rank() > 0))
        for batch in iter(lambda: list(islice(positions, 16)), []):
            drawn = [self._pool.draw(p, _CENTER_REFERENCES, generator(seed, "center", p)) for p in batch]
            own = self.gather(torch.tensor([[places[position]] for position in batch]))
            others = self.gather(torch.from_numpy(np.stack(drawn)))
            residuals = torch.stack([nearest_residuals(*level) for level in zip(own, others, strict=True)])
            sums = sums + residuals.sum(dim=(1, 2), dtype=torch.float64)
            lengths = lengths + residuals.norm(dim=3).sum(dim=(1, 2), dtype=torch.float64)
            patches += residuals[0, ..., 0].numel()
        mean_norms: list[float] = (lengths / patches).tolist()
        for level, length in enumerate(mean_norms):
            if not 0 < length < float("inf"):
                raise InputError(
                    f"the normal residuals of level {level} are {length} long on average, expected a finite length > "
                    "0: all references of a category and view are the same image, or an image or the backbone holds NaN"
                )
        return (sums / patches).float(), mean_norms

    def _fits(self, size: int, memory_gb: float) -> bool:
        """Whether the patches may stay on the GPUs, of all processes alike; on a CPU a file is memory as well."""
        fits = False
        if self._device.type == "cuda":
            fits = size <= (memory_gb * 1e9 or _SHARE * torch.cuda.mem_get_info(self._device)[0])
        return not distributed.anyone(not fits)

    def _fill(self) -> None:
        members, (rank, world_size) = self._pool.members, distributed.sharers(self._file is not None)
        shares = torch.arange(len(members)).tensor_split(world_size)
        missing: list[int] = shares[rank].tolist()
        if self._file is not None:
            missing = [place for place in missing if self._file.read(place) is None]
            self._file.check_room(len(missing))
        unreadable: list[int] = []

        def leave_out(place: int, error: ImageError) -> None:
            _LOG.warning("left out as a reference: %s", error)
            unreadable.append(members[place])

        calls = ((place, partial(self._load, members[place])) for place in missing)
        encoded = encode_ahead(calls, self._encode, self._device, leave_out)
        disable = distributed.rank() > 0
        for place, _, patches in tqdm(encoded, "references", len(missing), unit="image", disable=disable):
            self._keep(place, patches)
        self._pool.leave_out(distributed.union(unreadable))  # waits for all
        if self._file is None:
            distributed.broadcast_shares(self._values, shares)
        elif self._values is not self._file.values:
            for place in range(len(members)):
                if (kept := self._file.read(place)) is not None:
                    self._values[place] = to_device(kept, self._device, _DTYPE)

    @torch.no_grad()
    def _encode(self, images: list[Tensor]) -> list[Tensor]:
        with autocast(self._device, self._precision):
            levels = self._extractor.encode(torch.stack(images))
        return [level.to(_DTYPE) for level in levels]

    def _keep(self, place: int, patches: Tensor) -> None:
        if not patches.isfinite().all():
            what = f"the patches of reference image {self._pool.members[place]} do not fit {_DTYPE}, or are not finite"
            raise InputError(f"{what}: check the backbone, or use --normalize-tokens")
        if self._file is None:
            self._values[place] = to_device(patches, self._device, _DTYPE)
        else:
            self._file.write(place, patches)


def encode_ahead(
    calls: Iterable[tuple[int, Callable[[], Any]]],
    encode: Callable[[list[Any]], list[Tensor]],
    device: torch.device,
    on_error: Callable[[int, ImageError], None] | None = None,
) -> Iterator[tuple[int, Any, Tensor]]:
    """Encodes images, which are loaded ahead in threads: their keys, what was loaded, and tokens (L, K, C) on the CPU.

    ``encode`` takes n images, as they were loaded, to L maps (n, C, h, w); for the rest see ``read_ahead``. On a CPU n
    is 1, so that an image's numbers do not depend on its company: a matrix product of another number of rows may add up
    in another order.
    """
    size = _BATCH if device.type == "cuda" else 1
    images = read_ahead(calls, lambda: 2 * size + 2, on_error)
    batches = iter(lambda: list(islice(images, size)), [])
    encoded = ((batch, encode([image for _, image in batch])) for batch in batches)
    stacked = ((batch, [torch.stack([level.flatten(2).mT for level in levels], dim=1)]) for batch, levels in encoded)
    for batch, (tokens,) in to_host(stacked, device):
        for (key, image), own in zip(batch, tokens, strict=True):
            yield key, image, own


@torch.no_grad()
def match(tokens: Sequence[Tensor], patches: Sequence[Tensor], scales: Sequence[float]) -> list[Tensor]:
    """Scaled residuals of both views of a batch, each image's against its own references.

    Args:
        tokens: L maps (2 B, C, h, w), the first views before the second.
        patches: L tensors (B, K, C).
        scales: L factors.

    Returns:
        L maps (2 B, C, h, w), float32.
    """
    residuals = []
    for maps, own, scale in zip(tokens, patches, scales, strict=True):
        (h, w), b = maps.shape[2:], len(own)
        queries = maps.unflatten(0, (2, b)).permute(1, 0, 3, 4, 2).flatten(1, 3)  # (B, 2 h w, C)
        rows = nearest_residuals(queries, own).mul_(scale)
        residuals.append(rows.unflatten(1, (2, h, w)).permute(1, 0, 4, 2, 3).flatten(0, 1))
    return residuals


@torch.no_grad()
def nearest_residuals(queries: Tensor, references: Tensor) -> Tensor:
    """Subtracts from every patch of an image the nearest of its own references (paper, section 3.2).

    One batched product finds them for all images, accumulated in float32. A GPU multiplies in the references' own
    precision; what is nearest is the same as in float32 but for similarities that are equal to its rounding.

    Args:
        queries: (B, Q, C).
        references: (B, K, C), float16.

    Returns:
        (B, Q, C), float32.
    """
    with torch.autocast(queries.device.type, enabled=False):
        lengths = torch.linalg.vector_norm(references, dim=2, dtype=torch.float32).clamp_min(1e-12)
        images = max(1, _SIMILARITIES // (queries.shape[1] * references.shape[1]))
        parts = zip(*(part.split(images) for part in (queries, references, lengths)), strict=True)
        index = torch.cat([_products(q, r).div_(length[:, None]).argmax(dim=2) for q, r, length in parts])
        nearest = references.gather(1, index[:, :, None].expand(-1, -1, references.shape[2]))
        return queries.float() - nearest.float()


def _products(queries: Tensor, references: Tensor) -> Tensor:
    """(B, Q, C), (B, K, C) -> (B, Q, K), float32."""
    if queries.is_cuda:
        return torch.bmm(queries.to(references.dtype), references.mT, out_dtype=torch.float32)
    return queries.float() @ references.float().mT


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bfloat16, or none; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
