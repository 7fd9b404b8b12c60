"""``adpretrain watch`` as a service: what it takes, what it leaves, and what it survives."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adpretrain_hf.cli import main
from adpretrain_hf.cli.arrivals import Arrivals
from adpretrain_hf.cli.done import JsonLines
from tests.conftest import random_image
from tests.processes import kill, start

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are sent otherwise")
SETTLE = 0.5


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


class Watch:
    """The command at work in a process of its own."""

    def __init__(self, bundle: Path, camera: Path, bank: Path, output: Path, *options: object) -> None:
        words = ["watch", bundle, camera, "--reference", bank, "--output", output, "--settle", SETTLE, *options]
        self.results, self.log = output / "results.jsonl", output.with_suffix(".log")
        self.process = start(main, [str(word) for word in (*words, "--interval", 0.05)], stderr=self.log)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def lines(self, number: int) -> list[dict[str, Any]]:
        """Waits until there are so many lines, whole ones all the time, and no more."""

        def whole() -> list[dict[str, Any]]:
            assert self.process.is_alive(), self.said()
            return read(self.results)

        wait_for(lambda: len(whole()) >= number)
        assert len(whole()) == number
        return whole()

    def stop(self, by: int = signal.SIGTERM) -> int | None:
        wait_for(lambda: "watching" in self.said())
        os.kill(self.process.pid, by)
        self.process.join(60)
        return self.process.exitcode


def read(results: Path) -> list[dict[str, Any]]:
    text = results.read_text() if results.exists() else ""
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines() if line != HALF]


HALF = '{"image": "0.png", "si'


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    (tmp_path / "camera").mkdir()
    return tmp_path / "camera"


@pytest.fixture
def watch(bundle: Path, camera: Path, bank: Path, tmp_path: Path) -> Iterator[Callable[..., Watch]]:
    started: list[Watch] = []

    def start_one(*options: object, output: Path = tmp_path / "out", reference: Path = bank) -> Watch:
        started.append(Watch(bundle, camera, reference, output, *options))
        return started[-1]

    yield start_one
    for one in started:
        kill(one.process)


def arrive(camera: Path, name: str, seed: int) -> Path:
    """As a careful writer does it: under another name first."""
    path = camera / name
    path.parent.mkdir(exist_ok=True)
    random_image(seed).save(path.with_name("half"), format="png")
    return path.with_name("half").rename(path)


def test_what_arrives_is_scored_until_sigterm(watch, camera, bank, extractor):
    (camera / "3.png.part").write_bytes(b"to be left alone")
    (camera / ".4.png").write_bytes(b"to be left alone")
    one = watch()
    arrive(camera, "0.png", 0)
    one.lines(1)
    arrive(camera, "today/1.png", 1)
    lines = one.lines(2)
    assert one.stop() == 0
    assert [line["image"] for line in lines] == ["0.png", "today/1.png"]
    expected = extractor.set_reference(bank).score([random_image(0), random_image(1)]).scores.tolist()
    assert [line["score"] for line in lines] == pytest.approx(expected, abs=1e-6)
    status = (camera / "0.png").stat()
    assert (lines[0]["size"], lines[0]["modified"]) == (status.st_size, status.st_mtime_ns)
    assert all(line["latency_ms"] > 0 and "anomalous" not in line for line in lines)
    last = one.said().splitlines()[-1]
    assert " 2 images scored, " in last and "latency p50 " in last and last.endswith(" 0 errors, 0 waiting")


def test_a_file_is_not_taken_while_it_is_written(watch, camera, bank, extractor):
    file = io.BytesIO()
    random_image(0, 200, 200).save(file, format="bmp")  # which is not known by its end, as other formats are
    data, one = file.getvalue(), watch()
    wait_for(lambda: "watching" in one.said())
    with (camera / "0.bmp").open("wb", buffering=0) as slow:
        for place in range(0, len(data), 10_000):
            slow.write(data[place : place + 10_000])
            time.sleep(SETTLE / 5)
            assert one.lines(0) == []
    (line,) = one.lines(1)
    expected = extractor.set_reference(bank).score(random_image(0, 200, 200)).scores.item()
    assert line["score"] == pytest.approx(expected, abs=1e-6)


def test_a_restart_does_nothing_twice_and_sees_what_was_replaced(watch, camera):
    for number in range(3):
        arrive(camera, f"{number}.png", number)
    one = watch()
    before = one.lines(3)
    kill(one.process)
    with one.results.open("a") as file:
        file.write(HALF)  # as if the machine had gone down
    arrive(camera, "1.png", 11)
    again = watch()
    arrive(camera, "3.png", 3)
    lines = wait_for(lambda: again.results.read_text().count("\n") == 6) and again.lines(5)
    assert lines[:3] == before
    assert sorted(line["image"] for line in lines[3:]) == ["1.png", "3.png"]
    arrive(camera, "3.png", 33)
    assert again.lines(6)[-1]["image"] == "3.png"
    assert again.stop() == 0


def test_a_bad_file_is_a_line_and_costs_no_other(watch, camera):
    (camera / "0.png").write_text("not an image")
    random_image(9, 5, 5).save(camera / "1.png")
    one = watch()
    arrive(camera, "2.png", 2)
    lines = {line["image"]: line for line in one.lines(3)}
    assert "0.png cannot be read as an image" in lines["0.png"]["error"]
    assert "smaller than one patch" in lines["1.png"]["error"]
    assert "score" not in lines["1.png"] and lines["2.png"]["score"] > 0
    assert one.stop() == 0
    assert " 1 images scored, " in one.said() and "2 errors, 0 waiting" in one.said()


def test_a_full_disk_costs_no_result(watch, camera, mount_disk):
    disk = mount_disk("64k")
    one = watch(output=disk / "out")
    arrive(camera, "0.png", 0)
    one.lines(1)
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(b"." * 512):
            pass
    for number in range(1, 40):  # more than the page that the file has already
        arrive(camera, f"{number}.png", number)
    wait_for(lambda: "results.jsonl cannot be used" in one.said())
    assert len(read(one.results)) < 40
    (disk / "filler").unlink()
    assert sorted(line["image"] for line in one.lines(40)) == sorted(f"{number}.png" for number in range(40))
    assert one.stop() == 0


def test_a_folder_that_is_away_for_a_while(watch, camera):
    one = watch()
    arrive(camera, "0.png", 0)
    one.lines(1)
    away = camera.rename(camera.with_name("away"))
    wait_for(lambda: f"{camera} cannot be used, and is tried again" in one.said())
    away.rename(camera)
    wait_for(lambda: f"{camera} can be used again" in one.said())
    arrive(camera, "1.png", 1)
    assert [line["image"] for line in one.lines(2)] == ["0.png", "1.png"]
    assert one.said().count("cannot be used") == 1


def test_a_calibrated_reference_decides_and_ctrl_c_is_130(watch, camera, extractor, tmp_path):
    normal = [random_image(number) for number in range(9)]
    bank = extractor.make_reference([random_image(100), random_image(101)], calibrate=normal)
    bank.save(tmp_path / "calibrated.safetensors")
    one = watch("--false-alarms", 0.5, reference=tmp_path / "calibrated.safetensors")
    path = arrive(camera, "0.png", 50)
    (line,) = one.lines(1)
    result = extractor.set_reference(bank).score(path)
    assert line["anomalous"] is result.is_anomalous(0.5).item()
    assert line["p_value"] == result.p_values.item()
    assert line["confidence"] == bank.judgement.calibration.confidence(result.scores.item(), 0.5)
    assert one.stop(signal.SIGINT) == 130
    assert "stopped; the same command goes on from here" in one.said()


def test_decisions_of_another_calibration_are_not_mixed_in(watch, camera, image_folder):
    assert watch("--calibrate", image_folder).stop() == 0
    again = watch("--calibrate", image_folder / "sub")
    again.process.join(30)
    assert again.process.exitcode == 1 and "holds results of other settings" in again.said()
    assert watch("--calibrate", *sorted(image_folder.rglob("*.*g"), reverse=True)).stop() == 0  # the same images


def test_what_cannot_begin_is_refused(bundle, camera, bank, tmp_path, capsys):
    words = ["watch", bundle, camera, "--reference", bank, "--output", tmp_path / "out", "--false-alarms", 0.1]
    assert main([str(word) for word in words]) == 1
    assert "a decision needs a calibrated reference" in capsys.readouterr().err
    words[2] = tmp_path / "missing"
    assert main([str(word) for word in words]) == 1
    assert f"no such folder: {tmp_path / 'missing'}" in capsys.readouterr().err


# Which images have arrived


def test_a_file_is_whole_when_nobody_writes_it_or_when_it_has_settled(camera):
    patient, quick = Arrivals(camera, 3600), Arrivals(camera, 0.1)
    with (camera / "0.png").open("wb") as file:
        assert [patient.look(), quick.look()] == [[], []]
        file.write(b"more")
        file.flush()
        time.sleep(0.15)
        assert quick.look() == []  # it has changed since
        time.sleep(0.15)
        assert [one.name for one in quick.look()] == ["0.png"] and patient.look() == []
    if not patient.look():
        pytest.skip("the file system grants no leases")
    assert [one.name for one in patient.look()] == ["0.png"]


def test_done_images_are_not_new_until_they_change(camera):
    arrivals = Arrivals(camera, 1e-3, iter([("0.png", (1, 1)), ("gone.png", (1, 1))]))
    assert arrivals.look() == []
    first, second = (arrive(camera, f"{number}.png", number) for number in range(2))
    os.utime(second, (0, 0))
    arrivals.look()
    time.sleep(0.01)
    found = arrivals.look()
    assert [one.name for one in found] == ["1.png", "0.png"] and len(arrivals) == 2  # the older one first
    for one in found:
        arrivals.done(one)
    assert arrivals.look() == [] and len(arrivals) == 0
    away = camera.rename(camera.with_name("away"))
    camera.mkdir()  # as a share that is not mounted
    assert arrivals.look() == []
    camera.rmdir()
    away.rename(camera)
    assert arrivals.look() == []
    (camera / "line").mkdir()
    arrive(camera, "line/2.png", 2)
    arrivals.look()
    time.sleep(0.01)
    arrivals.done(arrivals.look()[0])
    shutil.move(camera / "line", camera.with_name("line"))
    (camera / "line").mkdir()  # a share within the folder
    assert arrivals.look() == []
    (camera / "line").rmdir()
    shutil.move(camera.with_name("line"), camera / "line")
    assert arrivals.look() == []
    os.utime(second, (1, 1))  # replaced a second later, by a clock of seconds
    arrivals.look()
    time.sleep(0.01)
    assert [one.name for one in arrivals.look()] == ["1.png"]
    first.write_bytes(b"other")
    arrivals.look()
    time.sleep(0.01)
    assert [one.name for one in arrivals.look()] == ["1.png", "0.png"]


def test_a_line_that_does_not_fit_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    lines = JsonLines(tmp_path / "lines")
    lines.append([1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            lines.append(["x" * 200])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert lines.path.read_bytes() == b"[1]\n"
    lines.append([2])
    assert list(lines) == [[1], [2]]
