"""The table of a data set: its columns, the encoded bytes of its images, and their masks."""

import contextlib
import functools
import hashlib
import io
import lzma
import os
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, Value
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from adpretrain_hf.errors import ImageError, InputError, MissingPathError
from adpretrain_hf.images import UNREADABLE, PreparedImage, Preprocessor


class Row(NamedTuple):
    """One image, and the columns of its table.

    Attributes:
        image, mask: paths, or ``zip://<member>::<zip>``; the mask is None where there is no defect.
        category: of the product.
        view: of the camera, such as ``"C1"``; empty where there is but one.
        anomaly_class: as the data set calls it, e.g. ``"OK"`` or ``"scratch"``.
        is_anomalous: whether it shows a defect.
        is_good: whether its part is undamaged, also where this image does not show it, so that it may be a reference.
        sample: of the part that it shows.
    """

    image: str
    mask: str | None
    category: str
    view: str
    anomaly_class: str
    is_anomalous: bool
    is_good: bool
    sample: str


FEATURES = Features(
    {name: datasets.Image(decode=False) for name in ("image", "mask")}
    | {name: Value("bool" if name.startswith("is_") else "string") for name in Row._fields[2:]}
)


class Source(NamedTuple):
    """A place that images come from.

    Attributes:
        categories: their names.
        load: some of them, at least one, as a table.
    """

    categories: list[str]
    load: Callable[[list[str]], Dataset]


def make_table(rows: Iterable[Row]) -> Dataset:
    """The table of some rows."""
    columns = [*zip(*rows, strict=True)] or [()] * len(FEATURES)
    # As Arrow arrays, or datasets would look for each file on the disk.
    arrays = {
        name: pa.array(column, pa.bool_() if name.startswith("is_") else pa.string())
        for name, column in zip(FEATURES, columns, strict=True)
    }
    return Dataset.from_dict(arrays, features=FEATURES)


# More than RealIAD has classes: a zip that is opened again has its directory of thousands of members read again.
_MAX_OPEN_ZIPS = 64
# What zipfile raises on zips that are damaged, encrypted, or packed by an unknown method (a RuntimeError, too).
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError)


def read_encoded(entry: Mapping[str, Any]) -> bytes:
    """Returns the bytes of an image file as they are stored, undecoded.

    Zips stay open, at most 64 in a process. Threads may call it at once, and so may processes that were forked.

    Args:
        entry: of an ``Image(decode=False)`` column: ``bytes``, or the ``path`` of a file or of a zip's member,
            ``zip://<member>::<zip>``.

    Raises:
        MissingPathError: there is no such file, zip or member.
        ImageError: it cannot be read, or the zip's member does not have its checksum.
    """
    if entry["bytes"] is not None:
        return bytes(entry["bytes"])
    path, member = _place(entry)
    if member is not None:
        return _read_member(path, member)
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise MissingPathError(f"no such image: {path}") from error
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error}") from error


def read_mask(entry: Mapping[str, Any]) -> Image.Image:
    """Decodes a mask, in which every pixel that is not zero belongs to a defect, whatever its value.

    Returns:
        An image of mode ``"L"``: 255 where there is a defect, else 0.

    Raises:
        ImageError: it cannot be read.
    """
    data = read_encoded(entry)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "BMP", "TIFF", "PPM")) as image:
            # Alpha says where a mask is opaque, not where a defect is.
            opaque = image.convert(image.mode[:-1]) if image.mode in ("LA", "RGBA") else image
            values = np.asarray(opaque) != 0
    except UnidentifiedImageError as error:  # whose text is the address of the data in memory
        expected = "a PNG, BMP, TIFF or PGM image; JPEG and WebP do not keep 0 where there is no defect"
        raise ImageError(f"the mask {entry['path']} cannot be read: expected {expected}") from error
    except UNREADABLE as error:
        raise ImageError(f"the mask {entry['path']} cannot be read: {error}") from error
    defect = values.any(axis=2) if values.ndim == 3 else values
    return Image.fromarray(defect.astype(np.uint8) * 255)


def read_mask_of(entry: Mapping[str, Any], size: tuple[int, int], image: str) -> Image.Image:
    """The mask of an image of so many pixels, width and height, as ``read_mask`` reads it.

    Raises:
        ImageError: it cannot be read, or is of another size.
    """
    mask = read_mask(entry)
    if mask.size != size:
        raise ImageError(
            f"the mask {entry['path']} has {mask.size[0]} x {mask.size[1]} pixels, its image {image} {size[0]} x "
            f"{size[1]}: expected the same"
        )
    return mask


def file_name(entry: Mapping[str, Any]) -> str:
    """What an encoded image is called, wherever it lies."""
    return os.path.basename(str(entry["path"]).partition("::")[0])


def _place(entry: Mapping[str, Any]) -> tuple[str, str | None]:
    """The file that an image lies in, and its member if that is a zip."""
    path = entry["path"]
    if path is None:
        raise ImageError("an image has neither bytes nor a path: expected one of them")
    if not path.startswith("zip://"):
        return path, None
    member, _, archive = path.removeprefix("zip://").partition("::")
    return archive, member


def zip_members(path: str | Path) -> dict[str, str]:
    """The sizes and checksums of a zip's members by their names, from its directory alone.

    Raises:
        InputError: it is damaged, incomplete, or no zip.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {member.filename: f"{member.file_size} {member.CRC:08x}" for member in archive.infolist()}
    except _DAMAGED as error:
        raise InputError(f"{path} cannot be read as a zip ({error}): is it whole? Download it again") from error


@functools.lru_cache(maxsize=_MAX_OPEN_ZIPS)
def _archive(path: str, process: int) -> tuple[zipfile.ZipFile, threading.Lock]:
    """An open zip, and what threads take turns by; of one process, for a forked one shares its parent's position."""
    return zipfile.ZipFile(path), threading.Lock()


def _read_member(archive: str, member: str) -> bytes:
    try:
        opened, lock = _archive(archive, os.getpid())
        with lock:
            return opened.read(member)
    except FileNotFoundError as error:
        raise MissingPathError(f"no such zip: {archive} (for its image {member})") from error
    except KeyError as error:
        raise MissingPathError(f"no such image: {member} in {archive}") from error
    except _DAMAGED as error:
        raise ImageError(f"{member} in {archive} is damaged: {error or type(error).__name__}") from error


def prepare_entry(entry: Mapping[str, Any], preprocess: Preprocessor, name: str = "") -> PreparedImage:
    """Reads and prepares an encoded image, called by its path or a name; ImageError if it cannot be used."""
    name = name or str(entry["path"])
    return preprocess.prepare(read_encoded(entry), name)


def seen_mask(entry: Mapping[str, Any] | None, prepared: PreparedImage, preprocess: Preprocessor) -> Tensor:
    """The part of an image's mask that the network sees, (H, W) bool; all False where there is none.

    Args:
        entry: the encoded mask, as ``read_mask`` takes it, or None.
        prepared: the image.
        preprocess: that it was prepared by.

    Raises:
        ImageError: the mask cannot be read, or is not of its image's size.
    """
    if entry is None:
        return torch.zeros(prepared.network_size, dtype=torch.bool)
    mask = read_mask_of(entry, prepared.size[::-1], prepared.name)
    # To the pixel; PreparedImage.box is rounded.
    return torch.from_numpy(np.asarray(preprocess.seen_mask(mask)) > 0)


def refuse_shared(rows: Iterable[Row], where: object) -> None:
    """Raises InputError where two images have one mask."""
    number = Counter(row.mask for row in rows if row.mask)
    shared = sorted(mask for mask, count in number.items() if count > 1)
    refuse(shared, f"masks of {where} are those of several images", "expected one for each")


def refuse(names: Sequence[str], what: str, remedy: str) -> None:
    """Raises InputError with the first ten of some names, if there are any."""
    if names:
        listed = "".join(f"\n  {name}" for name in names[:10])
        more = f"\n  and {len(names) - 10} more" if len(names) > 10 else ""
        raise InputError(f"{len(names)} {what}: {remedy}.{listed}{more}")


def content_keys(entries: Iterable[Mapping[str, Any] | None]) -> list[str]:
    """One text for each image that changes when its content does, without reading any image.

    A file goes by its path, size and time of change, a member of a zip by its name, size and checksum in the zip's
    directory, bytes by their sha256; None by nothing. Entries are those that ``read_encoded`` takes.

    Raises:
        InputError: a zip cannot be read, or lacks a member.
    """
    members = functools.cache(zip_members)  # each zip's are read once, and forgotten when the keys are made
    return ["" if entry is None else _key(entry, members) for entry in entries]


def _key(entry: Mapping[str, Any], members: Callable[[str], Mapping[str, str]]) -> str:
    if entry["bytes"] is not None:
        return f"bytes {hashlib.sha256(entry['bytes']).hexdigest()}"
    path, member = _place(entry)
    if member is None:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            return f"{path} {status.st_size} {status.st_mtime_ns}"
        return f"{path} missing"  # an error only when it is read
    if member not in members(path):
        raise InputError(f"{path} has no member {member}: it is another zip than the one the data set was made from")
    return f"{entry['path']} {members(path)[member]}"
