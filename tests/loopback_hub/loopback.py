"""An HTTP/1.1 server on loopback that can misbehave on order: routes, request log, ranges, faults; it knows no Hub."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 1 << 20


class HTTPError(Exception):
    """Answered as a JSON error with these headers."""

    def __init__(self, status: int, message: str, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, headers


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, handler: type, owner, port: int = 0):
        super().__init__(("127.0.0.1", port), handler)
        self.owner, self.url = owner, f"http://127.0.0.1:{self.server_address[1]}"

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of a client that is gone, which would land in the output of whatever test runs by then."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Faults:
    """Rules, each good for a number of requests; the first whose pattern matches "METHOD /path" is taken."""

    def __init__(self):
        self.rules, self.log, self.lock = [], [], threading.RLock()

    def fault(self, match: str, times: int = 1, **action) -> None:
        """What the next requests that match suffer; one of:

        page=200 (an HTML page with this status)
        status=503 [, headers={...}]    delay=SECONDS    rate=BYTES_PER_SECOND    corrupt=True (one bit, same length)
        truncate=BYTES (a shorter file, whole to HTTP)
        drop_after=BYTES of the body, 0: before the status line [, reset=True: RST for FIN]
        lose_answer=True (the request is carried out, its JSON answer never comes)
        """
        self.rules.append({"match": match, "times": times, **action})

    def take(self, request: str) -> dict:
        with self.lock:
            for rule in self.rules:
                if rule["times"] > 0 and re.search(rule["match"], request):
                    rule["times"] -= 1
                    return rule
        return {}


class Handler(BaseHTTPRequestHandler):
    """A subclass gives ROUTES: (methods, compiled pattern of the raw path, method for the unquoted groups)."""

    ROUTES: list = []
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def dispatch(self) -> None:
        url, owner = urlsplit(self.path), self.server.owner
        self.query, self.unread, self.fault = (
            parse_qs(url.query),
            self.body_chunks(),
            owner.take(f"{self.command} {url.path}"),
        )
        self.entry = {
            "method": self.command,
            "path": self.path,
            "status": None,
            "server": self.server,
            "auth": self.headers.get("Authorization"),
            "range": self.headers.get("Range"),
        }
        owner.log.append(self.entry)
        try:
            time.sleep(self.fault.get("delay", 0))
            if self.fault.get("drop_after") == 0:
                return self.hang_up()
            if self.fault.get("page"):
                page = b"<!DOCTYPE html><title>Log in to the network</title>"
                self.start_reply(self.fault["page"], len(page), {"Content-Type": "text/html"})
                return self.wfile.write(page)
            if self.fault.get("status"):
                raise HTTPError(self.fault["status"], "injected fault", **self.fault.get("headers", {}))
            for methods, pattern, name in self.ROUTES:
                if self.command in methods.split() and (match := pattern.fullmatch(url.path)):
                    return getattr(self, name)(*(unquote(group) if group else group for group in match.groups()))
            raise HTTPError(404, f"no such endpoint: {self.command} {url.path}")
        except HTTPError as error:
            self.reply({"error": str(error)}, error.status, {"X-Error-Message": str(error), **error.headers})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch

    def log_message(self, *args) -> None:
        pass

    def body_chunks(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":  # so does the client send a file to LFS
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length") or 0)
        while left and (data := self.rfile.read(min(CHUNK, left))):
            left -= len(data)
            yield data

    def body(self) -> bytes:
        return b"".join(self.unread)

    def json(self) -> dict:
        return json.loads(self.body() or b"{}")

    def start_reply(self, status: int, length: int, headers: dict) -> None:
        for _ in self.unread:  # an unread body would be taken for the connection's next request
            pass
        self.entry["status"] = status
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(key, value)
        self.end_headers()

    def reply(self, value=None, status: int = 200, headers: dict | None = None) -> None:
        if self.fault.get("lose_answer"):
            return self.hang_up()
        data = b"" if value is None else json.dumps(value).encode()
        self.start_reply(status, len(data), {"Content-Type": "application/json", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_file(self, path: Path, headers: dict) -> None:
        data, status = path.read_bytes(), 200
        if self.fault.get("corrupt") and data:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        data = data[: self.fault.get("truncate", len(data))]
        total = len(data)
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "").strip()):
            first = int(match[1]) if match[1] else max(total - int(match[2]), 0)
            last = min(int(match[2]), total - 1) if match[1] and match[2] else total - 1
            if first > last:
                raise HTTPError(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{total}"})
            data, status, headers = (
                data[first : last + 1],
                206,
                {**headers, "Content-Range": f"bytes {first}-{last}/{total}"},
            )
        self.start_reply(status, len(data), headers)
        if self.command != "HEAD":
            self.send_body(data)

    def send_body(self, data: bytes) -> None:
        stop, rate = self.fault.get("drop_after", len(data)), self.fault.get("rate")
        step = max(rate // 20, 1) if rate else CHUNK
        for start in range(0, min(stop, len(data)), step):
            self.wfile.write(data[start : min(start + step, stop)])
            time.sleep(0.05 if rate else 0)
        if stop < len(data):
            time.sleep(0.2)  # lets the client read what was sent: an RST would throw it away
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        if self.fault.get("reset"):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
