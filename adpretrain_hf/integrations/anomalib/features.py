"""DetectorFeatures: the features of an extractor as anomalib's detectors call for them."""

import logging
import operator
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.reference import ReferenceBank
from adpretrain_hf.scoring import BY_MAXIMUM, Calibration, Judgement

_LOG = logging.getLogger(__name__)


class DetectorFeatures(nn.Module):
    """Features of prepared images, of one kind and some levels; a drop-in for anomalib's ``TimmFeatureExtractor``.

    The reference bank travels with the state dict, so that a checkpoint gives the scores that it was saved with.

    Args:
        extractor: makes the features.
        kind: ``"raw"``, the backbone's tokens; ``"residual"``, what the projectors are given: the tokens (of unit
            length, if the extractor's configuration says so) less their nearest references, scaled; or
            ``"pretrained"``, what the projectors make of it.
        levels: block numbers, some of the extractor's; all by default.

    Attributes:
        layers: names of the levels, the keys of the features.
        out_dims: C of each.
        names: of the bank's images, in their order, e.g. paths; empty where they are not known.
        drawn: whether they were drawn of training data, so that a training on others draws its own.
        own: for each image of the next batch which of the bank's images it is, or None where its name does not tell;
            empty outside of training. What is in the bank, by its name or its tokens, is matched with the others, for
            its own patches would all be found and its residual be 0.

    Raises:
        InputError: an unknown kind, or a level that the extractor does not have.
    """

    def __init__(
        self, extractor: ADPretrainFeatureExtractor, kind: str = "pretrained", levels: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        kinds = ("raw", "residual", "pretrained")
        if kind not in kinds:
            raise InputError(f"unknown features {kind!r}: expected one of {', '.join(kinds)}")
        known = list(extractor.config.layers)
        try:
            wanted = known if levels is None else [operator.index(level) for level in levels]
        except TypeError:
            wanted = []
        if not wanted or wanted != [level for level in known if level in wanted]:
            raise InputError(f"levels are {levels!r}, expected some of {known}, in rising order")
        self.extractor, self.kind = extractor, kind
        self._places = [known.index(level) for level in wanted]
        self.layers = [extractor.layers[place] for place in self._places]
        self.out_dims = [extractor.out_dims[place] for place in self._places]
        self.names: tuple[str, ...] = ()
        self.drawn = False
        self.own: list[int | None] = []
        self._warned = False

    @property
    def needs_reference(self) -> bool:
        """Whether a reference bank must be set before images can be given."""
        return self.kind != "raw"

    @property
    def judgement(self) -> Judgement:
        """How an image's score is taken of its map."""
        bank = self.extractor.reference
        return BY_MAXIMUM if bank is None else bank.judgement

    @property
    def calibration(self) -> Calibration | None:
        """What normal images score by the norm of these features, where the reference's calibration is of them."""
        bank, is_whole = self.extractor.reference, self.kind == "pretrained" and self.layers == [*self.extractor.layers]
        return self.extractor._judgement_of(bank).calibration if is_whole and bank is not None else None

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Prepared images (B, 3, H, W) to ``{"layer<n>": (B, C, h, w)}``.

        Raises:
            InputError: no reference bank is set.
        """
        images = images.to(self.extractor.device, self.extractor.dtype)
        if self.kind == "raw":
            every = self.extractor.backbone(images)
            maps = [every[place] for place in self._places]
        else:
            tokens = self.extractor.encode(images, layers=self.layers)
            maps = self.extractor.residuals(tokens, own=self._own_of(tokens[0]), layers=self.layers)
            self._warn_of_zeros(tokens[0], maps[0])
        if self.kind == "pretrained":
            maps = self.extractor.projectors(maps, self._places)
        return dict(zip(self.layers, maps, strict=True))

    def set_reference(self, references: Any, names: Sequence[str] = ()) -> None:
        """Sets the reference bank.

        Args:
            references: what ``ADPretrainFeatureExtractor.set_reference`` takes.
            names: of its images, in their order; see ``names``.

        Raises:
            InputError: not one name for each image, a bank with tiles or a region of interest, or see there.
        """
        bank = self.extractor.set_reference(references).reference
        if bank is not None and (bank.tiles or bank.judgement.region):
            self.extractor.reference = None
            own = "tiles" if bank.tiles else "a region of interest"
            raise InputError(f"anomalib hands over whole images, and the reference has {own}: {bank}; make one without")
        if names and bank is not None and len(names) != bank.num_images:
            raise InputError(f"got {len(names)} names for {bank.num_images} reference images, expected one for each")
        self.names, self.drawn = tuple(map(str, names)), False

    def note_own(self, names: Sequence[str]) -> None:
        """Says by their names which images the next batch holds, so that those of the bank are recognised."""
        where = {os.path.realpath(name): place for place, name in enumerate(self.names)}
        self.own = [where.get(os.path.realpath(str(name))) for name in names]

    def get_extra_state(self) -> dict[str, Any]:
        """The reference bank, as the state dict holds it."""
        bank = self.extractor.reference
        fields = ("patches", "fingerprint", "category", "num_images", "compacted", "image_patches", "augmentation")
        if bank is None:
            return {}
        known = {"names": [*self.names], "drawn": self.drawn, "judgement": bank.judgement.to_dict()}
        return known | {name: getattr(bank, name) for name in fields}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes over the reference bank that a state dict holds.

        Raises:
            InputError: another extractor made it, or see ``set_reference``.
        """
        values = dict(state)
        names, drawn = values.pop("names", ()), values.pop("drawn", False)
        self.names, self.extractor.reference = (), None
        if values:
            self.set_reference(ReferenceBank(values.pop("patches"), **values), names)
        self.drawn = drawn

    def _own_of(self, tokens: Tensor) -> list[int | None]:
        """For each image which of the bank's it is, or None; empty where none can be left out."""
        bank = self.extractor.reference
        if bank is None or not bank.leaves_out or not self.own:
            return []
        return self._recognised(tokens, bank)

    def _recognised(self, tokens: Tensor, bank: ReferenceBank) -> list[int | None]:
        """Which image of the bank each is: by its name, or by tokens (B, C, h, w) that are equal up to rounding."""
        own = [place for place in self.own for _ in range(len(tokens) // len(self.own))]  # anomalib's tiles are images
        each = tokens[0, 0].numel()
        if None not in own or len(own) != len(tokens) or len(bank) != bank.num_images * each:
            return own
        rows = tokens.flatten(2).mT.float()  # (B, P, C)
        images = bank.patches[self._places[0]].to(rows.device).view(bank.num_images, each, -1).float()  # (N, P, C)
        nearest = torch.cdist(rows.mean(dim=1), images.mean(dim=1)).argmin(dim=1)
        apart = (rows - images[nearest]).flatten(1).norm(dim=1) / rows.flatten(1).norm(dim=1)
        same = apart < (1e-3 if tokens.dtype == torch.float32 else 3e-2)
        found = zip(own, nearest.tolist(), same.tolist(), strict=True)
        return [place if is_same and known is None else known for known, place, is_same in found]

    def _warn_of_zeros(self, tokens: Tensor, residuals: Tensor) -> None:
        """Says once if images that a detector learns from are all but equal to the references, and nothing is left."""
        if not self.own or self._warned:
            return
        lengths = (maps.float().flatten(1).norm(dim=1) for maps in (residuals, tokens))
        is_zero = next(lengths) < 1e-3 * next(lengths)
        if is_zero.float().mean() > 0.5:
            self._warned = True
            _LOG.warning(
                "most residuals of the training images are 0: they are references themselves, which a core-set or a "
                "bank of one image does not let be left out. Take other images as references"
            )
