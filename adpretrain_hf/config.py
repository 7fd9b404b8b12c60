"""ADPretrainConfig: everything about an extractor that is not a tensor; the presets, published ones and more."""

import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from adpretrain_hf.backbones import CLIP, IMAGENET, describe, without_path
from adpretrain_hf.errors import BundleError, InputError, check_count, whole_number

FORMAT_VERSION = 1
MODEL_TYPE = "adpretrain"  # by which transformers' AutoConfig tells kinds of models apart
RESIZE_MODES = ("crop", "resize")
DECODINGS = ("exact", "fast")


def quarter_levels(depth: int) -> tuple[int, ...]:
    """Blocks at the quarters of a network, rounded up: 12 -> (3, 6, 9, 12)."""
    return tuple(sorted({math.ceil(depth * quarter / 4) for quarter in (1, 2, 3, 4)}))


def _published(backbone: str, width: int, patch: int, depth: int, **more: Any) -> dict[str, Any]:
    sizes = {"backbone": backbone, "hidden_size": width, "patch_size": patch, "layers": quarter_levels(depth)}
    return sizes | {"normalize_tokens": False, "resize_mode": "crop"} | more


_CLIP_STATISTICS = {"mean": CLIP[0], "std": CLIP[1]}
_UNPUBLISHED = {"normalize_tokens": True, "resize_mode": "resize"}

PRESETS: dict[str, dict[str, Any]] = {
    "dinov2-base": _published("facebook/dinov2-base", 768, 14, 12),
    "dinov2-large": _published("facebook/dinov2-large", 1024, 14, 24),
    "clip-base": _published("open_clip:ViT-B-16-quickgelu/openai", 768, 16, 12, **_CLIP_STATISTICS),
    "clip-large": _published("open_clip:ViT-L-14-quickgelu/openai", 1024, 14, 24, **_CLIP_STATISTICS),
    "imagebind": _published("imagebind:imagebind_huge.pth", 1280, 14, 32, **_CLIP_STATISTICS),
    "dinov2-small": _published("facebook/dinov2-small", 384, 14, 12, **_UNPUBLISHED),
    "dinov2-giant": _published("facebook/dinov2-giant", 1536, 14, 40, **_UNPUBLISHED),
}


@dataclass(frozen=True)
class ADPretrainConfig:
    """The description of one extractor; checks itself when it is made.

    Attributes:
        backbone: where the backbone comes from: a transformers id, ``open_clip:<arch>/<weights>`` or
            ``imagebind:<checkpoint>``; of a folder or a file its name, without the path.
        hidden_size: C, channels of a token.
        patch_size: side of a patch, in pixels.
        layers: the levels: after which blocks, counted from 1, tokens are taken.
        image_size: side that images are prepared to, in pixels; a multiple of ``patch_size``.
        mean, std: normalisation of RGB values in [0, 1].
        resize_mode: ``"resize"``, which keeps the whole image and its aspect ratio, or ``"crop"``, the published centre
            crop to a square, as presets of the released checkpoints have it.
        decode: ``"exact"``, or ``"fast"``: JPEG files are decoded at a half, a quarter or an eighth of their size where
            that is still as large as the network's input; features change a little.
        num_heads: heads of the projectors' cross-attention (16 for every C in the released code).
        num_reference_tokens: learned reference tokens of a projector (2048 in the released code).
        normalize_tokens: scale every token to unit length before matching and subtracting. Off in the published
            checkpoints. The last block's tokens are many times longer than the first level's and would drown it.
        residual_scale: one factor per level on the residuals; empty means 1 for all.
        backbone_revision: commit or tag of ``backbone`` on the Hub.
        backbone_digest: identity of the backbone's weights, so that equal settings on other weights are told apart.
        backbone_saved_digest: that of the weights as the bundle holds them, where it was saved in less precision.
        reported_scores: what the makers of released projectors reported, by variant and metric; for people.
        default_variant: name of the projectors in ``model.safetensors``.
        variant_aliases: other names of theirs, where the same ones are best for several detectors.
        format_version: version of the bundle's layout.

    Raises:
        InputError: a field is out of its range; the message names the value and the range.
    """

    backbone: str
    hidden_size: int
    patch_size: int
    layers: tuple[int, ...]
    image_size: int = 224
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    resize_mode: str = "resize"
    decode: str = "exact"
    num_heads: int = 16
    num_reference_tokens: int = 2048
    normalize_tokens: bool = True
    residual_scale: tuple[float, ...] = ()
    backbone_revision: str | None = None
    backbone_digest: str | None = None
    backbone_saved_digest: str | None = None
    reported_scores: dict[str, dict[str, float]] = field(default_factory=dict, hash=False)
    default_variant: str = "angle"
    variant_aliases: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if whole_number(self.format_version) != FORMAT_VERSION:
            raise InputError(
                f"format_version is {self.format_version!r}, this version of adpretrain-hf reads {FORMAT_VERSION}: "
                "install the version of adpretrain-hf that wrote the bundle, or a newer one"
            )
        # JSON has lists and integers for floats, numpy its own numbers; equal settings must be equal values.
        object.__setattr__(self, "format_version", FORMAT_VERSION)
        for name in ("hidden_size", "patch_size", "image_size", "num_heads", "num_reference_tokens"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        object.__setattr__(self, "layers", _numbers("layers", self.layers, operator.index))
        for name in ("mean", "std", "residual_scale"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), float))
        if not self.residual_scale:
            object.__setattr__(self, "residual_scale", (1.0,) * len(self.layers))
        for holds, name, expected in self._rules():
            _require(holds, name, getattr(self, name), expected)
        object.__setattr__(self, "variant_aliases", tuple(self.variant_aliases))
        for name in (self.default_variant, *self.variant_aliases):
            check_variant_name(name)

    def _rules(self) -> Iterator[tuple[bool, str, str]]:
        """What must hold, of which field, and what that may be; each may presume the ones before."""
        fits, near = self.image_size % self.patch_size == 0, nearest_multiples(self.image_size, self.patch_size)
        yield fits, "image_size", f"a multiple of patch_size={self.patch_size}: {near}"
        yield self.hidden_size % self.num_heads == 0, "num_heads", f"a divisor of hidden_size={self.hidden_size}"
        yield len(self.mean) == 3 and all(map(_is_finite, self.mean)), "mean", "3 finite numbers"
        yield len(self.std) == 3 and _are_factors(self.std), "std", "3 finite numbers > 0"
        rising = all(a < b for a, b in zip((0, *self.layers), self.layers, strict=False))
        yield bool(self.layers) and rising, "layers", "block numbers >= 1 in rising order, e.g. (3, 6, 9, 12)"
        one_each = len(self.residual_scale) == len(self.layers) and _are_factors(self.residual_scale)
        yield one_each, "residual_scale", f"one finite factor > 0 for each of the {len(self.layers)} levels"
        yield _is_text(self.backbone), "backbone", "a non-empty text"
        yield self.resize_mode in RESIZE_MODES, "resize_mode", f"one of {RESIZE_MODES}"
        yield self.decode in DECODINGS, "decode", f"one of {DECODINGS}"
        yield isinstance(self.normalize_tokens, bool), "normalize_tokens", "True or False"
        for name in ("backbone_revision", "backbone_digest", "backbone_saved_digest"):
            yield getattr(self, name) is None or _is_text(getattr(self, name)), name, "a non-empty text, or None"
        scores = self.reported_scores
        yield isinstance(scores, dict), "reported_scores", "{variant: {metric: finite number}}"
        finite = all(isinstance(one, dict) and all(map(_is_finite, one.values())) for one in scores.values())
        yield finite, "reported_scores", "{variant: {metric: finite number}}"

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "ADPretrainConfig":
        """Returns one of the known configurations (paper, appendix; method table of the released code).

        Args:
            name: a key of ``PRESETS``, e.g. ``"dinov2-base"``.
            overrides: fields to set otherwise.

        Raises:
            InputError: unknown name or field.
        """
        if name not in PRESETS:
            raise InputError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
        return cls._checked(PRESETS[name] | overrides)

    @classmethod
    def from_backbone(cls, source: str, *, hub: dict[str, Any] | None = None, **overrides: Any) -> "ADPretrainConfig":
        """Derives a configuration from a backbone: its sizes, its statistics, levels at the quarters of its depth.

        Args:
            source: a preset's name, a transformers id or folder, ``open_clip:<arch>/<weights>`` or
                ``imagebind:<checkpoint>``. No weights are loaded.
            hub: ``token``, ``cache_dir``, ``local_files_only`` for the Hub.
            overrides: fields to set otherwise, e.g. ``layers=(2, 4, 6, 8)``.

        Raises:
            InputError: not a vision transformer that is supported, not reachable, or an override out of range.
        """
        if source in PRESETS:  # the whole image, whatever is published: what is made of it is new
            return cls.preset(source, **{"resize_mode": "resize"} | overrides)
        spec = describe(source, revision=overrides.get("backbone_revision"), **(hub or {}))
        derived = {
            "backbone": without_path(str(Path(source).resolve()) if Path(source).is_dir() else source),
            "hidden_size": spec.hidden_size,
            "patch_size": spec.patch_size,
            "layers": quarter_levels(spec.depth),
            "image_size": spec.image_size,
            "mean": spec.mean,
            "std": spec.std,
        }
        config = cls._checked(derived | overrides)
        expected = f"block numbers from 1 to {spec.depth}, the depth of {source}"
        _require(config.layers[-1] <= spec.depth, "layers", config.layers, expected)
        return config

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ADPretrainConfig":
        """Reads what ``to_dict`` wrote, with or without transformers' ``model_type``.

        Raises:
            BundleError: a field is unknown, missing or out of range, or the format is of another version or model.
        """
        if not isinstance(values, dict):
            raise BundleError(f"a configuration is a JSON object, got {type(values).__name__}")
        # An unknown version comes first: its other fields mean nothing to this one.
        if values.get("format_version") != FORMAT_VERSION:
            raise BundleError(
                f"format_version is {values.get('format_version')!r}, this version of adpretrain-hf reads "
                f"{FORMAT_VERSION}: it is not an ADPretrain bundle, or needs a newer adpretrain-hf"
            )
        if values.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise BundleError(
                f"model_type is {values['model_type']!r}, expected {MODEL_TYPE!r}: it is not an ADPretrain bundle"
            )
        try:
            return cls._checked({name: value for name, value in values.items() if name != "model_type"})
        except InputError as error:
            raise BundleError(str(error)) from error

    @classmethod
    def _checked(cls, values: dict[str, Any]) -> "ADPretrainConfig":
        names = {one.name for one in fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise InputError(f"unknown configuration fields {unknown}: expected some of {sorted(names)}")
        missing = [name for name in ("backbone", "hidden_size", "patch_size", "layers") if name not in values]
        if missing:
            raise InputError(f"configuration fields {missing} are missing")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return asdict(self)

    def replace(self, **changes: Any) -> "ADPretrainConfig":
        """A copy with some fields changed, checked again."""
        if "layers" in changes and set(self.residual_scale) == {1.0}:
            changes = {"residual_scale": ()} | changes  # still 1 for all, however many there are
        return self._checked({one.name: getattr(self, one.name) for one in fields(self)} | changes)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The levels' names, ``"layer3"`` for block 3: the keys of the features."""
        return tuple(f"layer{n}" for n in self.layers)

    def places(self, layers: Sequence[str] | None = None) -> list[int]:
        """Which of the levels some are, from 0; all by default.

        Args:
            layers: their names, in their order.

        Raises:
            InputError: they are not some of the levels.
        """
        wanted = self.layer_names if layers is None else tuple(layers)
        places = [place for place, name in enumerate(self.layer_names) if name in wanted]
        if not wanted or wanted != tuple(self.layer_names[place] for place in places):
            raise InputError(f"layers are {wanted}, expected some of {self.layer_names}, in their order")
        return places

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that are equal where reference patches are interchangeable: what shapes a raw token.

        The projectors are left out, for a bank holds what goes into them.
        """
        names = ["hidden_size", "patch_size", "layers", "image_size", "mean", "std", "resize_mode", "normalize_tokens"]
        names += ["decode"] if self.decode != "exact" else []  # as before there was a choice
        # Where the weights themselves are known, it does not matter under which name they came.
        names += ["backbone_digest"] if self.backbone_digest else ["backbone", "backbone_revision"]
        text = json.dumps({name: getattr(self, name) for name in names}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_variant_name(name: str) -> str:
    """Returns ``name`` if it can stand in a file name.

    Raises:
        InputError: it is empty or has other characters than letters, digits, ``-`` and ``_``.
    """
    plain = _is_text(name) and all(c.isascii() and (c.isalnum() or c in "-_") for c in name)
    _require(plain, "variant", name, "letters, digits, '-' and '_', e.g. 'angle' or 'norm'")
    return name


def nearest_multiples(value: int, patch_size: int) -> str:
    """The multiples of the patch size around a number of pixels, for people: ``"322 or 336"``."""
    below = value // patch_size * patch_size
    return f"{below} or {below + patch_size}" if below else f"{patch_size}"


def _numbers(name: str, value: Any, convert: Callable[[Any], Any]) -> tuple[Any, ...]:
    try:
        if isinstance(value, (str, dict)) or any(isinstance(one, (str, bool)) for one in value):
            raise TypeError("text or truth values in place of numbers")
        return tuple(convert(one) for one in value)
    except (TypeError, ValueError, OverflowError) as error:
        kind = "integers" if convert is operator.index else "numbers"
        raise InputError(f"{name} is {value!r}, expected a list or tuple of {kind}") from error


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_factors(values: Iterable[float]) -> bool:
    return all(_is_finite(value) and value > 0 for value in values)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf  # false for NaN


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value!r}, expected {expected}")
