"""A headless Chromium that opens pages and tells what went wrong on them, over its DevTools protocol on a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SECONDS = 60.0
_OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    # Whatever a page asks for: no request leaves this machine.
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--no-proxy-server", "--remote-debugging-pipe"),
)
_PICTURES = """Promise.all([...document.images].map(async image => ({
    source: image.src.slice(0, 80),
    complete: image.complete,
    width: image.naturalWidth,
    decoded: await image.decode().then(() => true, () => false),
})))"""


@dataclass(frozen=True)
class Visit:
    """What was seen of a page.

    Attributes:
        url: of the page.
        errors: of the console, uncaught ones too.
        requests: addresses that were asked for.
        pictures: of every ``img`` source, complete, width and decoded.
        values: of the expressions that were asked for.
    """

    url: str
    errors: list[str]
    requests: list[str]
    pictures: list[dict[str, Any]]
    values: list[Any]

    def faults(self) -> list[str]:
        """Everything that a page that needs nothing else must not have."""
        strange = [url for url in self.requests if url != self.url and not url.startswith("data:")]
        broken = [one for one in self.pictures if not (one["complete"] and one["width"] > 0 and one["decoded"])]
        return [
            *(f"console: {text}" for text in self.errors),
            *(f"request: {url}" for url in strange),
            *(f"picture: {one['source']}" for one in broken),
        ]


class Browser:
    """A running Chromium.

    Args:
        inbox, outbox: the ends of its pipes that are read, and written to.
    """

    def __init__(self, inbox: int, outbox: int) -> None:
        self._inbox, self._outbox = inbox, outbox
        self._buffer, self._calls = b"", 0
        self._events: list[dict[str, Any]] = []

    def visit(self, page: Path, *expressions: str, dark: bool = False) -> Visit:
        """Opens a file, waits until it has loaded and all its pictures are decoded.

        Args:
            page: HTML.
            expressions: JavaScript, whose values are wanted.
            dark: whether the page is to be dark.
        """
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._events.clear()
        for domain in ("Runtime", "Log", "Network", "Page"):
            self._call(f"{domain}.enable", session)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", session, features=[scheme])
        self._call("Page.navigate", session, url=page.as_uri())
        self._wait_for("Page.loadEventFired")
        pictures = self._value(session, _PICTURES)
        values = [self._value(session, one) for one in expressions]
        events = [event for event in self._events if event.get("sessionId") == session]
        self._call("Target.closeTarget", targetId=target)
        return Visit(page.as_uri(), _errors(events), _requests(events), pictures, values)

    def _value(self, session: str, expression: str) -> Any:
        options = {"awaitPromise": True, "returnByValue": True}
        answer = self._call("Runtime.evaluate", session, expression=expression, **options)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"]["value"]

    def _call(self, method: str, session: str | None = None, **values: Any) -> dict[str, Any]:
        self._calls += 1
        call = {"id": self._calls, "method": method, "params": values} | ({"sessionId": session} if session else {})
        _write_all(self._outbox, json.dumps(call).encode() + b"\0")
        while (message := self._next()).get("id") != self._calls:
            self._events.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def _wait_for(self, event: str) -> None:
        while not any(one["method"] == event for one in self._events):
            self._events.append(self._next())

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + _SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._inbox], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError(f"the browser said nothing for {_SECONDS:g} s")
            if not (read := os.read(self._inbox, 1 << 20)):
                raise RuntimeError("the browser has ended; what it said is in its folder, stderr.txt")
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


def find_chromium() -> str | None:
    """The path of Chromium, if it is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def running(program: str, folder: Path) -> Iterator[Browser]:
    """Runs Chromium, with all that it keeps in a folder."""
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    # It reads from descriptor 3 and writes to 4.
    start = f'exec "$@" 3<&{command_read} 4>&{answer_write}'
    arguments = ["bash", "-c", start, "bash", program, *_OPTIONS, f"--user-data-dir={folder / 'profile'}"]
    with (folder / "stderr.txt").open("wb") as stderr:
        process = subprocess.Popen(
            arguments, pass_fds=(command_read, answer_write), stderr=stderr, env=os.environ | {"HOME": str(folder)}
        )
    os.close(command_read)
    os.close(answer_write)
    try:
        yield Browser(answer_read, command_write)
    finally:
        os.close(command_write)  # it ends when nobody can tell it anything any more
        os.close(answer_read)
        try:
            process.wait(_SECONDS / 6)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _errors(events: list[dict[str, Any]]) -> list[str]:
    errors = []
    for event in events:
        values = event["params"]
        if event["method"] == "Runtime.exceptionThrown":
            errors.append(str(values["exceptionDetails"]))
        elif event["method"] == "Runtime.consoleAPICalled" and values["type"] in ("error", "assert", "warning"):
            errors.append(str(values["args"]))
        elif event["method"] == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            errors.append(values["entry"]["text"])
    return errors


def _requests(events: list[dict[str, Any]]) -> list[str]:
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [values["request"]["url"] for values in sent]


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
