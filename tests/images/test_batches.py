"""Batches: in order, of one shape, never too large, not read too far ahead, no threads left; copies to the CPU."""

from __future__ import annotations

import gc
import io
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence
from torch import Tensor

from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.errors import ImageError, InputError, MissingPathError
from adpretrain_hf.images import PreparedBatches, PreparedImage, Preprocessor, stack, to_device, to_host
from adpretrain_hf.images.ahead import prepare_ahead
from adpretrain_hf.images.transfer import begin_copy, late
from tests.conftest import random_image

QUICK = settings(max_examples=40, deadline=None, database=None)
CONFIG = ADPretrainConfig(backbone="tiny", hidden_size=32, patch_size=8, layers=(1,), image_size=32, resize_mode="crop")
CROP = Preprocessor(CONFIG)
RESIZE = Preprocessor(CROP.config.replace(resize_mode="resize"))


def grey(value: int, width: int = 32, height: int = 32) -> np.ndarray:
    return np.full((height, width), value, np.uint8)


def level_of(image: PreparedImage) -> int:
    """The grey level that an image of one colour was made of."""
    mean, std = CROP.config.mean[0], CROP.config.std[0]
    return round(float((image.tensor[0, 0, 0] * std + mean) * 255))


def levels(batches: Iterable[list[PreparedImage]]) -> list[int]:
    return [level_of(image) for batch in batches for image in batch]


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("adpretrain-decode")]


@pytest.fixture(autouse=True)
def _no_threads_of_other_tests() -> None:
    if decoding_threads():
        gc.collect()
    assert not decoding_threads()


# Order and groups


@QUICK
@given(count=st.integers(1, 60), batch_size=st.integers(1, 20))
def test_every_image_once_and_in_order(count: int, batch_size: int) -> None:
    batches = PreparedBatches([grey(number) for number in range(count)], CROP, batch_size)
    assert batches.total == count
    groups = list(batches)
    assert levels(groups) == list(range(count))
    assert [image.name for group in groups for image in group] == [f"image {number}" for number in range(count)]
    full, rest = divmod(count, batch_size)
    assert [len(group) for group in groups] == [batch_size] * full + [rest] * (rest > 0)


@QUICK
@given(widths=st.lists(st.sampled_from([32, 40, 64]), min_size=1, max_size=40), batch_size=st.integers(1, 6))
def test_a_group_has_one_shape_and_is_as_large_as_it_may_be(widths: list[int], batch_size: int) -> None:
    images = [grey(number, width) for number, width in enumerate(widths)]
    groups = list(PreparedBatches(images, RESIZE, batch_size))
    assert levels(groups) == list(range(len(widths)))
    expected = []
    for width, run in itertools.groupby(widths):
        length = len(list(run))
        expected += [(width, min(batch_size, length - start)) for start in range(0, length, batch_size)]
    assert [(stack(group).shape[-1], len(group)) for group in groups] == expected


def test_slow_images_do_not_lose_their_place(tmp_path: Path) -> None:
    """Large files are still being decoded when the small ones after them are done."""
    paths = []
    for number in range(12):
        side = 1500 if number % 4 == 0 else 32
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(grey(number, side, side)).save(paths[-1])
    groups = list(PreparedBatches(paths, CROP, 5))
    assert levels(groups) == list(range(12))
    assert [image.name for group in groups for image in group] == [str(path) for path in paths]


def test_a_folder(image_folder: Path) -> None:
    batches = PreparedBatches(image_folder, CROP, 2)
    assert batches.total == 5
    groups = list(batches)
    assert [[Path(image.name).name for image in group] for group in groups] == [
        ["0.png", "1.png"],
        ["2.png", "3.jpg"],
        ["4.jpg"],
    ]
    torch.testing.assert_close(torch.cat([stack(group) for group in groups]), CROP(image_folder), atol=0, rtol=0)


def test_stack() -> None:
    group = next(iter(PreparedBatches([grey(1), grey(2)], CROP, 2)))
    assert stack(group).shape == (2, 3, 32, 32)
    torch.testing.assert_close(stack(group)[1], group[1].tensor)


# Reading ahead


class Counted:
    """An iterable of grey images that knows how far it was read."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.read = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for number in range(self.total):
            self.read += 1
            yield grey(number % 256)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_an_iterator_is_read_only_a_little_ahead(batch_size: int) -> None:
    images = Counted(100 * batch_size)
    batches = PreparedBatches(images, CROP, batch_size)
    assert batches.total is None
    assert images.read == 0
    for number, batch in enumerate(itertools.islice(batches, 12), start=1):
        assert len(batch) == batch_size
        # The batch that is handed out, and at most two more that are being decoded.
        assert number * batch_size <= images.read <= (number + 2) * batch_size


def test_of_a_live_source_each_image_comes_before_the_next_is_waited_for() -> None:
    log: list[str] = []

    def camera() -> Iterator[np.ndarray]:
        for number in range(6):
            log.append(f"asked for {number}")
            time.sleep(0.03 if number else 0)
            yield grey(number)

    for number, (image,) in enumerate(PreparedBatches(camera(), CROP, 1)):
        log.append(f"got {number}")
        assert levels([[image]]) == [number]
    assert log == [text for number in range(6) for text in (f"asked for {number}", f"got {number}")]


@pytest.mark.parametrize("in_store", [0, 70])
def test_after_what_it_had_in_store_a_source_is_live(in_store: int) -> None:
    log: list[int] = []

    def camera() -> Iterator[np.ndarray]:
        for number in range(in_store + 8):
            log.append(number)
            time.sleep(0.05 if number >= in_store else 0)
            yield grey(number % 256)

    late = [log[-1] > number for number, _ in enumerate(PreparedBatches(camera(), CROP, 1))]
    assert not any(late[in_store + 2 :])


def test_a_source_that_pauses_once_is_read_ahead() -> None:
    images = Counted(100)

    def folder() -> Iterator[tuple[np.ndarray, str]]:
        for number, image in enumerate(images):
            time.sleep(0.1 if number == 80 else 0)
            yield image, str(number)

    ahead = []
    for number, _ in enumerate(prepare_ahead(lambda source, name: time.sleep(0.004), folder(), 8), start=1):
        time.sleep(0.004)
        ahead.append(images.read - number)
    assert min(ahead[20:90]) > 1


def test_a_source_that_is_fast_enough_is_read_ahead_again() -> None:
    images = Counted(60)
    read = []
    for _ in PreparedBatches(images, CROP, 1):
        time.sleep(0.002)
        read.append(images.read)
    assert [got - number for number, got in enumerate(read, start=1)][:2] == [0, 0]
    assert max(got - number for number, got in enumerate(read, start=1)) == 1


def test_a_source_that_is_slower_than_the_network_but_not_than_decoding_is_read_ahead() -> None:
    images, ahead = Counted(40), list[int]()
    for number, _ in enumerate(prepare_ahead(lambda source, name: time.sleep(0.03), delayed(images, 0.01), 8), start=1):
        ahead.append(images.read - number)
    assert max(ahead) > 1


def delayed(images: Counted, seconds: float) -> Iterator[tuple[np.ndarray, str]]:
    for number, image in enumerate(images):
        time.sleep(seconds)
        yield image, str(number)


def test_what_came_before_a_source_failed_is_yielded() -> None:
    def broken() -> Iterator[np.ndarray]:
        yield from (grey(number) for number in range(20))
        raise ConnectionError("the camera is gone")

    got: list[int] = []
    with pytest.raises(ConnectionError, match="the camera is gone"):
        got.extend(level for batch in PreparedBatches(broken(), CROP, 4) for level in levels([batch]))
    assert got == list(range(20))


def test_an_endless_iterator() -> None:
    batches = PreparedBatches((grey(number % 256) for number in itertools.count()), CROP, 4)
    assert levels(itertools.islice(batches, 3)) == list(range(12))


def test_a_list_has_a_total_and_an_iterator_has_none() -> None:
    assert PreparedBatches([grey(0)] * 3, CROP, 2).total == 3
    assert PreparedBatches(np.zeros((4, 9, 9, 3), np.uint8), CROP, 2).total == 4
    assert PreparedBatches(iter([grey(0)] * 3), CROP, 2).total is None


def test_one_opened_image_given_many_times(tmp_path: Path) -> None:
    """An image that Pillow has opened but not yet decoded is not safe to decode in several threads."""
    random_image(0, 600, 600).save(tmp_path / "image.png")
    expected = CROP(tmp_path / "image.png")[0]
    for _ in range(5):
        opened = Image.open(tmp_path / "image.png")
        for image in itertools.chain.from_iterable(PreparedBatches([opened] * 8, CROP, 4)):
            torch.testing.assert_close(image.tensor, expected, atol=0, rtol=0)


def test_the_frames_of_one_file(tmp_path: Path) -> None:
    """Pillow's iterator over frames hands out one and the same object, and moves it on."""
    frames = [Image.fromarray(grey(10 * number)) for number in range(12)]
    frames[0].save(tmp_path / "frames.tiff", save_all=True, append_images=frames[1:])
    opened = Image.open(tmp_path / "frames.tiff")
    assert levels(PreparedBatches(ImageSequence.Iterator(opened), CROP, 4)) == [10 * number for number in range(12)]


def test_a_camera_that_fills_one_array_again_and_again() -> None:
    def frames() -> Iterator[np.ndarray]:
        frame = grey(0, 640, 480)
        for number in range(12):
            frame[:] = 10 * number
            yield frame

    assert levels(PreparedBatches(frames(), CROP, 4)) == [10 * number for number in range(12)]


# Images that cannot be used


def with_failures(folder: Path) -> list[object]:
    (folder / "broken.png").write_bytes(b"broken")
    return [grey(0), folder / "broken.png", grey(1), folder / "missing.png", np.zeros((9, 9)), grey(2), grey(3, 4, 4)]


def test_failing_images_are_left_out_and_reported_in_order(tmp_path: Path) -> None:
    failures: list[tuple[str, ImageError]] = []
    images = with_failures(tmp_path)
    batches = PreparedBatches(images, CROP, 2, lambda name, error: failures.append((name, error)))
    groups = list(batches)
    assert levels(groups) == [0, 1, 2] and [len(group) for group in groups] == [2, 1]
    names = [str(tmp_path / "broken.png"), str(tmp_path / "missing.png"), "image 4", "image 6"]
    assert [name for name, _ in failures] == names
    for name, error in failures:
        assert isinstance(error, ImageError) and name in str(error)
    assert isinstance(failures[1][1], MissingPathError)


def test_all_images_may_fail(tmp_path: Path) -> None:
    failures: list[str] = []
    batches = PreparedBatches(
        [tmp_path / f"{number}.png" for number in range(7)], CROP, 2, lambda name, _: failures.append(name)
    )
    assert list(batches) == []
    assert failures == [str(tmp_path / f"{number}.png") for number in range(7)]


def test_a_failing_image_is_raised_in_its_place(tmp_path: Path) -> None:
    images = [grey(number) for number in range(5)] + with_failures(tmp_path)[1:]
    groups = []
    with pytest.raises(ImageError, match=r"broken\.png cannot be read as an image"):  # noqa: PT012
        for group in PreparedBatches(images, CROP, 2):
            groups.append(group)
    assert levels(groups) == [0, 1, 2, 3]
    assert not decoding_threads()


def test_an_error_of_the_callers_iterator_comes_through() -> None:
    def images() -> Iterator[np.ndarray]:
        yield from [grey(0), grey(1)]
        raise RuntimeError("the camera is gone")

    with pytest.raises(RuntimeError, match="the camera is gone"):
        list(PreparedBatches(images(), CROP, 1, lambda name, error: None))
    assert not decoding_threads()


def test_an_error_in_on_error_stops_the_run(tmp_path: Path) -> None:
    def refuse(name: str, error: ImageError) -> None:
        raise RuntimeError(f"stopped at {name}")

    with pytest.raises(RuntimeError, match=r"stopped at .*broken\.png"):
        list(PreparedBatches(with_failures(tmp_path), CROP, 2, refuse))
    assert not decoding_threads()


# Threads


def test_threads_are_gone_after_the_last_batch() -> None:
    batches = PreparedBatches([grey(0)] * 40, CROP, 4)
    iterator = iter(batches)
    next(iterator)
    assert decoding_threads()
    list(iterator)
    assert not decoding_threads()


def test_threads_are_gone_after_an_early_close() -> None:
    images = Counted(1000)
    iterator = iter(PreparedBatches(images, CROP, 4))
    next(iterator)
    assert decoding_threads()
    iterator.close()
    assert not decoding_threads()
    assert images.read <= 12


def test_threads_are_gone_when_the_loop_is_left() -> None:
    batches = PreparedBatches(Counted(1000), CROP, 4)
    for _ in batches:
        break
    del batches, _
    assert not decoding_threads()


def test_no_thread_starts_before_the_first_batch() -> None:
    batches = PreparedBatches(Counted(1000), CROP, 4)
    assert not decoding_threads()
    del batches


# Prepared tensors


@QUICK
@given(count=st.integers(1, 20), batch_size=st.integers(1, 8), height=st.integers(1, 3), width=st.integers(1, 3))
def test_a_prepared_tensor_is_split(count: int, batch_size: int, height: int, width: int) -> None:
    images = torch.randn(count, 3, 8 * height, 8 * width)
    batches = PreparedBatches(images, CROP, batch_size)
    assert batches.total == count
    groups = list(batches)
    assert [len(group) for group in groups] == [len(part) for part in images.split(batch_size)]
    torch.testing.assert_close(torch.cat([stack(group) for group in groups]), images, atol=0, rtol=0)
    for number, image in enumerate(itertools.chain.from_iterable(groups)):
        size = (8 * height, 8 * width)
        assert (image.name, image.size, image.box) == (f"image {number}", size, (0, 0, *size))


def test_a_prepared_tensor_is_checked_at_once() -> None:
    for images, message in [
        (torch.zeros(0, 3, 8, 8), "batch of 0"),
        (torch.zeros(2, 3, 8, 9), "multiples of the patch size 8"),
        (torch.full((2, 3, 8, 8), torch.nan), "NaN"),
    ]:
        with pytest.raises(InputError, match=message):
            PreparedBatches(images, CROP, 2)


# Arguments


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, 2.0, "4", None, True])
def test_batch_size_is_a_positive_integer(batch_size: object) -> None:
    with pytest.raises(InputError, match=f"batch_size is {batch_size!r}, expected an integer >= 1"):
        PreparedBatches([grey(0)], CROP, batch_size)


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images were given"):
        PreparedBatches([], CROP, 2)
    with pytest.raises(InputError, match=f"no images in {tmp_path}"):
        PreparedBatches(tmp_path, CROP, 2)
    assert list(PreparedBatches(iter([]), CROP, 2)) == []


# Results on their way to the CPU: in order, as late as they should be, and none lost before an error


CPU = torch.device("cpu")


def results(asked_for: list[int], fails_at: int | None = None) -> Iterator[tuple[int, list[Tensor]]]:
    for number in range(4):
        if number == fails_at:
            raise OSError("image 2 cannot be read")
        asked_for.append(number)
        yield number, [torch.full((2,), number)]


@pytest.mark.parametrize("behind", [0, 1, 3, 9])
def test_results_arrive_in_order(behind):
    arrived = list(late(((key, begin_copy(tensors)) for key, tensors in results([])), behind))
    assert [key for key, _ in arrived] == [0, 1, 2, 3]
    assert [tensors[0].tolist() for _, tensors in arrived] == [[n, n] for n in range(4)]


@pytest.mark.parametrize(("behind", "asked_first"), [(0, [0]), (1, [0, 1]), (2, [0, 1, 2])])
def test_the_next_result_is_asked_for_before_one_is_waited_for(behind, asked_first):
    asked_for: list[int] = []
    copies = late(((key, begin_copy(tensors)) for key, tensors in results(asked_for)), behind)
    assert next(copies)[0] == 0
    assert asked_for == asked_first


@pytest.mark.parametrize("behind", [0, 1])
def test_results_before_an_error_are_not_lost(behind):
    copies = late(((key, begin_copy(tensors)) for key, tensors in results([], fails_at=2)), behind)
    assert [next(copies)[0], next(copies)[0]] == [0, 1]
    with pytest.raises(OSError, match="image 2"):
        next(copies)


def test_on_a_cpu_nothing_is_copied_and_nothing_waits():
    asked_for: list[int] = []
    tensor = torch.rand(2, 3, 4, 4)
    assert to_device(tensor, CPU, torch.float32) is tensor
    assert next(to_host(iter([(0, [tensor])]), CPU))[1][0] is tensor
    next(to_host(results(asked_for), CPU))
    assert asked_for == [0]


def test_a_batch_takes_the_precision_of_the_network():
    assert to_device(torch.rand(2, 3, 4, 4), CPU, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_go_to_a_gpu_and_back():
    device = torch.device("cuda")
    batches = [torch.rand(8, 3, 64, 64) for _ in range(5)]
    batches += [torch.rand(8, 3, 64, 64).transpose(2, 3), torch.rand(1, 3, 64, 64).expand(8, -1, -1, -1)]
    moved = ((number, [to_device(batch, device, torch.float32)]) for number, batch in enumerate(batches))
    for (number, (tensor,)), batch in zip(to_host(moved, device), batches, strict=True):
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, batch), number


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, io.BytesIO])
def test_files_in_memory_are_images_like_the_files(tmp_path: Path, wrap: Callable[[bytes], object]) -> None:
    random_image(3).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (expected,) = next(iter(PreparedBatches(tmp_path / "a.png", CROP, 4)))
    for images in (wrap(data), [wrap(data)], [("mine", lambda: wrap(data))]):
        (prepared,) = next(iter(PreparedBatches(images, CROP, 4)))
        assert torch.equal(prepared.tensor, expected.tensor)


def test_a_closed_file_is_an_image_that_cannot_be_used(tmp_path: Path) -> None:
    closed = io.BytesIO(b"")
    closed.close()
    errors: dict[str, str] = {}
    batches = PreparedBatches([closed, random_image(0)], CROP, 4, lambda name, error: errors.update({name: str(error)}))
    assert [image.name for batch in batches for image in batch] == ["image 1"]
    assert list(errors) == ["image 0"] and errors["image 0"].startswith("image 0 cannot be read: ")
