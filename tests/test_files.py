"""Atomic writing: whole or not there, nothing left behind, the user's permissions."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adpretrain_hf.files import atomic_path, remove, write_text


class StopError(Exception):
    """What interrupts a writer in these tests."""


def tree(folder: Path) -> dict[str, str | None]:
    """All files (with their text) and folders below a folder, also hidden ones."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=lambda mask: f"umask {mask:03o}")
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Files


def test_a_file_is_written(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "new" / "deep" / "file.txt") as temporary:
        assert temporary.parent == tmp_path / "new" / "deep"
        temporary.write_text("content")
        assert not (tmp_path / "new" / "deep" / "file.txt").exists()
    assert tree(tmp_path / "new" / "deep") == {"file.txt": "content"}


def test_a_path_may_be_text(tmp_path: Path) -> None:
    with atomic_path(str(tmp_path / "file.txt")) as temporary:
        temporary.write_text("content")
    assert tree(tmp_path) == {"file.txt": "content"}


def test_the_temporary_is_hidden_and_has_the_same_ending(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "scores.tar.gz") as temporary:
        assert temporary.name.startswith(".") and temporary.suffix == ".gz"
        assert len(temporary.name) <= len("scores.tar.gz")
        assert not temporary.exists()
        temporary.touch()


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert tree(tmp_path) == {"file.txt": "new"}


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("existing", [True, False])
def test_an_error_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, error: type[BaseException], existing: bool
) -> None:
    path = tmp_path / "file.txt"
    if existing:
        path.write_text("old")
    before = tree(tmp_path)
    with pytest.raises(error), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise error
    assert tree(tmp_path) == before


def test_a_writer_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("old")
    with pytest.raises(OSError, match="file.txt"), atomic_path(tmp_path / "file.txt"):
        pass
    assert tree(tmp_path) == {"file.txt": "old"}


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "0" * 100_000)
    seen, done = set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            text = path.read_text()
            seen.add((text[:1], len(text), len(set(text))))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        write_text(path, str(number % 10) * 100_000)
    done.set()
    reader.join()
    assert seen and {(length, kinds) for _, length, kinds in seen} == {(100_000, 1)}


def test_several_writers_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    writers = [threading.Thread(target=write_text, args=(path, str(n) * 10_000)) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert list(tree(tmp_path)) == ["file.txt"]
    text = path.read_text()
    assert len(text) == 10_000 and len(set(text)) == 1


def test_two_writers_of_one_file_do_not_share_a_temporary(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "file.txt") as first, atomic_path(tmp_path / "file.txt") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert tree(tmp_path) == {"file.txt": "first"}


# Folders


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "backbone"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "stale.txt").write_text("old")
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        (temporary / "weights.txt").write_text("new")
        assert tree(folder) == {"sub": None, "sub/stale.txt": "old"}
    assert tree(tmp_path) == {"backbone": None, "backbone/weights.txt": "new"}


def test_an_error_leaves_the_old_folder_and_no_temporary(tmp_path: Path) -> None:
    folder = tmp_path / "backbone"
    folder.mkdir()
    (folder / "weights.txt").write_text("old")
    before = tree(tmp_path)
    with pytest.raises(StopError), atomic_path(folder) as temporary:  # noqa: PT012
        (temporary / "sub").mkdir(parents=True)
        (temporary / "sub" / "weights.txt").write_text("half")
        raise StopError
    assert tree(tmp_path) == before


def test_a_folder_takes_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "backbone").write_text("a file")
    with atomic_path(tmp_path / "backbone") as temporary:
        temporary.mkdir()
    assert tree(tmp_path) == {"backbone": None}


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "valuable.txt").write_text("kept")
    with pytest.raises(OSError, match="results"):
        write_text(tmp_path / "results", "a file")
    assert tree(tmp_path) == {"results": None, "results/valuable.txt": "kept"}


def test_a_folder_takes_the_place_of_a_link_to_a_folder(tmp_path: Path) -> None:
    """Several bundles may share one backbone by links; saving one must not touch the shared one."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "weights.txt").write_text("shared")
    link = tmp_path / "bundle" / "backbone"
    link.parent.mkdir()
    link.symlink_to(shared, target_is_directory=True)
    with atomic_path(link) as temporary:
        temporary.mkdir()
        (temporary / "weights.txt").write_text("own")
    assert (link / "weights.txt").read_text() == "own"
    assert tree(shared) == {"weights.txt": "shared"}
    assert [path.name for path in link.parent.iterdir()] == ["backbone"]


# Permissions


def test_a_files_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "file.txt"
    with atomic_path(path) as temporary:
        temporary.touch(mode=0o600)  # as writers do that make temporary files themselves
    assert permissions(path) == 0o666 & ~umask


def test_an_old_files_permissions_do_not_stay(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "file.txt"
    path.touch()
    path.chmod(0o600)
    write_text(path, "new")
    assert permissions(path) == 0o666 & ~umask


def test_a_folders_files_follow_the_umask(tmp_path: Path, umask: int) -> None:
    with atomic_path(tmp_path / "backbone") as temporary:
        (temporary / "sub").mkdir(parents=True)
        (temporary / "weights.bin").touch(mode=0o600)
        (temporary / "sub" / "config.json").touch(mode=0o600)
    folder = tmp_path / "backbone"
    assert permissions(folder) == permissions(folder / "sub") == 0o777 & ~umask
    assert permissions(folder / "weights.bin") == permissions(folder / "sub" / "config.json") == 0o666 & ~umask


# Text, and removing


def test_text_is_utf8_with_plain_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt", "Größe µm → 1\n")
    assert (tmp_path / "text.txt").read_bytes() == "Größe µm → 1\n".encode()


def test_remove(tmp_path: Path) -> None:
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "sub" / "file.txt").touch()
    (tmp_path / "file.txt").touch()
    for name in ("folder", "file.txt", "never-there"):
        remove(tmp_path / name)
    assert tree(tmp_path) == {}


def test_removing_a_link_keeps_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file.txt").touch()
    for target in ("folder/file.txt", "folder", "nowhere"):
        link = tmp_path / "link"
        link.symlink_to(tmp_path / target)
        remove(link)
        assert not link.is_symlink()
    assert (tmp_path / "folder" / "file.txt").exists()
