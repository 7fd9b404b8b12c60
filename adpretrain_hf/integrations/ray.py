"""Many images on the GPUs or CPUs of one machine or of a cluster, by Ray Data (needs the extra ``ray``).

``write_parquet`` is a whole run that may be stopped and goes on; the classes are for a pipeline of one's own:

ray.data.read_binary_files("images", include_paths=True).map_batches(
    ADPretrainScores,
    fn_constructor_kwargs={"bundle": "org/adpretrain-dinov2-large", "references": "screw.safetensors"},
    compute=ray.data.ActorPoolStrategy(size=8),
    num_gpus=1,
    batch_size=64,
).write_parquet("scores")
"""

import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.files import atomic_path
from adpretrain_hf.images import ImageSource, ImageState, RunImages, is_removed, is_same_state, to_host
from adpretrain_hf.quantization import quantize
from adpretrain_hf.scoring import anomaly_map, score_images


class ADPretrainScores:
    """Adds to every batch the columns ``score`` and ``error``, and ``p_value`` where a reference is calibrated.

    An image that cannot be used has the score NaN, and the message as its error; for all others that is empty.

    Args:
        bundle: id of a repository, or a folder that every node sees.
        references: normal images (a folder or files) or the path of a saved bank; with ``category_column`` what
            ``set_references`` takes, such as a folder of banks.
        category_column: of the categories of images of several products.
        column: of the images: encoded bytes, paths, or arrays (H, W, 3) of uint8.
        batch_size: images at a time in the network, however many a batch of Ray holds.
        read: makes an image of a value of the column, where that is none itself.
        max_pixels: ``PIL.Image.MAX_IMAGE_PIXELS`` in the actor's process; images of more than twice as many pixels are
            refused.
        **from_pretrained: what ``ADPretrainFeatureExtractor.from_pretrained`` takes, such as ``variant`` and
            ``device``, by default the actor's GPU if it has one; ``dtype`` may also be ``"int8"``.
    """

    _with_features = False

    def __init__(
        self,
        bundle: str | Path,
        references: str | Path | Sequence[str | Path] | Mapping[str, Any],
        *,
        category_column: str | None = None,
        column: str = "bytes",
        batch_size: int = 16,
        read: Callable[[Any], ImageSource] = lambda value: value,
        max_pixels: int | None = None,
        **from_pretrained: Any,
    ) -> None:
        if max_pixels is not None:
            Image.MAX_IMAGE_PIXELS = max_pixels
        if in_8_bits := from_pretrained.get("dtype") == "int8":
            from_pretrained["dtype"] = "float32"
        extractor = ADPretrainFeatureExtractor.from_pretrained(bundle, **from_pretrained)
        self.extractor = quantize(extractor) if in_8_bits else extractor
        set_them = self.extractor.set_references if category_column else self.extractor.set_reference
        set_them(references, batch_size=batch_size)
        self.layers = extractor.layers if self._with_features else ()
        side = extractor.image_size // extractor.config.patch_size
        level = np.full((extractor.config.hidden_size, side, side), np.nan, dtype=np.float32)
        self._with_boxes = self._with_features and any(bank.tiles for bank in self.extractor.references.values())
        if self._with_boxes:
            level = level[None]
        calibrated = any(judgement.calibration for judgement in self.extractor.judgements.values())
        numbers = ("score", "p_value") if calibrated else ("score",)
        self.columns = (*numbers, *self.layers, *(["boxes"] if self._with_boxes else []))
        self._no_row = [*[np.array(np.nan)] * len(numbers), *[level] * len(self.layers)]
        self._no_row += [np.full((1, 4), -1)] if self._with_boxes else []
        self.column, self.batch_size, self.read = column, batch_size, read
        self.category_column = category_column

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with its new columns.

        Raises:
            InputError: it has no column of that name.
        """
        for argument in ("column", "category_column"):
            if (column := getattr(self, argument)) is not None and column not in batch:
                raise InputError(
                    f"the batch has no column {column!r}, only {list(batch)}: give its name as `{argument}`"
                )
        values = batch[self.column]
        names = [value if isinstance(value, str) else f"image {n} of the batch" for n, value in enumerate(values)]
        images = [(name, partial(self.read, value)) for name, value in zip(names, values, strict=True)]
        errors: dict[str, str] = {}

        def note(name: str, error: ImageError) -> None:
            errors[name] = str(error)

        categories = None if self.category_column is None else batch[self.category_column]
        options = {"categories": categories, "batch_size": self.batch_size, "progress": False, "on_error": note}
        rows = iter([*self._rows(images, **options)])  # in order, without those that cannot be used
        found = zip(*(self._no_row if name in errors else next(rows) for name in names), strict=True)
        columns = {name: _column(column) for name, column in zip(self.columns, found, strict=True)}
        return {**batch, **columns, "error": np.array([errors.get(name, "") for name in names], dtype=object)}

    def _rows(self, images: Any, **options: Any) -> Iterator[list[np.ndarray]]:
        batches, judgements = self.extractor.stream_batches(images, **options), self.extractor.judgements
        wanted = len(self.layers)  # the rest stays on the GPU
        results = ((batch, [anomaly_map(maps, batch[0].network_size), *maps[:wanted]]) for batch, maps in batches)
        for scored, levels in score_images(to_host(results, self.extractor.device), judgements, options["on_error"]):
            numbers = [scored.score]
            if "p_value" in self.columns:
                calibration = scored.judgement.calibration
                numbers.append(calibration.p_value(scored.score) if calibration else math.nan)
            image, row = scored.image, [*map(np.array, numbers), *(level.float().numpy() for level in levels)]
            boxes = np.array(image.windows.boxes if image.windows else [image.box])
            yield [*row, boxes] if self._with_boxes else row


class ADPretrainFeatures(ADPretrainScores):
    """Adds a column ``layer<n>`` (C, h, w) of float32 for every level as well; NaN where an image cannot be used.

    With tiles, (T, C, h, w) of an image's T windows, row by row, and a column ``boxes`` (T, 4) of int64: top, left,
    height and width of each in the image's pixels; -1 where it cannot be used.
    """

    _with_features = True


def _column(values: Sequence[np.ndarray]) -> np.ndarray:
    """The values of a column as one array, of objects where their shapes differ."""
    if len({value.shape for value in values}) == 1:
        return np.stack(values)
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def write_parquet(
    images: RunImages,
    output: Path,
    *,
    features: bool = False,
    cpus: int | None = None,
    batch_size: int = 16,
    **actor: Any,
) -> dict[str, str]:
    """Scores images by an actor on every GPU of Ray (see ``connect``), or on every few cores, and writes Parquet files.

    Their columns: ``path``, absolute, or a data set's row (``"row 7"``); ``size``, the file's in bytes, and
    ``modified``, when it was changed, in nanoseconds, both 0 for a row; ``category``, if the images have any; ``score``
    and ``error`` as ``ADPretrainScores`` adds them. The same call again does what is missing, has changed or could not
    be used. Scores are to the bit those of one process with as many threads and the same images in a batch: one that
    cannot be used shifts those that follow.

    Args:
        images: what ``open_images`` returns; these, and all other paths, as every node sees them.
        output: a folder without results of another bundle or other references.
        features: add the columns of ``ADPretrainFeatures``.
        cpus: cores of an actor where there is no GPU or ``device`` is ``"cpu"``; by default all of this machine, or of
            the largest node if that has fewer.
        batch_size, **actor: what ``ADPretrainScores`` takes.

    Returns:
        The errors of the images that could not be used, by their paths.

    Raises:
        InputError: see ``connect``; no node has so many cores, a path is not Unicode, or an actor raised it.
    """
    ray = connect()
    states = {os.path.abspath(image): state for image, state in images.states.items()}
    states = states or dict.fromkeys(images.names, (0, 0))
    categories = {os.path.abspath(image) if images.states else image: one for image, one in images.categories.items()}
    done = _keep_rows(output, lambda row: _holds(row, states))
    if pending := {path: state for path, state in states.items() if path not in done}:
        number, resources, device = _pool(ray, cpus, actor.get("device"))
        number = min(number, math.ceil(len(pending) / batch_size))
        # Of many batches the network is busy from one to the next; the features of a block are in memory at once.
        batches = min(2 if features else 16, len(pending) // (4 * number * batch_size))
        common = {"column": "path", "read": images.source, "batch_size": batch_size, "device": device}
        common |= {"category_column": "category"} if categories else {}
        scored = ray.data.from_blocks(_blocks(pending, categories, batch_size * max(1, batches))).map_batches(
            ADPretrainFeatures if features else ADPretrainScores,
            fn_constructor_kwargs=actor | common,
            compute=ray.data.ActorPoolStrategy(size=number),
            batch_size=None,
            **resources,
        )
        _write(ray, scored, output, number)
    errors = _keep_rows(output, lambda row: True)
    return {path: errors[path] for path in states if errors.get(path)}


def connect(address: str | None = None, **options: Any) -> Any:
    """Returns ``ray``, connected.

    Args:
        address: of a cluster; by default the one that this process is connected to, or else a new one on this machine.
        **options: of ``ray.init``.

    Raises:
        InputError: it is not installed, cannot start workers on this machine, or there is no such cluster.
    """
    try:
        import ray.data
    except ImportError as error:
        raise InputError("Ray Data is not installed: pip install adpretrain-hf[ray]") from error
    if ray.is_initialized():
        return ray
    spaced = [path for path in (sys.executable, ray.__file__) if " " in path]
    if spaced and address is None:
        raise InputError(
            f"Ray cannot start workers, for there is a space in the path of their Python, {spaced[0]}: make the "
            "environment in a path without a space"
        )
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, ValueError) as error:
        raise InputError(f"there is no Ray cluster at {address}: {error}") from error
    return ray


def _pool(ray: Any, cpus: int | None, device: str | None) -> tuple[int, dict[str, int], str]:
    """The number of actors, what each takes of the cluster, and the device that it computes on."""
    gpus = 0 if device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    if gpus:
        return gpus, {"num_gpus": 1}, "cuda"
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    cores = cpus or max(1, min(os.cpu_count() or 1, max(nodes)))
    number = sum(node // cores for node in nodes)
    if not number:
        raise InputError(f"no node of the Ray cluster has {cores} CPUs for an actor: the largest has {max(nodes)}")
    return number, {"num_cpus": cores}, device or "cpu"


def _blocks(states: Mapping[str, ImageState], categories: Mapping[str, str], size: int) -> list[Any]:
    import pyarrow as pa

    sizes, times = zip(*states.values(), strict=True)
    try:
        told = {"category": [categories[path] for path in states]} if categories else {}
        table = pa.table({"path": list(states), "size": sizes, "modified": times} | told)
    except UnicodeEncodeError as error:
        raise InputError(f"{error.object!r} is not Unicode, as paths in Parquet files are: rename it") from error
    return [table.slice(start, size) for start in range(0, len(table), size)]


def _write(ray: Any, scored: Any, output: Path, number: int) -> None:
    from pyarrow.fs import LocalFileSystem

    try:
        # Writing needs no core, for the actors hold them all to the end, and a run that is stopped would leave nothing.
        options = {"filesystem": LocalFileSystem(), "ray_remote_args": {"num_cpus": 0}, "concurrency": number}
        scored.write_parquet(str(output.resolve()), **options)
    except ray.exceptions.RayError as error:
        # Of what an actor raises only the text comes back.
        told = re.findall(r"^adpretrain_hf\.errors\.\w+: (.+)", str(error), re.MULTILINE)
        if not told:
            raise
        raise InputError(told[-1]) from error


def _keep_rows(output: Path, holds: Callable[[dict[str, Any]], bool]) -> dict[str, str]:
    """Takes out all rows but those that hold, and the files of a killed run; returns paths and errors of what stays."""
    import pyarrow as pa
    from pyarrow import parquet

    errors: dict[str, str] = {}
    for file in sorted(output.glob("[!.]*.parquet")):
        try:
            rows = parquet.ParquetFile(file).read(["path", "size", "modified", "error"]).to_pylist()
        except pa.ArrowInvalid:  # its end is missing
            rows = []
        kept = [holds(row) for row in rows]
        if not any(kept):
            file.unlink()
        elif not all(kept):
            with atomic_path(file) as temporary:
                parquet.write_table(parquet.read_table(file, partitioning=None).filter(pa.array(kept)), temporary)
        errors |= {row["path"]: row["error"] for row, stays in zip(rows, kept, strict=True) if stays}
    return errors


def _holds(row: Mapping[str, Any], states: Mapping[str, ImageState]) -> bool:
    """Whether the image could be used and is as it was; one that this run is not about only has to be there."""
    now = states.get(row["path"])
    if row["error"] or now is None:
        return not row["error"] and not is_removed(row["path"])
    if "size" not in row:  # an earlier version wrote none
        return row["modified"] == now[1]
    return is_same_state((row["size"], row["modified"]), now)
