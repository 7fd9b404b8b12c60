"""SlotFile: what is read is what was written, whatever happened in between."""

from __future__ import annotations

import os
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adpretrain_hf.errors import InputError
from tests.processes import kill, start
from training.data.slots import SlotFile, identified
from training.data.table import content_keys

SHAPE = (2, 3, 4)


def open_file(path: Path, **changes: Any) -> SlotFile:
    return SlotFile(path, **({"slots": 10, "shape": SHAPE, "dtype": torch.float16} | changes))


def values(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    file = open_file(tmp_path / "new" / "a.bin", dtype=dtype)
    assert [file.read(slot) for slot in range(10)] == [None] * 10
    for slot in (7, 0, 9):
        assert torch.equal(file.write(slot, values(slot, dtype=dtype)), values(slot, dtype=dtype))
    for slot in range(10):
        found = file.read(slot)
        assert found is None if slot not in (7, 0, 9) else torch.equal(found, values(slot, dtype=dtype))


def test_another_object_sees_it_at_once(tmp_path: Path) -> None:
    first, second = open_file(tmp_path / "a.bin"), open_file(tmp_path / "a.bin")
    first.write(4, values(4))
    assert torch.equal(second.read(4), values(4)) and second.read(5) is None


def test_it_is_sparse(tmp_path: Path) -> None:
    open_file(tmp_path / "a.bin", slots=10**6, shape=(4, 256, 64)).write(0, values(0, (4, 256, 64)))
    status = (tmp_path / "a.bin").stat()
    assert status.st_size > 1e11 and status.st_blocks * 512 < 1e6


def test_a_slot_counts_only_with_its_entry_and_intact(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.bin"
    open_file(path).write(3, values(3))
    whole = path.read_bytes()
    path.write_bytes(bytes(80) + whole[80:])  # killed before the entry was written
    assert open_file(path).read(3) is None and not caplog.records
    start = len(whole) - 7 * 48
    for torn in (start, start + 47, 3 * 8 + 1):  # a page that did not reach the disk, a bad block, half an entry
        path.write_bytes(whole[:torn] + bytes([whole[torn] ^ 255]) + whole[torn + 1 :])
        file = open_file(path)
        assert file.read(3) is None
        assert "slot 3 are damaged" in caplog.text
        assert torch.equal(file.write(3, values(3)), values(3)) and path.read_bytes() == whole


def test_threads_make_and_fill_it_at_the_same_time(tmp_path: Path) -> None:
    barrier, errors = threading.Barrier(8), []

    def fill() -> None:
        try:
            barrier.wait()
            file = open_file(tmp_path / "a.bin")
            for slot in np.random.default_rng().permutation(10).tolist():
                found = file.read(slot)
                errors.extend([] if found is None or torch.equal(found, values(slot)) else [slot])
                file.write(slot, values(slot))
        except InputError as error:
            errors.append(error)

    threads = [threading.Thread(target=fill) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(open_file(tmp_path / "a.bin").read(slot), values(slot)) for slot in range(10))


MANY = {"slots": 80, "shape": (2**20,)}


def fill_many(path: Path) -> None:
    file = open_file(path, **MANY)
    for slot in range(80):
        file.write(slot, torch.full((2**20,), slot + 1.0, dtype=torch.float16))


def test_killed_at_any_moment_no_half_slot_counts(tmp_path: Path) -> None:
    counts, random = [], np.random.default_rng(0)
    for number in range(4):
        path = tmp_path / f"{number}.bin"
        writer = start(fill_many, path)
        while not path.exists():
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.1))
        kill(writer)
        file = open_file(path, **MANY)
        found = [file.read(slot) for slot in range(80)]
        counts.append(sum(one is not None for one in found))
        assert all(one is None or bool((one == slot + 1).all()) for slot, one in enumerate(found))
        path.unlink()
    assert min(counts) < 80


def test_what_differs_in_anything_has_a_file_of_its_own(tmp_path: Path) -> None:
    one, *others = (identified(tmp_path / "a.bin", *what) for what in (("x", 1), ("y", 1), ("x", 2), ("x",), ("x1",)))
    assert one == identified(tmp_path / "a.bin", "x", 1)
    assert len({one, *others}) == 5 and one.parent == tmp_path and one.suffix == ".bin"


def test_opened_again_it_keeps_what_is_there_and_what_was_cut_off_is_made_again(tmp_path: Path) -> None:
    file = open_file(tmp_path / "a.bin")
    file.write(0, values(0))
    assert torch.equal(open_file(tmp_path / "a.bin").values, file.values)
    os.truncate(tmp_path / "a.bin", 4000)
    assert open_file(tmp_path / "a.bin").read(0) is None


def test_made_but_not_yet_sized_by_a_process_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.touch()
    assert torch.equal(open_file(path).write(0, values(0)), values(0))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"a.bin cannot be opened or written: .*choose another folder"):
        open_file(tmp_path / "file" / "a.bin")


def fill(file: SlotFile, shape: tuple[int, ...]) -> None:
    for slot in range(10):
        file.write(slot, values(slot, shape))


def test_a_full_disk_is_an_error_not_a_crash(mount_disk: Callable[[str], Path]) -> None:
    small_disk = mount_disk("400k")
    shape = (64, 1024)  # 128 kB
    file = open_file(small_disk / "a.bin", shape=shape)
    with pytest.raises(InputError, match=r"the disk has .* GB left, and 0.00131 GB are to be written"):
        file.check_room(10)
    file.check_room(1)
    with pytest.raises(InputError, match=r"a.bin cannot be opened or written: .*No space left.*takes 0.131 MB"):
        fill(file, shape)
    again = open_file(small_disk / "a.bin", shape=shape)
    found = [again.read(slot) for slot in range(10)]
    assert sum(one is not None for one in found) == 3
    assert all(one is None or torch.equal(one, values(slot, shape)) for slot, one in enumerate(found))


# Keys of contents


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
