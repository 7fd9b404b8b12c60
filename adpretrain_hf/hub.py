"""Files of a repository on the Hub: from one commit, whole, tried again where the network fails, and not stale."""

import contextlib
import errno
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub import errors as client
from huggingface_hub.utils import filter_repo_objects

from adpretrain_hf.errors import BundleError, InputError, MissingPathError
from adpretrain_hf.files import discard, is_intact

T = TypeVar("T")
logger = logging.getLogger(__name__)

_PASSING_STATUS = frozenset((408, 429, 500, 502, 503, 504))
# Names, for huggingface_hub changed its HTTP library from one major version to the next.
_NETWORK_ERRORS = frozenset(("TimeoutException", "NetworkError", "RemoteProtocolError"))


class RepositoryFiles:
    """A repository at the commit that a revision is at now, so that a push meanwhile cannot mix two states.

    Every file is compared once with the checksum that the Hub announced for it. Only where the Hub gives no answer at
    all is the cached state of a branch taken, with a warning.

    Args:
        repo_id: ``owner/name``.
        revision: branch, tag or commit; ``main`` by default.
        token, cache_dir, local_files_only, force_download: as everywhere on the Hub.
        probe: a small file of every such repository; by it a branch's cached commit is known later.
        repo_type: ``"model"`` or ``"dataset"``.
        contents: what such a repository holds, for the error about one that lacks a file.

    Attributes:
        commit: what the revision is at.
        names: of all files there; None where only the cache was asked.

    Raises:
        MissingPathError: no such repository.
        BundleError: no such revision, no access, no connection and nothing cached.
    """

    def __init__(
        self,
        repo_id: str,
        revision: str | None = None,
        *,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        probe: str = "config.json",
        repo_type: str = "model",
        contents: str = "an ADPretrain bundle",
    ) -> None:
        self.repo_id, self.revision, self.contents = repo_id, revision or "main", contents
        self._force, self._offline = force_download, local_files_only
        self._kind: dict[str, Any] = {"token": token, "repo_type": repo_type}
        self._where = self._kind | {"cache_dir": cache_dir, "local_files_only": local_files_only}
        self.names: list[str] | None = None
        with explained(self.repo_id, self.revision, self.contents):
            self.commit = self._resolve(probe)

    def file(self, name: str) -> Path:
        """Downloads one file.

        Raises:
            BundleError: it is not there, not to be had, or came damaged twice.
        """
        with explained(self.repo_id, self.revision, self.contents):
            return self._checked(name, self._fetch(name, self.commit, self._force))

    def folder(self, patterns: list[str]) -> Path:
        """Downloads the files that match the patterns, and returns the folder of the commit.

        Raises:
            BundleError: they are not to be had, or one came damaged twice.
        """
        options = {"revision": self.commit, "allow_patterns": patterns, "force_download": self._force, **self._where}
        with explained(self.repo_id, self.revision, self.contents):
            fetch = partial(snapshot_download, self.repo_id, **options)
            folder = Path(with_retries(fetch, f"downloading {self.repo_id}"))
            there = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
            for name in filter_repo_objects(there, allow_patterns=patterns):
                self._checked(name, folder / name)
        return folder

    def _checked(self, name: str, path: Path) -> Path:
        if is_intact(path):
            return path
        if self._offline or constants.HF_HUB_OFFLINE:
            raise BundleError(
                f"{name} of {self.repo_id} is damaged in the cache, and the Hub cannot be asked: load it once without "
                "local_files_only and HF_HUB_OFFLINE, which fetches it again"
            )
        logger.warning("%s of %s is damaged: fetching it again", name, self.repo_id)
        discard(path)
        if is_intact(path := self._fetch(name, self.commit, force=True)):
            return path
        discard(path)
        raise BundleError(
            f"{name} of {self.repo_id} does not have the checksum that the Hub announced, twice: a proxy or the disk "
            "damages it; try again elsewhere"
        )

    def _fetch(self, name: str, revision: str, force: bool = False) -> Path:
        options = {"revision": revision, "force_download": force, **self._where}
        fetch = partial(hf_hub_download, self.repo_id, name, **options)
        return Path(with_retries(fetch, f"downloading {name} of {self.repo_id}"))

    def _resolve(self, probe: str) -> str:
        if self._offline:
            return self._cached_commit(probe) or self.revision
        seconds = constants.HF_HUB_ETAG_TIMEOUT
        look_up = partial(HfApi().repo_info, self.repo_id, revision=self.revision, timeout=seconds, **self._kind)
        try:
            info: Any = with_retries(look_up, f"looking up {self.repo_id}")
        except (client.HTTPError, client.OfflineModeIsEnabled) as error:
            return self._cached_instead(error, probe)
        self.names = [sibling.rfilename for sibling in info.siblings or ()]
        if info.sha != self.revision:
            # Under the branch's own name, or the cache would not know later which commit it was at.
            self._fetch(probe, self.revision)
        return info.sha or self.revision

    def _cached_commit(self, probe: str) -> str | None:
        place = (self._where["cache_dir"], self.revision, self._where["repo_type"])
        path = try_to_load_from_cache(self.repo_id, probe, *place)
        return Path(path).parent.name if isinstance(path, str) else None

    def _cached_instead(self, error: Exception, probe: str) -> str:
        commit, offline = self._cached_commit(probe), isinstance(error, client.OfflineModeIsEnabled)
        if commit is None or not (offline or _is_network_error(error)):
            raise error
        if not offline and commit != self.revision:
            text = "the Hub cannot be reached: taking the cached commit %s for revision %s of %s, which may be old"
            logger.warning(text, commit, self.revision, self.repo_id)
        return commit


def with_retries(call: Callable[[], T], what: str) -> T:
    """Calls until it succeeds, with growing pauses, or as the server's Retry-After asks for.

    Args:
        call: safe to be repeated.
        what: for the log.

    Raises:
        Exception: the last error, when it is not a passing one, after ADPRETRAIN_HUB_ATTEMPTS (5), or when all pauses
            together would exceed ADPRETRAIN_HUB_SECONDS (120).
    """
    attempts = max(1, int(os.environ.get("ADPRETRAIN_HUB_ATTEMPTS", "5")))
    left, attempt = float(os.environ.get("ADPRETRAIN_HUB_SECONDS", "120")), 0
    while True:
        attempt += 1
        try:
            return call()
        except (client.HTTPError, OSError) as error:
            pause = _pause(error, attempt)
            if pause is None or attempt == attempts or pause > left:
                raise
            left -= pause
            logger.warning("%s failed (%s): trying again in %.1f s", what, type(error).__name__, pause)
            time.sleep(pause)


def _pause(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before the next attempt; None if the error will not be gone by then."""
    if isinstance(error, client.HfHubHTTPError):
        if error.response.status_code not in _PASSING_STATUS:
            return None
        if (asked := error.response.headers.get("Retry-After", "").strip()).isdigit():
            return float(asked)
    elif not _is_network_error(error) and "Consistency check failed" not in str(error):  # a file came incomplete
        return None
    # Jitter, or all the clients that one outage stopped come back at once.
    return min(0.5 * 2 ** (attempt - 1), 8.0) * random.uniform(0.5, 1.0)


def _is_network_error(error: BaseException) -> bool:
    """Whether no answer came: a timeout, a connection that failed or broke."""
    return any(base.__name__ in _NETWORK_ERRORS for base in type(error).__mro__)


@contextlib.contextmanager
def explained(repo_id: str, revision: str | None, contents: str = "an ADPretrain bundle") -> Iterator[None]:
    """Turns whatever the Hub's client raises about a repository into one clear message; the cause stays attached.

    Raises:
        MissingPathError: no such repository.
        BundleError: everything else.
    """
    try:
        yield
    except InputError:
        raise
    except (client.HTTPError, OSError, client.EntryNotFoundError) as error:
        explanation = _explain(error)
        if explanation is None:
            raise
        kind = MissingPathError if type(error) is client.RepositoryNotFoundError else BundleError
        raise kind(explanation.format(repo_id, revision=revision or "main", contents=contents, error=error)) from error


def _explain(error: Exception) -> str | None:
    for kind, explanation in _EXPLANATIONS.items():
        if isinstance(error, kind):
            return explanation
    if isinstance(error, client.HfHubHTTPError):
        status = error.response.status_code
        return _STATUS.get(status, f"the Hub answered {status} for {{}}, again and again: try again later")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full while loading {}: free some space, or choose another cache_dir"
    if _is_network_error(error):
        return "the connection to the Hub failed while loading {} ({error}): try again later"
    return None


_NOT_CACHED = (
    "{} at revision {revision!r} is not all in the cache, and the Hub cannot be asked: connect to the network once, or "
    "check cache_dir, HF_HUB_OFFLINE and local_files_only"
)
_EXPLANATIONS: dict[type[Exception], str] = {  # the more special ones first
    client.GatedRepoError: "{} is gated: ask for access on its page on the Hub, then log in (`hf auth login`) or pass "
    "token=",
    client.RepositoryNotFoundError: "no repository {} on the Hub (and no such folder here), or it is private: check "
    "the id, and log in (`hf auth login`) or pass token= if it is private",
    client.RevisionNotFoundError: "{} has no revision {revision!r}: expected a branch, tag or commit of it",
    client.LocalEntryNotFoundError: _NOT_CACHED,
    client.OfflineModeIsEnabled: _NOT_CACHED,
    client.EntryNotFoundError: "{} at revision {revision!r} is not {contents}: it lacks a file. {error}",
}
_STATUS = {
    401: "no token, or one that the Hub does not accept, for {}: log in (`hf auth login`) or pass token=",
    403: "the token may not do this with {}: use one with the rights for it (a write token for pushing)",
}
