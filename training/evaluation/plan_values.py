"""Values of a plan as YAML and the command line hold them, made what a plan expects: ``(name, value) -> value``.

All raise InputError, naming the setting, for a value of another kind.
"""

from __future__ import annotations

from typing import Any, TypeVar

from adpretrain_hf.errors import InputError

T = TypeVar("T", str, int, float)


def text(name: str, value: Any) -> str:
    """A text."""
    return _one(name, value, str, "a text")


def whole_number(name: str, value: Any) -> int:
    """A whole number."""
    return _one(name, value, int, "a whole number")


def names(name: str, value: Any) -> tuple[str, ...]:
    """One text or several, each once."""
    return _several(name, value, str, "texts (in quotes, where they look like numbers)")


def numbers(name: str, value: Any) -> tuple[int, ...]:
    """One whole number or several, each once."""
    return _several(name, value, int, "whole numbers")


def shares(name: str, value: Any) -> tuple[float, ...]:
    """One number or several, each once."""
    return _several(name, value, float, "numbers")


def text_by_name(name: str, value: Any) -> dict[str, str]:
    """Texts by name."""
    return {str(key): _one(f"{name} of {key}", one, str, "a text") for key, one in _mapping(name, value).items()}


def number_by_name(name: str, value: Any) -> dict[str, int]:
    """Whole numbers by name."""
    return {
        str(key): _one(f"{name} of {key}", one, int, "a whole number") for key, one in _mapping(name, value).items()
    }


def settings_by_name(name: str, value: Any) -> dict[str, dict[str, Any]]:
    """Settings by name, of each name."""
    return {str(key): _mapping(f"{name} of {key}", one) for key, one in _mapping(name, value).items()}


def _one(name: str, value: Any, kind: type[T], expected: str) -> T:
    # To Python a truth value is a number, and a whole number is no float.
    kinds = (float, int) if kind is float else (kind,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise InputError(f"{name} is {value!r}, expected {expected}")
    return kind(value)


def _several(name: str, value: Any, kind: type[T], expected: str) -> tuple[T, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(dict.fromkeys(_one(name, one, kind, expected) for one in values))


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{name} is {value!r}, expected names with a value each")
    return {str(key): one for key, one in value.items()}
