"""One error for several names: what is wrong with them, what to do, and the first ten."""

from __future__ import annotations

from collections.abc import Sequence

from adpretrain_hf.errors import InputError


def refuse(names: Sequence[str], what: str, remedy: str) -> None:
    """Raises InputError with the first ten of some names, if there are any."""
    if names:
        listed = "".join(f"\n  {name}" for name in names[:10])
        more = f"\n  and {len(names) - 10} more" if len(names) > 10 else ""
        raise InputError(f"{len(names)} {what}: {remedy}.{listed}{more}")
