"""Pushing a bundle: all its files in one commit, or none."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from adpretrain_hf import bundle
from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.errors import BundleError, InputError
from adpretrain_hf.hub_download import git_sha1_of, sha256_of
from adpretrain_hf.hub_errors import explained
from adpretrain_hf.retries import with_retries

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushPlan:
    """What a push does.

    Attributes:
        send: the files that the repository lacks or has otherwise, and their sizes in bytes.
        keep: the files that are there already.
        delete: files of an earlier state of the bundle that are no longer part of it.
        parent: the commit that it is based on; None where the repository or the branch is still to be made.
    """

    send: dict[str, int]
    keep: list[str]
    delete: list[str]
    parent: str | None


class BundlePusher:
    """Pushes one folder to one branch of one repository.

    Args:
        folder: the bundle.
        repo_id: ``owner/name``.
        private: True makes a new repository private, and refuses to write to one that is public. None leaves the
            visibility to the owner's default and to what it is.
        branch: made if it is not there; ``main`` by default.
        token: of the user; the one that is logged in by default.
        one_variant: the folder is one variant, to be put beside others of the same extractor that may be there; they
            and the card stay. Otherwise the folder is the whole bundle.

    Raises:
        BundleError: the folder is not a whole bundle.
    """

    def __init__(
        self,
        folder: str | Path,
        repo_id: str,
        *,
        private: bool | None = None,
        branch: str | None = None,
        token: str | bool | None = None,
        one_variant: bool = False,
    ) -> None:
        self.one_variant = one_variant
        self.folder, self.repo_id, self.private, self.branch = Path(folder), repo_id, private, branch or "main"
        self.api = HfApi(token=token)
        self.config = bundle.read_config(self.folder)
        self.files = _bundle_files(self.folder, self.config)

    def plan(self) -> PushPlan:
        """Compares the folder with the repository; writes nothing.

        Raises:
            BundleError: no access, no connection, or a public repository where a private one was asked for.
        """
        with explained(self.repo_id, self.branch):
            parent = self._head()
            there = self._remote_files(parent) if parent else {}
        keep = [name for name, path in self.files.items() if name in there and _is_same(path, there[name])]
        delete = [name for name in there if _belongs_to_bundle(name) and name not in self.files]
        if self.one_variant:
            others = bundle.variants_among(delete, self.config)
            if others and bundle.CONFIG_FILE not in keep:
                raise BundleError(
                    f"{self.repo_id} holds the variants {others} of an extractor with another configuration: push to "
                    "another repository, or push a folder with all variants"
                )
            delete = [name for name in delete if not bundle.variants_among([name], self.config)]
            keep += [name for name in self.files if name == bundle.CARD_FILE and name in there and name not in keep]
        return PushPlan(
            send={name: path.stat().st_size for name, path in self.files.items() if name not in keep},
            keep=keep,
            delete=delete,
            parent=parent,
        )

    def push(self, message: str = "Upload bundle", *, create_pr: bool = False, tag: str | None = None) -> str:
        """Makes the repository and the branch if needed, and commits what the plan says.

        Interrupted at any moment, the branch is at the old commit or at the new one. Run again, it sends what is
        missing.

        Args:
            message: of the commit.
            create_pr: open a pull request instead of writing to the branch.
            tag: name to give to the commit.

        Returns:
            The URL of the commit or the pull request.

        Raises:
            BundleError: as for ``plan``; no right to write; someone else wrote to the branch meanwhile.
            InputError: the card's metadata are not valid.
        """
        with explained(self.repo_id, self.branch):
            self._make_repository()
        plan = self.plan()
        with explained(self.repo_id, self.branch):
            url, commit = self._commit(plan, message, create_pr)
            if tag:
                self._retry(lambda: self.api.create_tag(self.repo_id, tag=tag, revision=commit), "tagging")
        return url

    def _make_repository(self) -> None:
        if self._head() is None:
            self._retry(
                lambda: self.api.create_repo(self.repo_id, private=self.private, exist_ok=True), "making the repository"
            )
        if self._head() is None:
            self._retry(
                lambda: self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True), "making the branch"
            )

    def _head(self) -> str | None:
        """The branch's commit, or None if there is none; refuses a public repository where private was asked for."""
        try:
            info = self._retry(lambda: self.api.model_info(self.repo_id), "looking up the repository")
            if self.private and not info.private:
                raise BundleError(
                    f"{self.repo_id} is public, and a private repository was asked for: nothing was sent. Make it "
                    "private, or choose another name"
                )
            if self.branch == "main":
                return info.sha
            return self._retry(
                lambda: self.api.model_info(self.repo_id, revision=self.branch), "looking up the branch"
            ).sha
        except (RevisionNotFoundError, RepositoryNotFoundError):
            return None

    def _remote_files(self, commit: str) -> dict[str, RepoFile]:
        entries = self._retry(
            lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)), "listing the files"
        )
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _commit(self, plan: PushPlan, message: str, create_pr: bool) -> tuple[str, str]:
        if not plan.send and not plan.delete:
            logger.info("%s is up to date", self.repo_id)
            return f"{self.api.endpoint}/{self.repo_id}/commit/{plan.parent}", str(plan.parent)
        info = self._retry(lambda: self._commit_once(plan, message, create_pr), "committing")
        return info.pr_url or info.commit_url, info.oid

    def _commit_once(self, plan: PushPlan, message: str, create_pr: bool) -> CommitInfo:
        if not create_pr and (head := self._head()) != plan.parent:
            return self._someone_committed(head)
        additions = [CommitOperationAdd(name, str(self.files[name])) for name in plan.send]
        deletions = [CommitOperationDelete(name) for name in plan.delete]
        try:
            return self.api.create_commit(
                self.repo_id,
                [*additions, *deletions],
                commit_message=message,
                revision=self.branch,
                parent_commit=plan.parent,
                create_pr=create_pr,
            )
        except RuntimeError as error:  # the client's wrapping of a failed upload
            raise error.__cause__ or error from error
        except ValueError as error:
            raise InputError(f"the Hub does not accept the card of {self.folder}: {error}") from error

    def _someone_committed(self, head: str | None) -> CommitInfo:
        """The branch moved: by our own commit, if only the answer to it was lost; then all is there."""
        now = self.plan()
        if now.send or now.delete:
            raise BundleError(f"someone else wrote to {self.branch} of {self.repo_id} meanwhile: look, and push again")
        url = f"{self.api.endpoint}/{self.repo_id}/commit/{head}"
        return CommitInfo(commit_url=url, commit_message="", commit_description="", oid=str(head))

    def _retry(self, call: Any, what: str) -> Any:
        return with_retries(call, f"{what} ({self.repo_id})")


def _bundle_files(folder: Path, config: ADPretrainConfig) -> dict[str, Path]:
    if not bundle.variants_in(folder, config):
        raise BundleError(f"{folder} has no projectors: expected {bundle.WEIGHTS_FILE}")
    if not (folder / bundle.BACKBONE_FOLDER).is_dir() and not config.backbone_revision:
        raise BundleError(f"{folder} has neither a backbone nor the commit to fetch it from: save it with its backbone")
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = ((path.relative_to(folder).as_posix(), path) for path in paths)
    return {name: path for name, path in names if not any(part.startswith(".") for part in name.split("/"))}


def _belongs_to_bundle(name: str) -> bool:
    """Whether a remote file is of a bundle's own layout; pictures and whatever else people add stay."""
    return name.startswith((f"{bundle.BACKBONE_FOLDER}/", "model.", "model-")) and name.endswith(
        (".safetensors", ".json")
    )


def _is_same(path: Path, entry: RepoFile) -> bool:
    if path.stat().st_size != entry.size:
        return False
    return sha256_of(path) == entry.lfs.sha256 if entry.lfs is not None else git_sha1_of(path) == entry.blob_id
