"""Errors that the user can mend: what was got, what was expected, what to do; and how a program tells them."""

import difflib
import errno
import io
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Collection
from typing import Any, TypeVar
from urllib.parse import urlsplit

Number = TypeVar("Number", int, float)


class InputError(ValueError):
    """Something given by the caller is wrong; the message says what, and how to put it right."""


class ImageError(InputError):
    """One image cannot be used; the message names it. Long runs go on without it."""


class MissingPathError(ImageError, FileNotFoundError):
    """A path that does not exist."""

    def __str__(self) -> str:
        return str(self.args[0])


class BundleError(InputError):
    """A bundle, or a file in it, is incomplete, damaged or of another kind than expected."""


def one_of(name: object, known: Collection[str]) -> str:
    """What may stand in place of a name that is not known, and which of it was probably meant."""
    close = difflib.get_close_matches(str(name), known, 1)
    return f"expected one of {', '.join(sorted(known))}" + (f": did you mean {close[0]!r}?" if close else "")


_ELSEWHERE = "choose another place"
_IN_THE_WAY = f"a file is where a folder has to be: remove it, or {_ELSEWHERE}"
_ADVICE = {
    errno.EACCES: f"change its permissions, or {_ELSEWHERE}",
    errno.EDQUOT: f"free some space, or {_ELSEWHERE}",
    errno.EEXIST: _IN_THE_WAY,
    errno.EISDIR: f"a folder is where a file has to be: {_ELSEWHERE}",
    errno.EMFILE: "raise the limit: ulimit -n 4096",
    errno.ENOENT: "check the path",
    errno.ENOSPC: f"free some space, or {_ELSEWHERE}",
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EPERM: f"change its permissions, or {_ELSEWHERE}",
    errno.EROFS: _ELSEWHERE,
}


def reason(error: Exception) -> str:
    """Why the operating system refused something, and what to do about it, without the path."""
    number = getattr(error, "errno", None)
    if number is None and (inner := re.search(r"\(os error (\d+)\)", str(error))):  # as Rust's libraries tell it
        number = int(inner[1])
    if number is None:
        return str(error)
    return ": ".join(filter(None, (os.strerror(number), _ADVICE.get(number))))


def run_program(
    name: str, run: Callable[[], int], *, stopped: str = "the same command goes on from here", debug: bool = False
) -> int:
    """Runs a program and returns its exit code.

    0: done. 1: something the user can mend, said in one line. 130: stopped by the user.

    Args:
        name: of the program, as messages begin with it.
        run: does the work and returns the exit code.
        stopped: what to say to a user who stopped it.
        debug: raise what it would say.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to fail
    try:
        return run()
    except (InputError, OSError) as error:
        if debug:
            raise
        text = str(error) if isinstance(error, InputError) else reason(error)
        if (path := getattr(error, "filename", None)) is not None and text != str(error):
            text = f"{os.fsdecode(path)}: {text}"
        print(f"{name}: error: {' '.join(text.split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: stopped; {stopped}", file=sys.stderr)
        return 130


def number_setting(name: str, default: Number, kind: Callable[[str], Number]) -> Number:
    """The number that an environment variable holds, or the default where it is not set.

    Raises:
        InputError: it holds something else.
    """
    text = os.environ.get(name)
    try:
        return default if text is None else kind(text)
    except ValueError as error:
        expected = "a whole number" if kind is int else "a number"
        raise InputError(f"the environment variable {name} is {text!r}, expected {expected}, or unset it") from error


def whole_number(value: Any) -> int:
    """A whole number of whatever type, such as numpy's; 0 for everything else."""
    try:
        return 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return 0


def check_count(name: str, value: Any) -> int:
    """Returns a whole number >= 1.

    Raises:
        InputError: it is none.
    """
    if whole_number(value) < 1:
        raise InputError(f"{name} is {value!r}, expected an integer >= 1")
    return whole_number(value)


def check_positive(name: str, value: Any, most: float = math.inf) -> float:
    """Returns a number above 0, and not above ``most``.

    Raises:
        InputError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most or value == math.inf:
        raise InputError(f"{name} is {value!r}, expected a number {'> 0' if most == math.inf else f'in (0, {most:g}]'}")
    return value


def check_sides(name: str, value: Any) -> tuple[int, int]:
    """Returns a height and a width, which may be given as one number for both.

    Raises:
        InputError: it is neither a whole number >= 1 nor two.
    """
    sides = [whole_number(side) for side in (value if isinstance(value, (tuple, list)) else (value, value))]
    if len(sides) != 2 or min(sides) < 1:
        raise InputError(f"{name} is {value!r}, expected an integer >= 1, or two: the height and the width")
    return sides[0], sides[1]


def check_environment() -> None:
    """Checks those environment variables that the Hub's client reads, and fails by, when it is imported.

    Raises:
        InputError: one of them is not what it has to be.
    """
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        number_setting(name, 0, int)
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        urlsplit(endpoint).port  # noqa: B018 - read for what it raises
    except ValueError as error:
        raise InputError(f"the environment variable HF_ENDPOINT is {endpoint!r}: {error}") from error
