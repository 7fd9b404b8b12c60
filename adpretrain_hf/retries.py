"""Trying again, politely, what a network or a server failed to do."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, HTTPError  # the latter is its HTTP library's base class

T = TypeVar("T")
logger = logging.getLogger(__name__)

_PASSING_STATUS = frozenset((408, 429, 500, 502, 503, 504))
# Names, for huggingface_hub changed its HTTP library from one major version to the next.
_PASSING_ERRORS = frozenset(("TimeoutException", "NetworkError", "RemoteProtocolError"))


def max_attempts() -> int:
    """How often a request is tried; the environment variable ADPRETRAIN_HUB_ATTEMPTS, 5 by default."""
    return max(1, int(os.environ.get("ADPRETRAIN_HUB_ATTEMPTS", "5")))


def max_seconds() -> float:
    """How long may be waited between attempts in all; ADPRETRAIN_HUB_SECONDS, 120 by default."""
    return float(os.environ.get("ADPRETRAIN_HUB_SECONDS", "120"))


def with_retries(call: Callable[[], T], what: str) -> T:
    """Calls until it succeeds, with growing pauses, or as the server's Retry-After asks for.

    Args:
        call: safe to be repeated.
        what: for the log.

    Raises:
        Exception: the last error, when it is not a passing one, after ``max_attempts``, or when the next pause would
            exceed ``max_seconds`` in all.
    """
    left = max_seconds()
    for attempt in range(1, max_attempts() + 1):
        try:
            return call()
        except (HTTPError, OSError) as error:
            pause = _pause(error, attempt)
            if pause is None or attempt == max_attempts() or pause > left:
                raise
            left -= pause
            logger.warning("%s failed (%s): trying again in %.1f s", what, type(error).__name__, pause)
            time.sleep(pause)
    raise RuntimeError("unreachable")


def is_passing(error: BaseException) -> bool:
    """Whether an error may be gone the next time: the server is busy, the connection broke, a file came incomplete."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING_STATUS
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return True
    return is_network_error(error)


def is_network_error(error: BaseException) -> bool:
    """Whether no answer came: a timeout, a connection that failed or broke."""
    return any(base.__name__ in _PASSING_ERRORS for base in type(error).__mro__)


def _pause(error: Exception, attempt: int) -> float | None:
    if not is_passing(error):
        return None
    if isinstance(error, HfHubHTTPError) and (asked := error.response.headers.get("Retry-After")):
        return _seconds_until(asked)
    # Jitter, or all the clients that one outage stopped come back at once.
    return min(0.5 * 2 ** (attempt - 1), 8.0) * random.uniform(0.5, 1.0)


def _seconds_until(retry_after: str) -> float:
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        moment = parsedate_to_datetime(retry_after)
    except ValueError:
        return 1.0
    return max(0.0, (moment - datetime.now(timezone.utc)).total_seconds())
