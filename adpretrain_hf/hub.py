"""Files of a repository on the Hub: from one commit, whole, tried again where the network fails, and not stale."""

import contextlib
import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub import errors as client
from huggingface_hub.utils import filter_repo_objects, get_session

from adpretrain_hf.errors import BundleError, InputError, MissingPathError, number_setting
from adpretrain_hf.files import discard, is_intact

T = TypeVar("T")
logger = logging.getLogger(__name__)

_PASSING_STATUS = frozenset((408, 429, 500, 502, 503, 504))
_READ_ONLY = frozenset((errno.EROFS, errno.EACCES, errno.EPERM))
# Names, for huggingface_hub changed its HTTP library from one major version to the next.
_NETWORK_ERRORS = frozenset(("TimeoutException", "NetworkError", "RemoteProtocolError"))
# What the client fails by when it reads an answer that is not the Hub's, such as a login page.
_NOT_UNDERSTOOD = (ValueError, LookupError, TypeError, AttributeError)


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
        if self.names is not None:  # the client would list them again, and without an answer take what it has for all
            wanted = list(filter_repo_objects(self.names, allow_patterns=patterns))
            paths = [self.file(name) for name in wanted]
            if not paths:
                raise BundleError(f"{self.repo_id} at revision {self.revision!r} has no files {', '.join(patterns)}")
            return paths[0].parents[wanted[0].count("/")]
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
            try:
                # Under the branch's own name, or the cache would not know later which commit it was at.
                self._fetch(probe, self.revision)
            except OSError as error:
                if error.errno not in _READ_ONLY:
                    raise
                return self._cached_instead(error, probe)
        return info.sha or self.revision

    def _cached_commit(self, probe: str) -> str | None:
        place = (self._where["cache_dir"], self.revision, self._where["repo_type"])
        path = try_to_load_from_cache(self.repo_id, probe, *place)
        return Path(path).parent.name if isinstance(path, str) else None

    def _cached_instead(self, error: Exception, probe: str) -> str:
        commit, offline = self._cached_commit(probe), isinstance(error, client.OfflineModeIsEnabled)
        read_only = getattr(error, "errno", None) in _READ_ONLY
        if commit is None or not (offline or read_only or _is_network_error(error)):
            raise error
        if not offline and commit != self.revision:
            why = "the cache cannot be written" if read_only else "the Hub cannot be reached"
            text = "%s: taking the cached commit %s for revision %s of %s, which may be old"
            logger.warning(text, why, commit, self.revision, self.repo_id)
        self._offline = self._where["local_files_only"] = True  # no further file is waited for
        self.names = None
        return commit


class _ForeignAnswerError(Exception):
    """Something answered, but not as a Hub does."""


def with_retries(call: Callable[[], T], what: str) -> T:
    """Calls until it succeeds, with growing pauses, or as the server's Retry-After asks for.

    Args:
        call: requests of the Hub's client and nothing else; safe to be repeated.
        what: for the log.

    Raises:
        Exception: the last error, when it is not a passing one, after ADPRETRAIN_HUB_ATTEMPTS (5), or when all pauses
            together would exceed ADPRETRAIN_HUB_SECONDS (120).
    """
    attempts = max(1, number_setting("ADPRETRAIN_HUB_ATTEMPTS", 5, int))
    left, attempt = number_setting("ADPRETRAIN_HUB_SECONDS", 120.0, float), 0
    while True:
        attempt += 1
        try:
            with _time_outs():
                return call()
        except (client.HTTPError, OSError) as error:
            pause = _pause(error, attempt)
            if pause is None or attempt == attempts or pause > left:
                raise
            left -= pause
            logger.warning("%s failed (%s): trying again in %.1f s", what, type(error).__name__, pause)
            time.sleep(pause)
        except (InputError, client.HFValidationError, UnicodeEncodeError):
            raise
        except _NOT_UNDERSTOOD as error:
            raise _ForeignAnswerError(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _time_outs() -> Iterator[None]:
    """Gives a time-out to those requests for which the client has none: uploads, commits, listings and more.

    Its session belongs to the whole process: requests of others are left as they are, once this is done.
    """
    try:
        session = get_session()
    except Exception as error:
        raise BundleError(
            f"the Hub's client cannot use the proxies or certificates that are set ({error}): check HTTPS_PROXY, "
            "HTTP_PROXY, ALL_PROXY and SSL_CERT_FILE"
        ) from error
    hooks = session.event_hooks["request"]
    hooks.append(_limit_time)
    try:
        yield
    finally:
        hooks.remove(_limit_time)


def _limit_time(request: Any) -> None:
    limits = request.extensions.get("timeout", {})
    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    request.extensions["timeout"] = {
        part: seconds if limits.get(part) is None else limits[part] for part in ("connect", "read", "write", "pool")
    }


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
def explained(
    repo_id: str, revision: str | None, contents: str = "an ADPretrain bundle", *, doing: str = "loading"
) -> Iterator[None]:
    """Turns whatever the Hub's client raises about a repository into one clear message; the cause stays attached.

    Args:
        repo_id, revision: of the repository.
        contents: what it has to hold.
        doing: what is being done with it.

    Raises:
        MissingPathError: no such repository.
        BundleError: everything else.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        explanation = _explain(error)
        if explanation is None:
            raise
        if explanation is _NOT_CACHED and doing != "loading":
            explanation = "{doing} {} needs the Hub, and HF_HUB_OFFLINE keeps the client from it: unset it"
        kind = MissingPathError if type(error) is client.RepositoryNotFoundError else BundleError
        words = {"revision": revision or "main", "contents": contents, "doing": doing, "endpoint": constants.ENDPOINT}
        told = kind(explanation.format(repo_id, error=error, kind=type(error).__name__, **words))
        # A header that could not be sent has the token in it, which is not to be told.
        raise told from None if explanation is _BAD_TOKEN else error


def _explain(error: BaseException) -> str | None:
    if isinstance(error, client.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _explain(error.__cause__) or _NOT_CACHED
    if isinstance(error, client.HfHubHTTPError) and _is_foreign(error):
        return _FOREIGN
    for kind, explanation in _EXPLANATIONS.items():
        if isinstance(error, kind):
            return explanation
    for name, explanation in _EXPLANATIONS_BY_NAME.items():
        if any(base.__name__ == name for base in type(error).__mro__):
            return explanation
    if isinstance(error, client.HfHubHTTPError):
        status = error.response.status_code
        refused = f"the Hub answered {status} for {{}} and will again ({_plain(error.server_message)})"
        passing = f"the Hub answered {status} for {{}}, again and again: try again later"
        return _STATUS.get(status, passing if status in _PASSING_STATUS else refused)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full while {doing} {}: free some space, or choose another cache_dir"
    if isinstance(error, OSError) and error.errno in _READ_ONLY:
        return (
            "the cache cannot be written while {doing} {} ({error}): choose a folder that can be, by cache_dir or "
            "HF_HOME, or load it once with the right to write there"
        )
    if _is_network_error(error):
        cause = "CERTIFICATE" in str(error)
        advice = "set SSL_CERT_FILE to the certificates of your network" if cause else "try again later"
        return f"the connection to the Hub failed while {{doing}} {{}} at {{endpoint}} ({{error}}): {advice}"
    if isinstance(error, client.HTTPError):
        return "a request to {endpoint} failed while {doing} {} ({kind}: {error}): check HF_ENDPOINT and HTTPS_PROXY"
    return None


def _is_foreign(error: client.HfHubHTTPError) -> bool:
    """Whether a refusal is a page that a proxy or a login made; the Hub's own say in their headers what is wrong."""
    response = error.response
    own = any(name in response.headers for name in ("X-Error-Code", "X-Error-Message", "X-Request-Id"))
    refusal = response.status_code not in (407, *_PASSING_STATUS)
    return refusal and not own and "html" in response.headers.get("Content-Type", "")


def _plain(message: str | None) -> str:
    return " ".join((message or "without a reason").replace("{", "{{").replace("}", "}}").split())


_NOT_CACHED = (
    "{} at revision {revision!r} is not all in the cache, and the Hub cannot be asked: connect to the network once, or "
    "check cache_dir, HF_HUB_OFFLINE and local_files_only"
)
_FOREIGN = (
    "what answered for {} at {endpoint} is not the Hub: the network may have a login page (open it in a browser), need "
    "a proxy (HTTPS_PROXY), or HF_ENDPOINT be wrong"
)
_BAD_TOKEN = (
    "the token for {} cannot be sent, for it has other characters than a token's letters, digits and '_': copy it "
    "again (HF_TOKEN, `hf auth login` or token=)"
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
    client.HFValidationError: "{} is no id of a repository, expected owner/name: {error}",
    client.LocalTokenNotFoundError: "token=True needs a token for {}: log in (`hf auth login`) or set HF_TOKEN",
    client.FileMetadataError: _FOREIGN,
    _ForeignAnswerError: _FOREIGN,
    UnicodeEncodeError: _BAD_TOKEN,
}
_EXPLANATIONS_BY_NAME = {  # of the HTTP library's errors
    "LocalProtocolError": _BAD_TOKEN,
    "ProxyError": "the proxy does not let the request for {} through ({error}): check HTTPS_PROXY and HTTP_PROXY; with "
    "user and password it is http://user:password@host:port",
    "UnsupportedProtocol": "HF_ENDPOINT is {endpoint!r}, expected an address that begins with https://",
    "InvalidURL": "HF_ENDPOINT is {endpoint!r}, which is no address ({error}): expected https://host",
}
_STATUS = {
    401: "no token, or one that the Hub does not accept, for {}: log in (`hf auth login`) or pass token=",
    403: "the token may not do this with {}: use one with the rights for it (a write token for pushing)",
    407: "the proxy asks for a user and a password, for {}: give them in HTTPS_PROXY and HTTP_PROXY "
    "(http://user:password@host:port)",
    511: _FOREIGN,
}
