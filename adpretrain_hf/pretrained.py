"""Making, loading, saving and pushing an extractor as a bundle."""

import tempfile
from pathlib import Path
from typing import Any, Optional, TypeVar, Union

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import nn

from adpretrain_hf import bundle
from adpretrain_hf.backbone_loading import load_backbone
from adpretrain_hf.backbones import Backbone
from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.errors import InputError
from adpretrain_hf.files import atomic_path, remove, write_text
from adpretrain_hf.hub import bundle_folder
from adpretrain_hf.model_card import card_text
from adpretrain_hf.presets import PRESETS
from adpretrain_hf.projector import Projectors
from adpretrain_hf.push import BundlePusher
from adpretrain_hf.quantization import is_quantized

PathLike = Union[str, Path]
T = TypeVar("T", bound="Pretrained")


class Pretrained(nn.Module, ModelHubMixin):
    """The half of ``ADPretrainFeatureExtractor`` that deals with bundles; it computes nothing.

    The mixin's own loading is not used: it swallows most errors about the configuration and loads what fits.
    """

    config: ADPretrainConfig
    backbone: Backbone
    projectors: Projectors
    variant: str

    @classmethod
    def from_backbone(
        cls: type[T],
        source: str,
        *,
        dtype: torch.dtype = torch.float32,
        hub: Optional[dict[str, Any]] = None,
        **overrides: Any,
    ) -> T:
        """Makes a new extractor whose projectors are the identity: its features are the residuals.

        Args:
            source: a preset's name, a transformers id or folder, ``open_clip:<arch>/<weights>`` or
                ``imagebind:<checkpoint>``.
            dtype: precision of the weights.
            hub: ``token``, ``cache_dir``, ``local_files_only`` for the Hub.
            overrides: fields of ``ADPretrainConfig``, e.g. ``layers``, ``image_size``, or ``backbone`` to record the
                Hub id that a folder comes from.

        Raises:
            InputError: the source is unknown or not supported, or a field is out of its range.
        """
        config = ADPretrainConfig.from_backbone(source, hub=hub, **overrides)
        backbone = load_backbone(
            config.backbone if source in PRESETS else source,
            config.layers,
            revision=config.backbone_revision,
            dtype=dtype,
            **(hub or {}),
        )
        config = config.replace(
            backbone_digest=backbone.digest(), backbone_revision=config.backbone_revision or backbone.commit
        )
        extractor = cls(config, backbone, Projectors(config).to(dtype).requires_grad_(False))
        # A network of a kind that does not fit fails here, rather than at the first image.
        backbone(torch.zeros(1, 3, config.image_size, config.image_size, dtype=dtype))
        return extractor

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[T],
        pretrained_model_name_or_path: PathLike,
        *,
        variant: Optional[str] = None,
        dtype: Union[torch.dtype, str, None] = None,
        device: Union[str, torch.device, None] = None,
        image_size: Optional[int] = None,
        revision: Optional[str] = None,
        token: Union[str, bool, None] = None,
        cache_dir: Optional[PathLike] = None,
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
            device: where to put the weights; the CPU by default.
            image_size: overrides the size that images are prepared to, in pixels.
            revision, token, cache_dir, local_files_only, force_download: for the Hub.

        Raises:
            MissingPathError: no such folder or repository.
            BundleError: not a bundle, an incomplete or damaged one, or without this variant.
        """
        hub: dict[str, Any] = {
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        folder = bundle_folder(pretrained_model_name_or_path, variant, revision=revision, **hub)
        config = bundle.read_config(folder)
        if image_size is not None:
            config = config.replace(image_size=image_size)
        variant = variant or config.default_variant
        precision = _as_dtype(dtype or torch.float32)
        projectors = bundle.load_projectors(folder, config, variant, precision)
        backbone = bundle.load_bundled_backbone(folder, config, precision, **hub)
        extractor = cls(config, backbone, projectors, variant)
        return extractor.to(device) if device is not None else extractor

    def save_pretrained(
        self,
        save_directory: PathLike,
        *,
        include_backbone: bool = True,
        push_to_hub: bool = False,
        repo_id: Optional[str] = None,
        **push_to_hub_kwargs: Any,
    ) -> Optional[str]:
        """Writes the bundle of this variant to a folder.

        Saving two variants of one extractor to the same folder makes a bundle of both.

        Args:
            save_directory: the folder; made if it is not there.
            include_backbone: False leaves ``backbone/`` out; loading then fetches it by the id and the commit in the
                configuration.
            push_to_hub: also push it, to ``repo_id`` (the folder's name by default).
            repo_id, push_to_hub_kwargs: for ``push_to_hub``.

        Raises:
            InputError: the folder holds variants of another extractor, or a backbone that was not loaded from the Hub
                was to be left out.
        """
        if push_to_hub_kwargs and not push_to_hub:
            raise TypeError(f"unknown arguments {sorted(push_to_hub_kwargs)}: they are for push_to_hub=True")
        self._write(Path(save_directory), include_backbone)
        if push_to_hub:
            name = repo_id or Path(save_directory).name
            return self.push_to_hub(name, include_backbone=include_backbone, **push_to_hub_kwargs)
        return None

    def _write(self, folder: Path, include_backbone: bool, repository: Optional[str] = None) -> None:
        config = self.config
        if is_quantized(self):
            raise InputError("an extractor with quantised layers cannot be saved: save the one that it was made of")
        if include_backbone and config.backbone_digest:
            # Of the weights as they are written: in memory they may have another precision than they once had.
            config = config.replace(backbone_digest=self.backbone.digest())
        bundle.check_no_foreign_variants(folder, config, self.variant)
        if include_backbone:
            with atomic_path(folder / bundle.BACKBONE_FOLDER) as temporary:
                self.backbone.save(temporary)
        elif not config.backbone_revision:
            raise InputError(
                f"the backbone {config.backbone!r} has no commit on the Hub to fetch it from again: save with "
                "include_backbone=True, or give the configuration a backbone id and backbone_revision"
            )
        else:
            remove(folder / bundle.BACKBONE_FOLDER)  # it would be taken instead
        bundle.write_weights(folder / bundle.weights_file(config, self.variant), self.projectors)
        bundle.write_config(folder, config)
        if not (folder / bundle.CARD_FILE).exists():  # a card is edited by hand
            write_text(folder / bundle.CARD_FILE, self._card(repository))

    def _card(self, repository: Optional[str] = None) -> str:
        return card_text(self.config, repository=repository, trained=not self.projectors.are_identity())

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload bundle",
        private: Optional[bool] = None,
        token: Union[str, bool, None] = None,
        branch: Optional[str] = None,
        create_pr: bool = False,
        tag: Optional[str] = None,
        include_backbone: bool = True,
    ) -> str:
        """Pushes this variant in one commit; other variants of the same extractor, and the card, stay as they are.

        A folder of several variants is pushed by ``BundlePusher``, or ``adpretrain push``.

        Args:
            repo_id: ``owner/name``; made if it is not there.
            commit_message: of the commit.
            private: True makes a new repository private, and never writes to one that is public.
            token: of the user; the one that is logged in by default.
            branch: made if it is not there; ``main`` by default.
            create_pr: open a pull request instead.
            tag: name to give to the commit.
            include_backbone: see ``save_pretrained``.

        Returns:
            The URL of the commit or the pull request.

        Raises:
            BundleError: no access, no connection, a public repository where a private one was asked for.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), include_backbone, repo_id)
            pusher = BundlePusher(folder, repo_id, private=private, branch=branch, token=token, one_variant=True)
            return pusher.push(commit_message, create_pr=create_pr, tag=tag)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that is saved with the bundle."""
        return ModelCard(self._card())


def _as_dtype(dtype: Union[torch.dtype, str]) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InputError(f"dtype is {dtype!r}, expected float16, bfloat16, float32 or float64")
    return found
