"""Scoring without an end: what arrives in a folder, a line of results for each image, a line of latencies a minute."""

import contextlib
import queue
import signal
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch

from adpretrain_hf.cli.arrivals import Arrival, Arrivals
from adpretrain_hf.cli.done import JsonLines
from adpretrain_hf.errors import InputError, MissingPathError, reason
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.images import ImageState
from adpretrain_hf.scoring import ScoredImage

_UNUSABLE = (InputError, MemoryError, torch.OutOfMemoryError)  # what one image can cause
_PATIENCE = 60.0  # seconds for which a file that the system does not give is tried again
_MOST_KEPT = 100_000  # results that wait for room on the disk; the images after them wait in their folder


class Service:
    """Scores what arrives until a signal stops it, and appends a line for every image to ``results.jsonl``.

    Args:
        extractor: with its reference.
        args: ``folder``, ``output``, ``interval``, ``settle``, ``batch_size`` and ``false_alarms`` of ``watch``.
    """

    def __init__(self, extractor: ADPretrainFeatureExtractor, args: Namespace) -> None:
        self._extractor, self._args = extractor, args
        self._lines = JsonLines(args.output / "results.jsonl")
        self._arrivals = Arrivals(args.folder, args.settle, self._before())
        self._kept = deque[dict[str, Any]]()  # results that are not written yet
        self._latencies, self._errors, self._minute = list[float](), 0, time.monotonic()
        self._troubles = set[str]()
        self._signals = queue.SimpleQueue[int]()  # which, unlike a lock, a signal may enter while it is waited for

    def run(self) -> None:
        """Returns after SIGTERM, when the images at hand are done and written.

        Raises:
            KeyboardInterrupt: it was SIGINT.
            InputError: results could not be written until the end.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if hasattr(signal, "SIGIO"):  # it comes when a file is opened in the instant of its lease, and would kill
            signal.signal(signal.SIGIO, signal.SIG_IGN)
        _say(f"watching {self._args.folder}; results go to {self._lines.path}")
        while self._signals.empty():
            done = self._score(self._look())
            self._write()
            if time.monotonic() - self._minute >= 60:
                self._tell_latencies()
            if not done:
                with contextlib.suppress(queue.Empty):
                    self._signals.put(self._signals.get(timeout=self._args.interval))
        self._tell_latencies()
        if self._kept:
            left = f"{len(self._kept)} results could not be written to {self._lines.path}"
            raise InputError(f"{left}: free some space; the same command scores their images again")
        if self._signals.get() == signal.SIGINT:
            raise KeyboardInterrupt

    def _on_signal(self, number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait
        self._signals.put(number)

    def _before(self) -> Iterator[tuple[str, ImageState]]:
        for line in self._lines:
            match line:
                case {"image": str(name), "size": int(size), "modified": int(modified)}:
                    yield name, (size, modified)

    def _look(self) -> list[Arrival]:
        """The next batch of what is there."""
        if len(self._kept) >= _MOST_KEPT:
            return []
        try:
            found = self._arrivals.look()
        except InputError as error:
            self._tell(str(self._args.folder), str(error))
            return []
        self._tell(str(self._args.folder))
        return found[: self._args.batch_size]

    def _score(self, batch: Sequence[Arrival]) -> int:
        """Scores images, and returns how many are done; those that may be whole later are tried again."""
        if not batch:
            return 0
        scored, errors = list[ScoredImage](), dict[str, BaseException]()
        try:
            images = [(one.name, one.path) for one in batch]
            options: dict[str, Any] = {"batch_size": len(batch), "progress": False, "on_error": errors.__setitem__}
            scored = list(self._extractor.score_stream(images, **options))
        except _UNUSABLE as error:
            if len(batch) > 1:
                return sum(self._score([one]) for one in batch)
            errors = {batch[0].name: error}
        results = {one.image.name: self._judge(one) for one in scored}
        final = (one.name for one in batch if self._is_final(one, errors.get(one.name)))
        results |= {name: {"error": str(errors[name])} for name in final}
        for one in batch:
            if one.name in results:
                self._note(one, results[one.name])
            else:
                one.tries += 1
        return len(results)

    def _judge(self, scored: ScoredImage) -> dict[str, Any]:
        score, calibration = scored.score, scored.judgement.calibration
        if calibration is None:
            return {"score": score}
        alpha = self._args.false_alarms
        anomalous, confidence = calibration.is_anomalous(score, alpha), calibration.confidence(score, alpha)
        return {"score": score, "p_value": calibration.p_value(score), "anomalous": anomalous, "confidence": confidence}

    def _is_final(self, one: Arrival, error: BaseException | None) -> bool:
        """Whether an error stands: not if the image is gone, may still be written, or lies on a share that is away."""
        if error is None or isinstance(error, MissingPathError):
            return False
        is_refused = getattr(error.__cause__, "errno", None) is not None
        patience = _PATIENCE if is_refused else self._args.settle
        return time.monotonic() - one.since >= patience

    def _note(self, one: Arrival, result: dict[str, Any]) -> None:
        latency, (size, modified) = time.monotonic() - one.noticed, one.state
        about = {"image": one.name, "size": size, "modified": modified}
        when = {"latency_ms": round(1000 * latency, 1), "time": _now()}
        self._kept.append(about | result | when)
        if "error" in result:
            self._errors += 1
        else:
            self._latencies.append(latency)
        self._arrivals.done(one)

    def _write(self) -> None:
        """Appends what there is; on a full disk it is kept, and tried again the next time."""
        try:
            while self._kept:
                self._lines.append(self._kept[0])
                self._kept.popleft()
        except OSError as error:
            self._tell(str(self._lines.path), reason(error))
        else:
            self._tell(str(self._lines.path))

    def _tell(self, path: str, trouble: str = "") -> None:
        """Says once that a path cannot be used, and once that it can be again."""
        if trouble and path not in self._troubles:
            self._troubles.add(path)
            _say(f"{path} cannot be used, and is tried again until it can: {trouble}")
        elif not trouble and path in self._troubles:
            self._troubles.remove(path)
            _say(f"{path} can be used again")

    def _tell_latencies(self) -> None:
        seconds, count = time.monotonic() - self._minute, len(self._latencies)
        text = f"{_now()} {count} images scored, {count / max(seconds, 1e-9):.1f} images/s"
        if count:
            text += ", latency p50 {:.0f} ms, p90 {:.0f} ms, p99 {:.0f} ms".format(
                *1000 * np.percentile(self._latencies, (50, 90, 99))
            )
        _say(f"{text}, {self._errors} errors, {len(self._arrivals)} waiting")
        self._latencies, self._errors, self._minute = [], 0, time.monotonic()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # where messages go to the disk that is full
        print(text, file=sys.stderr, flush=True)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
