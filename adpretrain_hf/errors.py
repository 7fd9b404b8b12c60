"""Errors that the user can mend: what was got, what was expected, what to do."""

import os
from collections.abc import Callable
from typing import TypeVar
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
