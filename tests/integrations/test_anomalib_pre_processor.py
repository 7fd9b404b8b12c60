"""Images in anomalib's pipeline: the extractor's numbers, whatever their sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adpretrain_hf.errors import InputError

pytest.importorskip("anomalib")
from adpretrain_hf.integrations.anomalib import ADPretrainFeatureNorm, ADPretrainPreProcessor
from tests.integrations.anomalib_data import datamodule, engine, write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def batches(bundle, folder, tmp_path_factory):
    """What a model was given, images of different sizes in one batch."""
    run = engine(tmp_path_factory.mktemp("run"))
    model = ADPretrainFeatureNorm(str(bundle), references=str(folder / "train"), visualizer=False)
    return run.predict(model, datamodule=datamodule(folder, eval_batch_size=9))


def test_images_are_those_of_preprocess(batches, extractor):
    assert sum(len(batch.image) for batch in batches) == 9
    for batch in batches:
        expected = extractor.preprocess(batch.image_path)
        torch.testing.assert_close(torch.Tensor(batch.image), expected, atol=1e-6, rtol=0)


def test_masks_show_what_the_network_sees(batches, extractor):
    for batch in batches:
        for path, mask, label in zip(batch.mask_path, batch.gt_mask, batch.gt_label, strict=True):
            if label:
                expected = extractor.preprocess.crop_mask(Image.open(path))
                assert np.array_equal(mask.squeeze().numpy(), np.asarray(expected) > 0)
            else:
                assert not mask.any()


def test_images_of_the_right_size_are_left_alone(extractor):
    resize = ADPretrainPreProcessor(extractor.config).transform.transforms[0]
    image = torch.rand(2, 3, 32, 32)
    assert resize(image) is image


def test_batches_without_a_data_module_are_prepared_too(extractor):
    pixels = torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8)
    got = ADPretrainPreProcessor(extractor.config).transform(pixels / 255)
    expected = extractor.preprocess([image.permute(1, 2, 0).numpy() for image in pixels])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_exported_preparation_is_close(extractor):
    """Without antialiasing it is the same where nothing is made smaller."""
    smooth = torch.linspace(0, 1, 24)[None, None, :, None].expand(1, 3, 24, 24).contiguous()
    processor = ADPretrainPreProcessor(extractor.config)
    torch.testing.assert_close(processor(smooth), processor.transform(smooth), atol=0.05, rtol=0)


def test_resize_mode_that_gives_different_shapes_is_refused(extractor):
    with pytest.raises(InputError, match="resize_mode is 'resize': anomalib's batches need images of one shape"):
        ADPretrainPreProcessor(extractor.config.replace(resize_mode="resize"))
