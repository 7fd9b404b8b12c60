"""Pushing a bundle: all its files in one commit, or none."""

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoSibling
from huggingface_hub.utils import validate_repo_id

from adpretrain_hf.backbones import without_path
from adpretrain_hf.bundle.layout import LAYOUT, files_in, read_config, variants_among
from adpretrain_hf.config import MODEL_TYPE
from adpretrain_hf.errors import BundleError, InputError
from adpretrain_hf.files import git_sha1_of, sha256_of
from adpretrain_hf.hub import explained, with_retries

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
        repo_id, private, branch, token: see ``push_to_hub``.
        one_variant: the folder is one variant, to be put beside others of the same extractor that may be there; they
            and the card stay. Otherwise the folder is the whole bundle.
        force: see ``push_to_hub``.

    Raises:
        BundleError: the folder is not a whole bundle, or its configuration tells a path of this machine.
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
        force: bool = False,
    ) -> None:
        self.folder, self.repo_id, self.branch = Path(folder), repo_id, branch or "main"
        self.private, self.one_variant, self.force = private, one_variant, force
        self.api = HfApi(token=token)
        self.config = read_config(self.folder)
        self.files = files_in(self.folder)
        if (name := without_path(self.config.backbone)) != self.config.backbone:
            raise BundleError(
                f"{self.folder / LAYOUT.config} says where the backbone lies on this machine, "
                f"{self.config.backbone!r}: before others see it, write {name!r} there and in the card, or its id"
            )
        if not variants_among(self.files, self.config):
            raise BundleError(f"{folder} has no projectors: expected {LAYOUT.weights}")
        if not (self.folder / LAYOUT.backbone).is_dir() and not self.config.backbone_revision:
            raise BundleError(
                f"{folder} has neither a backbone nor the commit to fetch it from: save it with its backbone"
            )

    def plan(self) -> PushPlan:
        """Compares the folder with the repository; writes nothing.

        Raises:
            BundleError: no access, no connection, a public repository where a private one was asked for, or one that
                holds something else than a bundle.
        """
        with self._explained():
            parent, there = self._look_up()
        keep = [name for name, path in self.files.items() if name in there and _is_same(path, there[name])]
        delete = [name for name in there if LAYOUT.is_own(name) and name not in self.files]
        if self.one_variant:
            others = variants_among(delete, self.config)
            if others and LAYOUT.config not in keep:
                raise BundleError(
                    f"{self.repo_id} holds the variants {others} of an extractor with another configuration: push to "
                    "another repository, or push a folder with all variants"
                )
            delete = [name for name in delete if not variants_among([name], self.config)]
            keep += [name for name in self.files if name == LAYOUT.card and name in there and name not in keep]
        send = {name: path.stat().st_size for name, path in self.files.items() if name not in keep}
        return PushPlan(send, keep, delete, parent)

    def push(self, message: str = "Upload bundle", *, create_pr: bool = False, tag: str | None = None) -> str:
        """Makes the repository and the branch if needed, and commits what the plan says.

        Interrupted at any moment, the branch is at the old commit or at the new one. Run again, it sends what is
        missing.

        Args:
            message, create_pr, tag: see ``push_to_hub``.

        Returns:
            The URL of the commit or the pull request.

        Raises:
            BundleError: as for ``plan``; no right to write; the tag is on another commit; someone else wrote to the
                branch meanwhile.
            InputError: the card's metadata are not valid.
        """
        with self._explained():
            if self._look_up()[0] is None:
                self._ask("making the repository", self.api.create_repo, private=self.private, exist_ok=True)
                if self.branch != "main":
                    self._ask("making the branch", self.api.create_branch, branch=self.branch, exist_ok=True)
            plan = self.plan()
            if tag:
                self._check_tag(tag, plan)
            url, oid = with_retries(partial(self._commit, plan, message, create_pr), f"committing ({self.repo_id})")
            if tag:  # it may be there by now, if only the answer to an attempt was lost
                self._ask("tagging", self.api.create_tag, tag=tag, revision=oid, exist_ok=True)
        return url

    def _check_tag(self, tag: str, plan: PushPlan) -> None:
        """Raises BundleError if the tag is on another commit than the one that the push ends at."""
        refs = self._ask("listing the tags", self.api.list_repo_refs)
        tagged = {ref.name: ref.target_commit for ref in refs.tags}.get(tag)
        if tagged is not None and (plan.send or plan.delete or tagged != plan.parent):
            raise BundleError(
                f"{self.repo_id} has the tag {tag!r} already, on the commit {tagged}: nothing was sent. Give another "
                "tag, or delete that one first (`hf repos tag delete`)"
            )

    def _look_up(self) -> tuple[str | None, dict[str, RepoSibling]]:
        """The branch's commit, None if there is none, and its files; refuses one that is public but should not be."""
        seconds = constants.HF_HUB_ETAG_TIMEOUT
        look_up = partial(self._ask, "looking up the repository", self.api.model_info, timeout=seconds)
        try:
            if self.private:
                _check_private(look_up(), self.private)
            found = look_up(revision=self.branch, files_metadata=True)
        except RepositoryNotFoundError:
            return None, {}
        except RevisionNotFoundError:
            if self.branch != "main":  # which the branch will begin with
                self._check_is_bundle(look_up(files_metadata=True))
            return None, {}
        self._check_is_bundle(found)
        return found.sha, {file.rfilename: file for file in found.siblings or ()}

    def _check_is_bundle(self, found: ModelInfo) -> None:
        """Raises BundleError if a repository has files that are not those of a bundle."""
        there = {file.rfilename: file for file in found.siblings or ()}
        if self.force or set(there) <= {".gitattributes"}:
            return
        config = there.get(LAYOUT.config)
        if config and (_is_same(self.files[LAYOUT.config], config) or self._is_bundle_config(str(found.sha))):
            return
        raise BundleError(
            f"{self.repo_id} holds something else than an ADPretrain bundle ({', '.join(sorted(there)[:4])} ...): "
            "nothing was sent. Push to another repository, or insist by --force (force=True), which overwrites it"
        )

    def _is_bundle_config(self, commit: str) -> bool:
        with TemporaryDirectory() as cache:
            download = partial(self.api.hf_hub_download, filename=LAYOUT.config, revision=commit, cache_dir=cache)
            text = Path(self._ask("reading its configuration", download)).read_bytes()
        try:
            values = json.loads(text)
        except ValueError:
            return False
        ours = isinstance(values, dict) and "format_version" in values
        return ours and values.get("model_type", MODEL_TYPE) == MODEL_TYPE

    def _commit(self, plan: PushPlan, message: str, create_pr: bool) -> tuple[str, str]:
        """Commits what a plan says, and returns the URL and the commit; may be repeated."""
        moved = not create_pr and self._look_up()[0] != plan.parent
        if moved:  # by our own commit, if only the answer to it was lost; then all is there
            plan = self.plan()
        if not plan.send and not plan.delete:
            logger.info("%s is up to date", self.repo_id)
            return f"{self.api.endpoint}/{self.repo_id}/commit/{plan.parent}", str(plan.parent)
        if moved:
            raise BundleError(f"someone else wrote to {self.branch} of {self.repo_id} meanwhile: look, and push again")
        additions = [CommitOperationAdd(name, str(self.files[name])) for name in plan.send]
        deletions = [CommitOperationDelete(name) for name in plan.delete]
        options: dict[str, Any] = {"revision": self.branch, "parent_commit": plan.parent, "create_pr": create_pr}
        try:
            info = self.api.create_commit(self.repo_id, [*additions, *deletions], commit_message=message, **options)
        except RuntimeError as error:  # the client's wrapping of a failed upload
            raise error.__cause__ or error from error
        except (json.JSONDecodeError, UnicodeError):  # of an answer that is not the Hub's
            raise
        except ValueError as error:
            raise InputError(f"the Hub does not accept the card of {self.folder}: {error}") from error
        return info.pr_url or info.commit_url, info.oid

    def _explained(self) -> AbstractContextManager[None]:
        return explained(self.repo_id, self.branch, doing="pushing to")

    def _ask(self, what: str, call: Callable[..., Any], **arguments: Any) -> Any:
        return with_retries(partial(call, self.repo_id, **arguments), f"{what} ({self.repo_id})")


def check_rights(
    repo_id: str, *, private: bool | None = None, token: str | bool | None = None, repo_type: str = "model"
) -> None:
    """Checks that a push will be let in, for work that takes long before it has anything to push; writes nothing.

    Args:
        repo_id, private, token: see ``push_to_hub``.
        repo_type: ``"model"`` or ``"dataset"``.

    Raises:
        BundleError: no name of a repository, no access, no connection, no right to write there or to make the
            repository, or a public one where a private one was asked for.
    """
    api = HfApi(token=token)
    with explained(repo_id, None, doing="pushing to"):
        validate_repo_id(repo_id)
        try:
            ask = partial(api.auth_check, repo_id, write=True, repo_type=repo_type)
            with_retries(ask, f"asking for rights ({repo_id})")
            look_up = partial(api.repo_info, repo_id, repo_type=repo_type)
            found: Any = with_retries(look_up, f"looking up the repository ({repo_id})")
        except RepositoryNotFoundError:
            me = with_retries(api.whoami, "asking who the token is of")
        else:
            _check_private(found, private)
            return
    owner, names = repo_id.partition("/")[0], [me["name"], *(group["name"] for group in me["orgs"])]
    role = me.get("auth", {}).get("accessToken", {}).get("role")
    if owner not in names or role == "read":
        raise BundleError(
            f"there is no repository {repo_id}, and the token, of {me['name']}, may not make it: its rights are "
            f"{role!r}, in {', '.join(names)}. Use another name, or a token with the right to write there"
        )


def _check_private(found: ModelInfo | DatasetInfo, private: bool | None) -> None:
    """Raises BundleError if a repository is public and a private one was asked for."""
    if private and not found.private:
        raise BundleError(
            f"{found.id} is public, and a private repository was asked for: nothing was sent. Make it private, or "
            "choose another name"
        )


def _is_same(path: Path, file: RepoSibling) -> bool:
    digest, expected = (git_sha1_of, file.blob_id) if file.lfs is None else (sha256_of, file.lfs.sha256)
    return path.stat().st_size == file.size and digest(path) == expected
