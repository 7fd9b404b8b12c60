"""What an extractor inherits of bundles: ``from_pretrained`` and its kin, each a call of a function of this room."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelCard, ModelHubMixin

from adpretrain_hf.backbones import Backbone
from adpretrain_hf.bundle.load import Parts, PathLike, load, new
from adpretrain_hf.bundle.save import card_of, save
from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.images import choose_device
from adpretrain_hf.projector import Projectors
from adpretrain_hf.reference import ReferenceBank

T = TypeVar("T", bound="BundleMixin")


class BundleMixin(ModelHubMixin):
    """The half of ``ADPretrainFeatureExtractor`` that deals with bundles; it computes nothing.

    The Hub client's own loading is not used: it swallows most errors about the configuration and loads what fits.
    """

    config: ADPretrainConfig
    backbone: Backbone
    projectors: Projectors
    variant: str
    references: dict[str, ReferenceBank]
    whole: ADPretrainConfig | None

    @classmethod
    def from_backbone(
        cls: type[T],
        source: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        hub: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> T:
        """Makes a new extractor whose projectors are the identity: its features are the residuals.

        Args:
            source: a preset's name, a transformers id or folder, ``open_clip:<arch>/<weights>`` or
                ``imagebind:<checkpoint>``.
            dtype: precision of the weights.
            device: where to put them; the GPU if there is one, and the CPU otherwise, by default.
            hub: ``token``, ``cache_dir``, ``local_files_only`` for the Hub.
            overrides: fields of ``ADPretrainConfig``, e.g. ``layers``, ``image_size``, or ``backbone`` to record the
                Hub id that a folder comes from.

        Raises:
            InputError: the source is unknown or not supported, a field is out of its range, or no such device.
        """
        extractor: Any = cls(*new(source, dtype=dtype, hub=hub, **overrides))
        return extractor.to(choose_device(device))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[T],
        pretrained_model_name_or_path: PathLike,
        *,
        variant: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        image_size: int | None = None,
        resize_mode: str | None = None,
        decode: str | None = None,
        references: bool = False,
        layers: Sequence[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> T:
        """Loads a bundle from a folder or from the Hub, strictly: nothing missing, nothing left over, all finite.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a repository.
            variant: which projectors; ``"angle"`` suits PatchCore and PaDiM, ``"norm"`` scoring by feature norm,
                CFLOW, GLASS and UniAD. The bundle's default by default.
            dtype: precision in memory, e.g. ``torch.bfloat16`` or its name; float32 by default, whatever the files
                hold.
            device: where to put the weights; the GPU if there is one, and the CPU otherwise, by default.
            image_size: overrides the size that images are prepared to, in pixels.
            resize_mode: overrides how: ``"crop"`` to the centre square, as published, or ``"resize"``, which cuts
                nothing off.
            decode: overrides how JPEG files are decoded: ``"exact"``, or ``"fast"`` at a half, a quarter or an eighth
                of their size.
            references: also load the bundle's reference banks, all of them; see ``set_references``.
            layers: names of the levels that are wanted, e.g. ``("layer9",)``, in their order; nothing is kept or
                computed for the others. Banks of all levels fit, but scores are others than with all. All by default.
            revision, token, cache_dir, local_files_only, force_download: for the Hub.

        Raises:
            MissingPathError: no such folder or repository.
            BundleError: not a bundle, an incomplete or damaged one, or without this variant or references.
            InputError: no such device or level, or references that were made with another preparation.
        """
        hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        hub |= {"local_files_only": local_files_only, "force_download": force_download}
        changes = {"image_size": image_size, "resize_mode": resize_mode, "decode": decode}
        what: dict[str, Any] = {"references": references, "layers": layers}
        extractor: Any = cls(*load(pretrained_model_name_or_path, variant, dtype, changes, **what, **hub))
        return extractor.to(choose_device(device))

    def save_pretrained(
        self,
        save_directory: PathLike,
        *,
        include_backbone: bool = True,
        references: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes the bundle of this variant to a folder.

        Saving two variants of one extractor to the same folder makes a bundle of both.

        Args:
            save_directory: the folder; made if it is not there.
            include_backbone: False leaves ``backbone/`` out; loading then fetches it by the id and the commit in the
                configuration.
            references: also write the reference banks that are set, each by its category, beside those that are there.
            push_to_hub: also push it, to ``repo_id`` (the folder's name by default).
            repo_id, push_to_hub_kwargs: for ``push_to_hub``.

        Raises:
            InputError: the folder holds variants of another extractor, a backbone that was not loaded from the Hub was
                to be left out, or there are no references, or one without a category.
        """
        if push_to_hub_kwargs and not push_to_hub:
            raise TypeError(f"unknown arguments {sorted(push_to_hub_kwargs)}: they are for push_to_hub=True")
        what: dict[str, Any] = {"include_backbone": include_backbone, "references": references}
        save(self._parts(), Path(save_directory), **what)
        if push_to_hub:
            return self.push_to_hub(repo_id or Path(save_directory).name, **what, **push_to_hub_kwargs)
        return None

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload bundle",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        tag: str | None = None,
        include_backbone: bool = True,
        references: bool = False,
        force: bool = False,
    ) -> str:
        """Pushes this variant in one commit; other variants of the same extractor, and the card, stay as they are.

        A folder of several variants is pushed by ``BundlePusher``, or ``adpretrain push``.

        Args:
            repo_id: ``owner/name``; made if it is not there.
            commit_message: of the commit.
            private: True makes a new repository private, and refuses to write to one that is public. None leaves the
                visibility to the owner's default and to what it is.
            token: of the user; the one that is logged in by default.
            branch: made if it is not there; ``main`` by default.
            create_pr: open a pull request instead of writing to the branch.
            tag: name to give to the commit.
            include_backbone, references: see ``save_pretrained``.
            force: also write to a repository that holds something else than a bundle; its configuration and its weights
                are then replaced.

        Returns:
            The URL of the commit or the pull request.

        Raises:
            BundleError: no access, no connection, a public repository where a private one was asked for, a repository
                that holds something else than a bundle, a tag that is on another commit.
        """
        from adpretrain_hf.bundle.push import BundlePusher

        with TemporaryDirectory() as folder:
            what: dict[str, Any] = {"include_backbone": include_backbone, "references": references}
            save(self._parts(), Path(folder), **what, repository=repo_id)
            where: dict[str, Any] = {"private": private, "branch": branch, "token": token, "force": force}
            pusher = BundlePusher(folder, repo_id, one_variant=True, **where)
            return pusher.push(commit_message, create_pr=create_pr, tag=tag)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that is saved with the bundle."""
        return ModelCard(card_of(self._parts()))

    def _parts(self) -> Parts:
        return Parts(self.config, self.backbone, self.projectors, self.variant, self.references, self.whole)
