"""Encoded bytes out of files and zips: by threads, by forked processes, and from what is damaged."""

from __future__ import annotations

import io
import multiprocessing
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.errors import ImageError, MissingPathError
from adpretrain_hf.images import Preprocessor
from tests.training.real_iad_tree import RealIADClass, load_real_iad
from training.data.table import prepare_entry, read_encoded, read_mask


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def entry(path: Path | str, member: str | None = None) -> dict:
    return {"bytes": None, "path": str(path) if member is None else f"zip://{member}::{path}"}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A zip with 40 members of 100 kB."""
    random = np.random.default_rng(0)
    members = {f"a/{number}.jpg": random.bytes(100_000) for number in range(40)}
    return write_zip(tmp_path_factory.mktemp("big") / "big.zip", members), members


def read_all(path: Path, names: list[str]) -> list[bytes]:
    return [read_encoded(entry(path, name)) for name in names]


class TestConcurrency:
    def test_threads(self, big):
        path, members = big
        names = list(members) * 10
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda name: read_encoded(entry(path, name)), names))
        assert read == [members[name] for name in names]

    def test_forked_processes_beside_a_parent_that_reads_too(self, big):
        path, members = big
        read_all(path, list(members))  # the zip is open before the fork
        context = multiprocessing.get_context("fork")
        with context.Pool(3) as pool:
            answers = [pool.apply_async(read_all, (path, list(members) * 5)) for _ in range(6)]
            assert read_all(path, list(members) * 5) == list(members.values()) * 5
            assert all(answer.get(60) == list(members.values()) * 5 for answer in answers)
            pool.close()  # they end by themselves: a signal is not sure to end a process that is about to wait
            pool.join()

    def test_workers_of_a_data_loader(self, tmp_path):
        made = RealIADClass("mint", normals=4)
        made.write_zip(tmp_path)
        made.write_json(tmp_path)
        dataset = load_real_iad(tmp_path)
        expected = [read_encoded(item) for item in dataset["image"]]
        read = DataLoader(Reading(dataset), batch_size=None, num_workers=2, multiprocessing_context="fork")
        assert list(read) == expected

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, where it counts open files")
    def test_the_number_of_open_zips_is_bounded(self, tmp_path):
        paths = [write_zip(tmp_path / f"{number}.zip", {"x": b"%d" % number}) for number in range(100)]
        assert [read_encoded(entry(path, "x")) for path in paths * 2] == [b"%d" % number for number in range(100)] * 2
        links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        assert 0 < len([link for link in links if link.startswith(str(tmp_path))]) <= 64


class Reading:
    """A map-style data set that reads in the worker."""

    def __init__(self, dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> bytes:
        return read_encoded(self.dataset[number]["image"])


def test_a_jpeg_is_decoded_as_the_bundle_says(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.jpg")
    config = ADPretrainConfig.preset("dinov2-small").replace(image_size=28)
    exact, fast = (Preprocessor(config.replace(decode=how)) for how in ("exact", "fast"))
    found = [prepare_entry(entry(tmp_path / "image.jpg"), how) for how in (exact, fast)]
    assert [one.name for one in found] == [str(tmp_path / "image.jpg")] * 2
    for one, how in zip(found, (exact, fast), strict=True):
        assert torch.equal(one.pixels, how.prepare(tmp_path / "image.jpg").pixels)
    assert not torch.equal(found[0].pixels, found[1].pixels)


class TestErrors:
    def test_missing_file(self, tmp_path):
        with pytest.raises(MissingPathError, match=f"^no such image: {tmp_path}/x.jpg$"):
            read_encoded(entry(tmp_path / "x.jpg"))

    def test_a_folder(self, tmp_path):
        with pytest.raises(ImageError, match=f"^{tmp_path} cannot be read: "):
            read_encoded(entry(tmp_path))

    def test_missing_zip(self, tmp_path):
        with pytest.raises(MissingPathError, match=f"^no such zip: {tmp_path}/x.zip .for its image a.jpg.$"):
            read_encoded(entry(tmp_path / "x.zip", "a.jpg"))

    def test_missing_member(self, tmp_path):
        path = write_zip(tmp_path / "x.zip", {"b.jpg": b"x"})
        with pytest.raises(MissingPathError, match=f"^no such image: a.jpg in {path}$"):
            read_encoded(entry(path, "a.jpg"))

    def test_not_a_zip(self, tmp_path):
        (tmp_path / "x.zip").write_bytes(b"<html>")
        with pytest.raises(ImageError, match=r"^a.jpg in .*/x.zip is damaged: File is not a zip file"):
            read_encoded(entry(tmp_path / "x.zip", "a.jpg"))

    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_a_member_with_a_flipped_bit_is_named_and_the_others_are_read(self, tmp_path, method):
        first, second = np.random.default_rng(0).bytes(5000), b"second" * 100
        path = write_zip(tmp_path / "x.zip", {"a.jpg": first, "b.jpg": second}, method)
        data = bytearray(path.read_bytes())
        data[2000] ^= 4
        path.write_bytes(data)
        with pytest.raises(ImageError, match=f"^a.jpg in {path} is damaged: "):
            read_encoded(entry(path, "a.jpg"))
        assert read_encoded(entry(path, "b.jpg")) == second

    def test_a_directory_that_points_to_the_end_of_the_zip(self, tmp_path):
        path = write_zip(tmp_path / "x.zip", {"a.jpg": b"x"})
        data = bytearray(path.read_bytes())
        offset = data.index(b"PK\x01\x02") + 42
        data[offset : offset + 4] = (len(data) - 10).to_bytes(4, "little")
        path.write_bytes(data)
        with pytest.raises(ImageError, match=f"^a.jpg in {path} is damaged: "):
            read_encoded(entry(path, "a.jpg"))

    def test_neither_bytes_nor_path(self):
        with pytest.raises(ImageError, match="neither bytes nor a path"):
            read_encoded({"bytes": None, "path": None})

    def test_bytes_go_before_the_path(self):
        assert read_encoded({"bytes": b"abc", "path": "x.jpg"}) == b"abc"

    @settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
        place=st.floats(0, 1, exclude_max=True),
        value=st.integers(0, 255),
        cut=st.booleans(),
    )
    def test_damage_anywhere_gives_the_right_bytes_or_an_error(self, tmp_path, method, place, value, cut):
        members = {"a/1.jpg": b"first" * 40, "a/2.jpg": bytes(range(200))}
        path = write_zip(tmp_path / "x.zip", members, method)
        data = bytearray(path.read_bytes())
        data[int(place * len(data))] = value
        damaged = tmp_path / f"{os.urandom(8).hex()}.zip"  # open zips are known by name
        damaged.write_bytes(data[: int(place * len(data))] if cut else data)
        for name, expected in members.items():
            try:
                assert read_encoded(entry(damaged, name)) == expected
            except ImageError as error:
                assert name in str(error)


def png(pixels: np.ndarray | Image.Image) -> dict:
    image, data = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels), io.BytesIO()
    image.save(data, "PNG")
    return {"bytes": data.getvalue(), "path": "mask.png"}


DEFECT = np.array([[0, 1, 0], [255, 0, 128]], dtype=np.uint8)


def palette() -> Image.Image:
    image = Image.fromarray(np.minimum(DEFECT, 2), "P")
    image.putpalette([0, 0, 0] * 3)  # every colour looks black
    return image


class TestMasks:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: DEFECT,
            lambda: DEFECT > 0,
            lambda: DEFECT.astype(np.uint16),
            lambda: np.stack([DEFECT * 0, DEFECT * 0, DEFECT], axis=2),
            lambda: np.stack([DEFECT, DEFECT, DEFECT, DEFECT * 0 + 255], axis=2),
            lambda: Image.merge("LA", [Image.fromarray(DEFECT), Image.new("L", (3, 2), 255)]),
            palette,
        ],
        ids=["grey", "1 bit", "16 bits", "blue", "alpha", "grey and alpha", "palette"],
    )
    def test_any_pixel_that_is_not_zero_counts(self, make: Callable):
        mask = read_mask(png(make()))
        assert mask.mode == "L"
        assert np.array_equal(np.asarray(mask), np.where(DEFECT > 0, 255, 0))

    @pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n", "cut"])
    def test_unreadable(self, data):
        data = (
            png(np.random.default_rng(0).integers(0, 255, (50, 50)).astype(np.uint8))["bytes"][:900]
            if data == "cut"
            else data
        )
        with pytest.raises(ImageError, match="^the mask mask.png cannot be read: ") as caught:
            read_mask({"bytes": data, "path": "mask.png"})
        assert " at 0x" not in str(caught.value)

    @pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
    def test_what_does_not_keep_zeros_is_refused_by_name(self, kind):
        data = io.BytesIO()
        Image.fromarray(DEFECT).save(data, kind)
        with pytest.raises(ImageError) as caught:
            read_mask({"bytes": data.getvalue(), "path": "truth/7.jpg"})
        expected = "a PNG, BMP, TIFF or PGM image; JPEG and WebP do not keep 0 where there is no defect"
        assert str(caught.value) == f"the mask truth/7.jpg cannot be read: expected {expected}"

    @pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
    def test_kinds(self, kind):
        data = io.BytesIO()
        Image.fromarray(DEFECT).save(data, kind)
        mask = read_mask({"bytes": data.getvalue(), "path": "mask"})
        assert np.array_equal(np.asarray(mask), np.where(DEFECT > 0, 255, 0))
