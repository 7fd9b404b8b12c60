"""What the Hub's errors mean for a user, and what to do about them."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from adpretrain_hf.errors import BundleError, InputError, MissingPathError
from adpretrain_hf.retries import is_network_error


@contextlib.contextmanager
def explained(repo_id: str, revision: str | None, contents: str = "an ADPretrain bundle") -> Iterator[None]:
    """Turns whatever the Hub's client raises into one clear message; the cause stays attached.

    Args:
        repo_id: of the repository that is asked for something.
        revision: of it; ``main`` by default.
        contents: what the repository should hold.

    Raises:
        MissingPathError: no such repository.
        BundleError: everything else.
    """
    try:
        yield
    except InputError:
        raise
    except (HTTPError, OSError, EntryNotFoundError) as error:
        explanation = _explain(error, repo_id, revision or "main", contents)
        if explanation is None:
            raise
        raise explanation from error


def _explain(error: Exception, repo_id: str, revision: str, contents: str) -> InputError | None:
    if isinstance(error, GatedRepoError):
        return BundleError(
            f"{repo_id} is gated: ask for access on its page on the Hub, then log in (`hf auth login`) or pass token="
        )
    if isinstance(error, RepositoryNotFoundError):
        return MissingPathError(
            f"no repository {repo_id} on the Hub (and no such folder here), or it is private: check the id, and log in "
            "(`hf auth login`) or pass token= if it is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return BundleError(f"{repo_id} has no revision {revision!r}: expected a branch, tag or commit of it")
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return BundleError(
            f"{repo_id} at revision {revision!r} is not all in the cache, and the Hub cannot be asked: connect to the "
            "network once, or check cache_dir, HF_HUB_OFFLINE and local_files_only"
        )
    if isinstance(error, EntryNotFoundError):
        return BundleError(f"{repo_id} at revision {revision!r} is not {contents}: it lacks a file. {error}")
    if isinstance(error, HfHubHTTPError):
        return BundleError(_explain_status(error, repo_id))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return BundleError(f"the disk is full while loading {repo_id}: free some space, or choose another cache_dir")
    if is_network_error(error):
        return BundleError(f"the connection to the Hub failed while loading {repo_id} ({error}): try again later")
    return None


def _explain_status(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    if status == 401:
        return f"no token, or one that the Hub does not accept, for {repo_id}: log in (`hf auth login`) or pass token="
    if status == 403:
        return f"the token may not do this with {repo_id}: use one with the rights for it (a write token for pushing)"
    return f"the Hub answered {status} for {repo_id}, again and again: try again later"
