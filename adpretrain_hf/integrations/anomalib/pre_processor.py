"""Images in anomalib's pipeline, prepared exactly as the extractor prepares them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from anomalib.data import Batch
from anomalib.data.transforms import ExportableCenterCrop
from anomalib.pre_processing import PreProcessor
from PIL import Image
from PIL.ExifTags import Base
from torch import Tensor
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image
from torchvision.tv_tensors import Mask

from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.errors import InputError
from adpretrain_hf.images import Preprocessor


def _reading_again(name: str) -> Callable[..., None]:
    """anomalib's hook of that name, which prepares a batch, with our reader behind it."""
    prepare = getattr(PreProcessor, name)

    def hook(
        self: "ADPretrainPreProcessor", trainer: Any, module: Any, batch: Batch, *args: Any, **kwargs: Any
    ) -> None:
        prepare(self, trainer, module, batch, *args, **kwargs)
        self.read_again(batch.image, batch.image_path)

    return hook


class ADPretrainPreProcessor(PreProcessor):
    """Resizes 8-bit pixels by PIL's bicubic filter, crops where the bundle does, normalises, as ``preprocess`` does.

    anomalib's data modules take the resizing over and apply it to each image on its own, so images of different sizes
    make one batch, if they are prepared to one shape; the others are refused, for anomalib itself would stretch them.
    It reads files by ``convert("RGB")``, which saturates 16 bits, passes over EXIF orientation, drops alpha: files of
    more than plain 8-bit grey or RGB are read again by the package's reader, so that these are the same pixels as those
    of the references and of ``score``. An exported model holds what ONNX can express: bicubic resizing of floats
    without antialiasing. Feed it images of the size that they are prepared to for exact scores.

    Args:
        config: of the extractor.
        square: whether all images have to come to squares, as for a detector that is built for one grid of patches.
    """

    def __init__(self, config: ADPretrainConfig, *, square: bool = False) -> None:
        normalize = Normalize(mean=config.mean, std=config.std)
        exact = ExactResize(config, (config.image_size, config.image_size) if square else None)
        super().__init__(Compose([exact, normalize]))
        self.export_transform = Compose([*_exportable(config), normalize])
        self._prepare, self._exact = Preprocessor(config), exact

    @property
    def shape(self) -> tuple[int, int] | None:
        """H' and W' that images are prepared to, once one has been."""
        return self._exact.shape

    on_train_batch_start = _reading_again("on_train_batch_start")
    on_validation_batch_start = _reading_again("on_validation_batch_start")
    on_test_batch_start = _reading_again("on_test_batch_start")
    on_predict_batch_start = _reading_again("on_predict_batch_start")

    def read_again(self, images: Tensor, paths: Sequence[str | None] | None) -> Tensor:
        """Replaces those of a batch's prepared images (B, 3, S, S) whose files anomalib does not read as the package.

        Args:
            images: changed in place.
            paths: of their files, as far as they are known.

        Raises:
            ImageError: a file cannot be read, or is of a kind that is not supported.
            InputError: one is prepared to another shape, as one that EXIF turns by a quarter.
        """
        for row, path in enumerate(paths or []):
            if path and not _is_plain(path):
                image = self._prepare.prepare(path)
                _check_shape(image.network_size, (images.shape[-2], images.shape[-1]), path)
                images[row] = image.tensor.to(images)
        return images

    def checkpoint_config(self) -> dict[str, Any]:
        """The shape of the images; how they are prepared says the bundle, which a checkpoint names."""
        return {"shape": self.shape}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Takes over the shape of the images."""
        self._exact.shape = config["shape"]


def _is_plain(path: str) -> bool:
    """Whether a file holds 8-bit grey or RGB pixels, upright: then every reader gives the same."""
    try:
        with Image.open(path) as image:
            plain = image.mode in ("L", "RGB") and image.format in ("PNG", "JPEG", "BMP", "PPM", "WEBP")
            return plain and "transparency" not in image.info and image.getexif().get(Base.Orientation, 1) == 1
    except (OSError, ValueError, SyntaxError, TypeError):  # what the package's reader says of it is the better error
        return False


class ExactResize(Resize):
    """Resizes and crops as ``Preprocessor.seen`` does; leaves alone what has that size already.

    Args:
        config: of the extractor.
        shape: H' and W' that all images have to come to; by default those of the first.
    """

    def __init__(self, config: ADPretrainConfig, shape: tuple[int, int] | None = None) -> None:
        super().__init__((config.image_size, config.image_size), interpolation=InterpolationMode.BICUBIC)
        self._prepare, self.shape = Preprocessor(config), shape

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Images (..., 3, H, W), floats in [0, 1], or masks (..., H, W) to those of H' x W' pixels.

        Raises:
            InputError: images of one shape after images of another.
        """
        if not isinstance(inpt, Tensor):
            return inpt
        height, width = inpt.shape[-2:]
        size = self._prepare.network_size(height, width)
        self.shape = self.shape or size
        _check_shape(size, self.shape, f"an image of {height} x {width} pixels")
        if (height, width) == size:
            return inpt
        if isinstance(inpt, Mask):
            flat = (inpt != 0).byte().cpu().reshape(-1, 1, height, width)
            seen = [pil_to_tensor(self._prepare.seen_mask(to_pil_image(mask))) for mask in flat]
        else:
            # anomalib divides 8-bit pixels by 255: this gets them back.
            flat = (inpt * 255).round().clamp(0, 255).byte().cpu().reshape(-1, *inpt.shape[-3:])
            seen = [pil_to_tensor(self._prepare.seen(to_pil_image(image))) / 255 for image in flat]
        joined = torch.stack(seen).reshape(*inpt.shape[:-2], *size)
        return (Mask(joined) if isinstance(inpt, Mask) else joined).to(inpt)


class WholeResize(Resize):
    """Resizes whole images as ONNX can express it, without antialiasing.

    Args:
        config: of the extractor.
    """

    def __init__(self, config: ADPretrainConfig) -> None:
        super().__init__(config.image_size, interpolation=InterpolationMode.BICUBIC, antialias=False)
        self._prepare = Preprocessor(config)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Images (..., 3, H, W) to those of H' x W' pixels."""
        size = self._prepare.network_size(inpt.shape[-2], inpt.shape[-1])
        return resize(inpt, [*size], InterpolationMode.BICUBIC, antialias=False)


def _exportable(config: ADPretrainConfig) -> list[Resize | ExportableCenterCrop]:
    if config.resize_mode == "resize":
        return [WholeResize(config)]
    shorter = Resize(config.image_size, interpolation=InterpolationMode.BICUBIC, antialias=False)
    return [shorter, ExportableCenterCrop(config.image_size)]


def _check_shape(size: tuple[int, int], expected: tuple[int, int], name: str) -> None:
    if size != expected:
        (h, w), (height, width) = size, expected
        raise InputError(
            f"{name} is prepared to {h} x {w}, expected {height} x {width}: with resize_mode='resize' anomalib's "
            "batches, and some detectors, need images of that one shape. Take resize_mode='crop'"
        )
