"""ReferenceCache: bit for bit what encoding anew gives, each image encoded once, in the memory that is free."""

from __future__ import annotations

import os
import threading
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.reference import ReferenceBank
from tests.conftest import random_image
from tests.processes import FORKS, kill, start
from tests.tiny import save_tiny
from tests.training.references import SLOT_BYTES, equal, fill, keys_of, make_cache, make_encoder
from training.content_keys import content_keys
from training.free_memory import free_memory
from training.reference_cache import ReferenceCache, Uncached
from training.reference_pool import ReferencePool

NUMBER = 12
POSITIONS = st.lists(st.integers(0, NUMBER - 1), max_size=20)
MEMORY = {"none": 0, "three images": 3 * SLOT_BYTES + 1, "plenty": 10**9, "default": None}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 12 random images, 0.png to 11.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(NUMBER):
        random_image(number).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def anew(tiny_folder: Path, images: Path) -> list[list[Tensor]]:
    """The patches of each image, encoded without a cache."""
    uncached = Uncached(make_encoder(tiny_folder, images))
    return [uncached.get([position]) for position in range(NUMBER)]


def expected(anew: list[list[Tensor]], positions: list[int]) -> list[Tensor]:
    empty = [level[:0] for level in anew[0]]
    return [torch.cat([anew[p][level] for p in positions] or [empty[level]]) for level in range(len(empty))]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("in_folder", [True, False], ids=["folder", "no folder"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(POSITIONS, min_size=1, max_size=4), number=st.integers(0, 10**9))
def test_equal_to_encoding_anew(tiny_folder, images, anew, tmp_path, memory, in_folder, calls, number):
    folder = tmp_path / str(number) if in_folder else None
    cache = make_cache(tiny_folder, images, memory_bytes=MEMORY[memory], folder=folder)
    for positions in calls:
        got = cache.get(positions)
        assert [level.shape for level in got] == [(len(positions) * 16, 32)] * 4
        assert equal(got, expected(anew, positions))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("memory", ["none", "plenty"])
def test_other_precisions(tiny_folder, images, dtype, memory):
    encoder = make_encoder(tiny_folder, images, dtype=dtype)
    got = ReferenceCache(encoder, keys_of(images), memory_bytes=MEMORY[memory]).get([3, 1, 3])
    assert got[0].dtype == dtype and equal(got, Uncached(encoder).get([3, 1, 3]))


@pytest.mark.parametrize("memory", MEMORY)
def test_every_image_is_read_and_encoded_once(tiny_folder, images, memory):
    encoder = make_encoder(tiny_folder, images)
    encoded = []
    encoder._extractor.backbone.register_forward_hook(lambda module, inputs, maps: encoded.append(len(inputs[0])))
    cache = ReferenceCache(encoder, keys_of(images), memory_bytes=MEMORY[memory])
    for positions in ([5, 5, 2], [2, 3], [3, 5, 2, 0]):
        cache.get(positions)
    cache.fill(range(6))
    assert sum(encoded) == cache.encoded == 6


@pytest.mark.parametrize("batch_size", [1, 8])
def test_memory_is_bounded(tiny_folder, images, batch_size):
    encoder = make_encoder(tiny_folder, images, batch_size=1)
    encoder.batch_size = batch_size  # also where the trial would forbid it: numbers do not matter here
    cache = ReferenceCache(encoder, keys_of(images), memory_bytes=3 * SLOT_BYTES + 1)
    cache.fill(range(NUMBER))
    assert sum(kept.untyped_storage().nbytes() for kept in cache._memory.values()) == 3 * SLOT_BYTES


def test_what_is_returned_is_the_callers_own(tiny_folder, images, anew):
    cache = make_cache(tiny_folder, images, memory_bytes=SLOT_BYTES)
    for level in cache.get([0, 1]):
        level.zero_()
    assert equal(cache.get([0, 1]), expected(anew, [0, 1]))


def test_residuals_against_it_are_those_of_a_bank_of_the_same_images(tiny_folder, images):
    encoder = make_encoder(tiny_folder, images, dtype=torch.float32)
    extractor = encoder._extractor
    paths = sorted(images.iterdir())
    with torch.no_grad():
        queries = extractor.encode(extractor.preprocess(paths[5:8]))
        bank = extractor.make_reference(paths[:4])
    cache = ReferenceCache(encoder, keys_of(images))
    got = ReferenceBank(cache.get([0, 1, 2, 3])).residuals(queries)
    for own, other in zip(got, bank.residuals(queries), strict=True):
        torch.testing.assert_close(own, other)


def test_results_go_to_the_device(tiny_folder, images):
    got = make_cache(tiny_folder, images, device="meta").get([0, 0])
    assert [(level.device.type, level.shape) for level in got] == [("meta", (32, 32))] * 4


def test_threads_encode_an_image_once(tiny_folder, images, anew):
    cache = make_cache(tiny_folder, images, memory_bytes=2 * SLOT_BYTES)
    results: list[list[Tensor]] = []
    threads = [threading.Thread(target=lambda: results.append(cache.get(range(NUMBER)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.encoded == NUMBER
    assert len(results) == 4 and all(equal(got, expected(anew, list(range(NUMBER)))) for got in results)


# The file


@pytest.mark.parametrize("memory", MEMORY)
def test_a_later_run_reads_what_is_there(tiny_folder, images, anew, tmp_path, memory):
    make_cache(tiny_folder, images, folder=tmp_path / "cache", memory_bytes=MEMORY[memory]).fill(range(5))
    later = make_cache(tiny_folder, images, folder=tmp_path / "cache", memory_bytes=MEMORY[memory])
    for _ in range(2):
        assert equal(later.get(range(4, -1, -1)), expected(anew, [4, 3, 2, 1, 0]))
    assert later.encoded == 0
    assert equal(later.get([6]), anew[6]) and later.encoded == 1


def change_time(images: Path) -> None:
    path = images / "03.png"
    random_image(99).save(path)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def replace_by_another_size(images: Path) -> None:
    path = images / "03.png"
    time_before = path.stat().st_mtime_ns
    random_image(99, 64, 64).save(path)
    os.utime(path, ns=(time_before, time_before))


def leave_one_out(images: Path) -> None:
    (images / "02.png").unlink()


@pytest.mark.parametrize("change", [change_time, replace_by_another_size, leave_one_out])
def test_a_changed_image_is_not_served_from_the_old_file(tiny_folder, images, tmp_path, change):
    make_cache(tiny_folder, images, folder=tmp_path / "cache").fill(range(NUMBER))
    change(images)
    later = make_cache(tiny_folder, images, folder=tmp_path / "cache")
    assert equal(later.get([3, 4]), Uncached(make_encoder(tiny_folder, images)).get([3, 4]))
    assert later.encoded == 2 and len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"autocast": torch.bfloat16}], ids=str)
def test_another_backbone_or_precision_is_not_served_from_the_old_file(tiny_folder, images, tmp_path, options):
    make_cache(tiny_folder, images, folder=tmp_path / "cache").fill(range(NUMBER))
    other = save_tiny(tmp_path / "other", seed=1)
    for backbone, more in ((other, {}), (tiny_folder, options)):
        later = make_cache(backbone, images, more, folder=tmp_path / "cache")
        assert equal(later.get([3]), Uncached(make_encoder(backbone, images, **more)).get([3]))
        assert later.encoded == 1
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_damaged_slot_is_made_again(tiny_folder, images, anew, tmp_path):
    make_cache(tiny_folder, images, folder=tmp_path / "cache").fill(range(NUMBER))
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    content[-SLOT_BYTES // 2] ^= 1
    path.write_bytes(content)
    later = make_cache(tiny_folder, images, folder=tmp_path / "cache")
    assert equal(later.get([11, 10]), expected(anew, [11, 10])) and later.encoded == 1


def test_other_processes_fill_it_at_the_same_time(tiny_folder, images, anew, tmp_path):
    folder = tmp_path / "cache"
    own = make_cache(tiny_folder, images, folder=folder)
    threads = {"initializer": torch.set_num_threads, "initargs": (torch.get_num_threads(),)}
    with ProcessPoolExecutor(2, mp_context=FORKS, **threads) as pool:
        others = [pool.submit(fill, tiny_folder, images, folder, share) for share in (range(8), range(10, 2, -1))]
        while not all(other.done() for other in others):
            assert equal(own.get([1, 9]), expected(anew, [1, 9]))
            time.sleep(0.005)
    assert sum(other.result() for other in others) + own.encoded >= 11
    later = make_cache(tiny_folder, images, folder=folder)
    assert equal(later.get(range(11)), expected(anew, list(range(11)))) and later.encoded == 0


def test_a_process_is_killed_while_it_fills(tiny_folder, images, anew, tmp_path):
    folder = tmp_path / "cache"
    process = start(fill, tiny_folder, images, folder, range(NUMBER))
    while not list(folder.glob("references-*")) and process.is_alive():
        time.sleep(0.002)
    time.sleep(np.random.default_rng(0).uniform(0, 0.05))
    kill(process)
    later = make_cache(tiny_folder, images, folder=folder)
    assert equal(later.get(range(NUMBER)), expected(anew, list(range(NUMBER))))


# Filling


def test_filling_shows_how_fast_it_goes(tiny_folder, images, capsys):
    cache = make_cache(tiny_folder, images)
    cache.fill([0, 1])
    assert not capsys.readouterr().err
    cache.fill([*range(NUMBER), 3], progress=True)
    shown = capsys.readouterr().err
    assert "references" in shown and "12/12" in shown and "image/s" in shown
    assert cache.encoded == NUMBER


def test_unreadable_images_are_named_or_passed_over(tiny_folder, images):
    (images / "04.png").write_bytes(b"no image")
    (images / "07.png").unlink()
    (images / "07.png").symlink_to("nowhere")
    cache = make_cache(tiny_folder, images)
    with pytest.raises(ImageError, match=r"04.png cannot be read as an image"):
        cache.get([3, 4])
    errors: dict[int, ImageError] = {}
    cache.fill(range(NUMBER), on_unreadable=errors.__setitem__)
    assert sorted(errors) == [4, 7] and "07.png" in str(errors[7])
    assert cache.encoded == NUMBER - 2


def test_a_pool_bounds_what_is_encoded(tiny_folder, images, anew, tmp_path):
    pool = ReferencePool(["bolt"] * NUMBER, ["C1"] * NUMBER, [False] * NUMBER, pool_size=4)
    cache = make_cache(tiny_folder, images, folder=tmp_path / "cache")
    cache.fill(pool.members)
    for seed in range(10):
        drawn = pool.draw("bolt", "C1", 8, np.random.default_rng(seed), exclude=seed)
        assert equal(cache.get(drawn), expected(anew, drawn))
    assert cache.encoded == 4
    (path,) = (tmp_path / "cache").iterdir()
    assert path.stat().st_blocks * 512 <= 8192 + 4 * (SLOT_BYTES + 4096)


# What can go wrong


def get_one_by_one(cache: ReferenceCache) -> None:
    for position in range(NUMBER):
        cache.get([position])


def test_a_full_disk_is_noticed_before_and_while_filling(tiny_folder, images, anew, mount_disk):
    small_disk = mount_disk("400k")
    make: dict[str, Any] = {"folder": small_disk, "memory_bytes": 0}
    (small_disk / "other").write_bytes(bytes(360_000))
    cache = make_cache(tiny_folder, images, **make)
    with pytest.raises(InputError, match=r"the disk has .* GB left, and 4.92e-05 GB of references are to be written"):
        cache.fill(range(NUMBER))
    assert cache.encoded == 0
    with pytest.raises(InputError, match=r"the disk (is full|has)"):
        get_one_by_one(cache)
    (small_disk / "other").unlink()
    later = make_cache(tiny_folder, images, **make)
    assert equal(later.get(range(NUMBER)), expected(anew, list(range(NUMBER))))
    assert 0 < later.encoded < NUMBER


def test_errors(tiny_folder, images, tmp_path):
    with pytest.raises(InputError, match="memory_bytes is -1, expected at least 0, or None"):
        make_cache(tiny_folder, images, memory_bytes=-1)
    with pytest.raises(InputError, match=r"got the positions \[-1, 12\], expected 0 to 11"):
        make_cache(tiny_folder, images).get([3, -1, 12])
    with pytest.raises(InputError, match="got no keys"):
        ReferenceCache(make_encoder(tiny_folder, images), [])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"references-\w{16}.bin cannot be opened or written"):
        make_cache(tiny_folder, images, folder=tmp_path / "file")
    make_cache(tiny_folder, images, folder=tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    os.truncate(path, 5000)
    with pytest.raises(InputError, match=r"is damaged, .*it has 5000 bytes, expected \d+. Delete it"):
        make_cache(tiny_folder, images, folder=tmp_path / "cache")


def test_memory_is_shared_by_the_processes_of_a_machine(tiny_folder, images, monkeypatch):
    alone = make_cache(tiny_folder, images)._room
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert 0 < make_cache(tiny_folder, images)._room < alone / 500


# Content keys: equal while an image stays as it is, different when it changes


def key_of(path: object = None, data: bytes | None = None) -> str:
    entry: dict[str, Any] = {"bytes": data, "path": None if path is None else str(path)}
    (key,) = content_keys([entry])
    return key


def test_key_of_a_file_changes_with_its_name_size_and_time(tmp_path: Path) -> None:
    path, other = tmp_path / "a.png", tmp_path / "b.png"
    for name in (path, other):
        name.write_bytes(b"content")
        os.utime(name, ns=(5, 5))
    before = key_of(path)
    assert before == key_of(path) != key_of(other)
    path.write_bytes(b"changed")
    os.utime(path, ns=(5, 6))
    touched = key_of(path)
    path.write_bytes(b"longer content")
    os.utime(path, ns=(5, 5))
    assert len({before, touched, key_of(path)}) == 3
    path.unlink()
    assert key_of(path).endswith("missing")


def test_key_of_bytes_is_of_the_bytes_alone() -> None:
    assert key_of(data=b"content") == key_of("some name", b"content") != key_of(data=b"Content")


def test_key_of_a_member_of_a_zip_is_of_its_content(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"

    def key_with(content: bytes) -> str:
        with zipfile.ZipFile(archive, "w") as opened:
            opened.writestr("bolt/OK/1.jpg", content)
        return key_of(f"zip://bolt/OK/1.jpg::{archive}")

    assert key_with(b"content") == key_with(b"content") != key_with(b"Content")
    with pytest.raises(InputError, match="has no member bolt/OK/2.jpg"):
        key_of(f"zip://bolt/OK/2.jpg::{archive}")
    archive.write_bytes(b"no zip")
    with pytest.raises(InputError, match="cannot be read as a zip"):
        key_of(f"zip://bolt/OK/1.jpg::{archive}")


def test_key_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="neither bytes nor a path"):
        key_of()


# Free memory: of this machine, and of made-up ones with control groups of both versions


MEGABYTE = 1024**2


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The root of a machine with 64 MB free."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(
        f"MemTotal: {99 * 1024} kB\nMemFree: 7 kB\nMemAvailable:   {64 * 1024} kB\n"
    )
    return tmp_path


def control_group(root: Path, names: tuple[str, str], limit: str, usage: int, statistics: str) -> None:
    for name, text in zip((*names, "memory.stat"), (limit, str(usage), statistics), strict=True):
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


V2 = ("memory.max", "memory.current")


def test_free_memory_of_this_machine():
    assert 0 < free_memory() < 2**50


def test_free_memory_without_control_groups(machine):
    assert free_memory(machine) == 64 * MEGABYTE


def test_free_memory_in_a_group_that_has_less_left_than_the_machine(machine):
    control_group(machine, V2, str(40 * MEGABYTE), 30 * MEGABYTE, f"anon 5\ninactive_file {8 * MEGABYTE}")
    assert free_memory(machine) == 18 * MEGABYTE


def test_free_memory_in_a_group_without_a_limit(machine):
    control_group(machine, V2, "max", 30 * MEGABYTE, "")
    assert free_memory(machine) == 64 * MEGABYTE


def test_free_memory_in_a_group_that_is_full(machine):
    control_group(machine, V2, "1000", 2000, "")
    assert free_memory(machine) == 0


def test_free_memory_in_a_group_of_version_1(machine):
    folder = machine / "sys/fs/cgroup/memory"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{20 * MEGABYTE}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{10 * MEGABYTE}\n")
    (folder / "memory.stat").write_text(f"total_inactive_file {MEGABYTE}\n")
    assert free_memory(machine) == 11 * MEGABYTE


def test_free_memory_of_a_system_without_proc(tmp_path):
    assert free_memory(tmp_path) > 2**26
