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
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
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
    """Resizes 8-bit pixels by PIL's bicubic filter, crops the centre, normalises: the numbers of ``preprocess``.

    anomalib's data modules take the resizing over and apply it to each image on its own, so images of different sizes
    make one batch. They read files by ``convert("RGB")``, which saturates 16 bits, passes over EXIF orientation and
    drops alpha: files of more than plain 8-bit grey or RGB are read again by the package's reader, so that these are
    the same pixels as those of the references and of ``score``. An exported model holds what ONNX can express: bicubic
    resizing of floats without antialiasing. Feed it images of ``image_size`` for exact scores.

    Args:
        config: of the extractor.

    Raises:
        InputError: the configuration says ``resize_mode="resize"``, whose images have different shapes.
    """

    def __init__(self, config: ADPretrainConfig) -> None:
        if config.resize_mode != "crop":
            raise InputError(
                f"resize_mode is {config.resize_mode!r}: anomalib's batches need images of one shape, expected 'crop', "
                "or a pre_processor of your own"
            )
        normalize = Normalize(mean=config.mean, std=config.std)
        super().__init__(Compose([ExactResize(config), normalize]))
        resize = Resize(config.image_size, interpolation=InterpolationMode.BICUBIC, antialias=False)
        self.export_transform = Compose([resize, ExportableCenterCrop(config.image_size), normalize])
        self._prepare = Preprocessor(config)

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
        """
        for row, path in enumerate(paths or []):
            if path and not _is_plain(path):
                images[row] = self._prepare.prepare(path).tensor.to(images)
        return images

    def checkpoint_config(self) -> dict[str, Any]:
        """Nothing: the bundle, which a checkpoint names, says how images are prepared."""
        return {}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Nothing to load."""


def _is_plain(path: str) -> bool:
    """Whether a file holds 8-bit grey or RGB pixels, upright: then every reader gives the same."""
    try:
        with Image.open(path) as image:
            plain = image.mode in ("L", "RGB") and image.format in ("PNG", "JPEG", "BMP", "PPM", "WEBP")
            return plain and "transparency" not in image.info and image.getexif().get(Base.Orientation, 1) == 1
    except (OSError, ValueError, SyntaxError, TypeError):  # what the package's reader says of it is the better error
        return False


class ExactResize(Resize):
    """Resizes and crops as ``Preprocessor.crop`` does; leaves alone what has that size already.

    Args:
        config: of the extractor.
    """

    def __init__(self, config: ADPretrainConfig) -> None:
        super().__init__((config.image_size, config.image_size), interpolation=InterpolationMode.BICUBIC)
        self._prepare = Preprocessor(config)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Images (..., 3, H, W), floats in [0, 1], or masks (..., H, W) to those of S x S pixels."""
        if not isinstance(inpt, Tensor) or [*inpt.shape[-2:]] == self.size:
            return inpt
        if isinstance(inpt, Mask):
            flat = (inpt != 0).byte().cpu().reshape(-1, 1, *inpt.shape[-2:])
            crops = [pil_to_tensor(self._prepare.crop_mask(to_pil_image(mask))) for mask in flat]
        else:
            # anomalib divides 8-bit pixels by 255: this gets them back.
            flat = (inpt * 255).round().clamp(0, 255).byte().cpu().reshape(-1, *inpt.shape[-3:])
            crops = [pil_to_tensor(self._prepare.crop(to_pil_image(image))) / 255 for image in flat]
        joined = torch.stack(crops).reshape(*inpt.shape[:-2], *self.size)
        return (Mask(joined) if isinstance(inpt, Mask) else joined).to(inpt)
