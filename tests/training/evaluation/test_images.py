"""Images and masks as the network sees them, in batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

pytest.importorskip("anomalib")
from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.errors import ImageError, InputError, MissingPathError
from adpretrain_hf.preprocessing import Preprocessor
from training.evaluation.categories import Sample
from training.evaluation.images import ImageFiles, test_masks

PREPARE = Preprocessor(ADPretrainConfig("none", hidden_size=32, patch_size=8, layers=(1,), image_size=32, num_heads=4))


@pytest.fixture
def samples(tmp_path):
    """A normal and an anomalous image of 96 x 64 pixels; the mask covers the middle third and an edge."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    mask = np.zeros((64, 96), dtype=np.uint8)
    mask[:, 32:64] = 1  # a class's number, not 255
    mask[:, :8] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return [
        Sample(tmp_path / "0.png", None, False, "good"),
        Sample(tmp_path / "1.png", tmp_path / "mask.png", True, "bad"),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_prepared_by_the_extractors_own_code(samples, workers):
    files = ImageFiles(samples, PREPARE)
    (batch,) = DataLoader(files, batch_size=2, num_workers=workers, collate_fn=files.collate_fn)
    assert torch.equal(torch.Tensor(batch.image), PREPARE([sample.image for sample in samples]))
    assert batch.gt_label.tolist() == [False, True]
    assert batch.image_path == [str(sample.image) for sample in samples]
    assert not batch.gt_mask[0].any()
    # 96 x 64 becomes 48 x 32, of which the middle 32 columns are seen: the third is columns 8 to 24, the edge is gone.
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[:, 8:24] = True
    assert torch.equal(batch.gt_mask[1].bool(), expected)


def test_masks_alone_are_the_same(samples):
    files = ImageFiles(samples, PREPARE)
    masks = test_masks(samples, PREPARE)
    assert masks.dtype == bool
    assert np.array_equal(masks, np.stack([files[place].gt_mask.squeeze().numpy() > 0 for place in range(2)]))


@pytest.mark.parametrize("size", [(45, 24), (20, 13), (10, 9), (41, 67)])
@pytest.mark.parametrize("mode", ["crop", "resize"])
def test_masks_lie_on_what_they_mark(mode, size, tmp_path):
    """An image that is its own mask, black and white, has the same edges but for what resizing blurs."""
    prepare = Preprocessor(replace(PREPARE.config, resize_mode=mode))
    width, height = size
    marked = np.zeros((height, width), dtype=np.uint8)
    marked[: height // 3, width // 2 : 3 * width // 4] = 255
    Image.fromarray(marked).convert("RGB").save(tmp_path / "0.png")
    Image.fromarray(marked).save(tmp_path / "mask.png")
    sample = Sample(tmp_path / "0.png", tmp_path / "mask.png", True, "bad")
    (mask,) = test_masks([sample], prepare)
    image = prepare.prepare(sample.image).tensor.mean(0).numpy()
    assert mask.shape == image.shape
    middle, extent = (image.max() + image.min()) / 2, np.ptp(image)
    blurred = abs(image - middle) < extent / 4
    assert np.array_equal(mask[~blurred], image[~blurred] > middle)
    assert blurred.mean() < 0.2
    if mode == "crop":
        assert np.array_equal(mask, np.asarray(prepare.crop_mask(Image.fromarray(marked))) > 0)


def test_images_of_different_shapes_are_refused(samples):
    prepare = Preprocessor(replace(PREPARE.config, resize_mode="resize"))
    Image.new("RGB", (64, 64)).save(samples[0].image)
    files = ImageFiles(samples, prepare)
    with pytest.raises(InputError, match=r"different shapes \[\(3, 32, 32\), \(3, 32, 48\)\] do not make one batch"):
        files.collate_fn([files[0], files[1]])


def test_mask_of_another_size_is_refused(samples):
    Image.new("L", (95, 64)).save(samples[1].mask)
    with pytest.raises(
        ImageError, match=r"mask\.png has 95 x 64 pixels, its image .*1\.png 96 x 64: expected the same"
    ):
        ImageFiles(samples, PREPARE)[1]


def test_unreadable_images_are_refused(samples):
    samples[0].image.write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"0\.png"):
        ImageFiles(samples, PREPARE)[0]
    samples[0].image.unlink()
    with pytest.raises(MissingPathError, match="no such image"):
        ImageFiles(samples, PREPARE)[0]
