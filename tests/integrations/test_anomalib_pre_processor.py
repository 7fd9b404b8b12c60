"""Images in anomalib's pipeline: the extractor's numbers, whatever their sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adpretrain_hf.errors import InputError
from adpretrain_hf.images import Preprocessor

pytest.importorskip("anomalib")
from torchvision.tv_tensors import Mask

from adpretrain_hf.integrations.anomalib import ADPretrainFeatureNorm, ADPretrainPreProcessor
from tests.conftest import random_image
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
                expected = extractor.preprocess.seen_mask(Image.open(path))
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


@pytest.fixture
def whole(extractor):
    """A configuration that cuts nothing off."""
    return extractor.config.replace(resize_mode="resize")


def test_whole_images_of_one_shape_and_their_masks_are_those_of_preprocess(whole):
    processor = ADPretrainPreProcessor(whole)
    pixels = torch.randint(0, 256, (2, 3, 40, 78), dtype=torch.uint8)
    masks = torch.randint(0, 2, (2, 40, 78), dtype=torch.bool)
    images, seen = processor.transform(pixels / 255, Mask(masks))
    expected = Preprocessor(whole)([image.permute(1, 2, 0).numpy() for image in pixels])
    assert images.shape == expected.shape == (2, 3, 32, 64)
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
    by_hand = Image.fromarray(masks[1].numpy()).resize((64, 32), Image.Resampling.NEAREST)
    assert np.array_equal(seen[1].numpy(), np.array(by_hand))
    assert processor.shape == (32, 64)
    assert processor(pixels / 255).shape == (2, 3, 32, 64)  # as it is exported


def test_whole_images_of_different_shapes_are_refused(whole):
    """anomalib would stretch the smaller ones of a batch to the largest."""
    resize = ADPretrainPreProcessor(whole).transform
    resize(torch.rand(3, 40, 40))
    message = "an image of 40 x 80 pixels is prepared to 32 x 64, expected 32 x 32: .* Take resize_mode='crop'"
    with pytest.raises(InputError, match=message):
        resize(torch.rand(3, 40, 80))
    with pytest.raises(InputError, match="prepared to 32 x 64, expected 32 x 32"):
        ADPretrainPreProcessor(whole, square=True).transform(torch.rand(3, 40, 80))


def test_a_file_that_exif_turns_to_another_shape_is_refused(whole, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    random_image(1, 80, 40).save(tmp_path / "turned.png", exif=exif)
    with pytest.raises(InputError, match=r"turned.png is prepared to 64 x 32, expected 32 x 64"):
        ADPretrainPreProcessor(whole).read_again(torch.zeros(1, 3, 32, 64), [str(tmp_path / "turned.png")])


def test_a_checkpoint_keeps_the_shape_that_an_export_is_for(bundle, tmp_path):
    root, run = tmp_path / "wide", engine(tmp_path)
    for part in ("train", "normal_test", "defect", "mask"):
        (root / part).mkdir(parents=True)
        for seed in range(2):
            random_image(seed, 40, 80).save(root / part / f"{seed}.png")
    model = ADPretrainFeatureNorm(str(bundle), references=1, resize_mode="resize", visualizer=False)
    run.fit(model, datamodule=datamodule(root))
    again = ADPretrainFeatureNorm.load_from_checkpoint(run.trainer.checkpoint_callback.best_model_path)
    assert again.pre_processor.shape == model.pre_processor.shape == (64, 32)
