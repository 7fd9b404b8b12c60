"""Files of a repository on the Hub: from one commit, whole, tried again where the network fails, and not stale."""

from __future__ import annotations

import hashlib
import logging
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from adpretrain_hf.errors import BundleError
from adpretrain_hf.hub_errors import explained
from adpretrain_hf.retries import is_network_error, with_retries

logger = logging.getLogger(__name__)


class RepositoryFiles:
    """A repository at the commit that a revision is at now, so that a push meanwhile cannot mix two states.

    Every file is compared with the checksum that the Hub announced for it. Only where the Hub gives no answer at all is
    the cached state of a branch taken, with a warning.

    Args:
        repo_id: ``owner/name``.
        revision: branch, tag or commit; ``main`` by default.
        token: of the user; the one that is logged in by default.
        cache_dir: where downloads are kept; the Hub client's cache by default.
        local_files_only: take what is cached, and ask nobody.
        force_download: download again what is cached.
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
        self.repo_id = repo_id
        self.repo_type = repo_type
        self.contents = contents
        self.revision = revision or "main"
        self.force = force_download
        self._where: dict[str, Any] = {
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "repo_type": repo_type,
        }
        self.names: list[str] | None = None
        with self._explained():
            self.commit = self._resolve(probe)

    def file(self, name: str, *, recheck: bool = True) -> Path:
        """Downloads one file.

        Args:
            name: of the file in the repository.
            recheck: compare also a file that was cached before with its checksum; it takes minutes for many gigabytes.

        Raises:
            BundleError: it is not there, not to be had, or came damaged twice.
        """
        with self._explained():
            cached = not (recheck or self.force) and self._cached(name, self.commit)
            return cached or self._checked(name, self._fetch(name, self.commit, self.force))

    def folder(self, patterns: list[str]) -> Path:
        """Downloads the files that match the patterns, and returns the folder of the commit.

        Raises:
            BundleError: they are not to be had, or one came damaged twice.
        """
        with self._explained():
            folder = Path(
                with_retries(
                    lambda: snapshot_download(
                        self.repo_id,
                        revision=self.commit,
                        allow_patterns=patterns,
                        force_download=self.force,
                        **self._where,
                    ),
                    f"downloading {self.repo_id}",
                )
            )
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                self._checked(path.relative_to(folder).as_posix(), path)
        return folder

    def _explained(self) -> AbstractContextManager[None]:
        return explained(self.repo_id, self.revision, self.contents)

    def _checked(self, name: str, path: Path) -> Path:
        if not is_intact(path):
            logger.warning("%s of %s is damaged: fetching it again", name, self.repo_id)
            discard(path)
            path = self._fetch(name, self.commit, force=True)
        if not is_intact(path):
            discard(path)
            raise BundleError(
                f"{name} of {self.repo_id} does not have the checksum that the Hub announced, twice: a proxy or the "
                "disk damages it; try again elsewhere"
            )
        return path

    def _fetch(self, name: str, revision: str, force: bool = False) -> Path:
        return Path(
            with_retries(
                lambda: hf_hub_download(self.repo_id, name, revision=revision, force_download=force, **self._where),
                f"downloading {name} of {self.repo_id}",
            )
        )

    def _resolve(self, probe: str) -> str:
        if self._where["local_files_only"]:
            return self._cached_commit(probe) or self.revision
        api = HfApi(token=self._where["token"])
        look_up = api.dataset_info if self.repo_type == "dataset" else api.model_info
        try:
            info = with_retries(lambda: look_up(self.repo_id, revision=self.revision), f"looking up {self.repo_id}")
        except (HTTPError, OfflineModeIsEnabled) as error:
            return self._cached_instead(error, probe)
        self.names = [sibling.rfilename for sibling in info.siblings or ()]
        if info.sha != self.revision:
            # Under the branch's own name, or the cache would not know later which commit it was at.
            self._fetch(probe, self.revision)
        return info.sha or self.revision

    def _cached_commit(self, probe: str) -> str | None:
        path = self._cached(probe, self.revision)
        return path.parent.name if path else None

    def _cached(self, name: str, revision: str) -> Path | None:
        path = try_to_load_from_cache(self.repo_id, name, self._where["cache_dir"], revision, self.repo_type)
        return Path(path) if isinstance(path, str) else None

    def _cached_instead(self, error: Exception, probe: str) -> str:
        commit = self._cached_commit(probe)
        offline = isinstance(error, OfflineModeIsEnabled)
        if commit is None or not (offline or is_network_error(error)):
            raise error
        if not offline and commit != self.revision:
            logger.warning(
                "the Hub cannot be reached: taking the cached commit %s for revision %s of %s, which may be old",
                commit,
                self.revision,
                self.repo_id,
            )
        return commit


def is_intact(path: Path) -> bool:
    """Whether a cached file has the checksum that the Hub announced: the name of its blob in the client's cache.

    Large files are named by their sha256, others by git's sha1. Where the cache has no links to blobs (Windows without
    the right to make them) there is nothing to compare with.
    """
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return sha256_of(blob) == blob.name
    if re.fullmatch(r"[0-9a-f]{40}", blob.name):
        return git_sha1_of(blob) == blob.name
    return True


def sha256_of(path: Path) -> str:
    """The checksum by which the Hub knows a large file."""
    return _digest(path, hashlib.sha256())


def git_sha1_of(path: Path) -> str:
    """The checksum by which the Hub, like git, knows any other file."""
    return _digest(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False))


def discard(path: Path) -> None:
    """Removes a cached file and its blob."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
