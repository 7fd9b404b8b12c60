"""Writing an extractor as a bundle: every file whole or not at all, and nothing of another extractor beside it."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from adpretrain_hf.backbones import Backbone
from adpretrain_hf.bundle.layout import LAYOUT, files_in, read_config, variants_among, write_config
from adpretrain_hf.bundle.load import Parts
from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.errors import InputError
from adpretrain_hf.files import atomic_path, remove, write_text
from adpretrain_hf.projector import Projectors
from adpretrain_hf.reference import write_references


def save(
    parts: Parts,
    folder: Path,
    *,
    include_backbone: bool = True,
    references: bool = False,
    repository: str | None = None,
) -> None:
    """Writes the bundle of one variant to a folder, beside other variants of the same extractor that are there.

    Args:
        parts: of the extractor.
        folder: made if it is not there.
        include_backbone, references: see ``save_pretrained``.
        repository: id on the Hub that the card names, if it is known.

    Raises:
        InputError: the folder holds variants of another extractor, its layers are quantised, or a backbone that was not
            loaded from the Hub was to be left out; see ``write_references``.
    """
    config, backbone, projectors, variant, banks, whole = parts
    if whole is not None:
        raise InputError("an extractor of some of a bundle's levels cannot be saved: load it without `layers`")
    if is_quantized(backbone) or is_quantized(projectors):
        raise InputError("an extractor with quantised layers cannot be saved: save the one that it was made of")
    config = _with_digests(config, backbone if include_backbone else None)
    check_no_foreign_files(folder, config, variant)
    if include_backbone:
        with atomic_path(folder / LAYOUT.backbone) as temporary:
            backbone.save(temporary)
    elif not config.backbone_revision:
        raise InputError(
            f"the backbone {config.backbone!r} has no commit on the Hub to fetch it from again: save with "
            "include_backbone=True, or give the configuration a backbone id and backbone_revision"
        )
    else:
        remove(folder / LAYOUT.backbone)  # it would be taken instead
    if references:
        write_references(banks or {}, folder / LAYOUT.references)
    write_projectors(projectors, folder / LAYOUT.weights_of(variant, config))
    write_config(folder, config)
    if not (folder / LAYOUT.card).exists():  # a card is edited by hand
        write_text(folder / LAYOUT.card, card_of(parts, repository))


def _with_digests(config: ADPretrainConfig, backbone: Backbone | None) -> ADPretrainConfig:
    """The configuration with the identity of the weights as they are written.

    Where they are those that were loaded, rounded, they keep their name too: their patches are interchangeable.
    """
    if backbone is None or config.backbone_digest is None:
        return config.replace(backbone_saved_digest=None)
    found = backbone.digest()
    if found == config.backbone_digest or found not in backbone.loaded_digests:
        return config.replace(backbone_digest=found, backbone_saved_digest=None)
    return config.replace(backbone_saved_digest=found)


def card_of(parts: Parts, repository: str | None = None) -> str:
    """The model card of a new extractor, as Markdown."""
    from adpretrain_hf.bundle.card import card_text

    return card_text(parts.config, repository=repository, trained=not parts.projectors.are_identity())


def write_projectors(projectors: Projectors, path: Path) -> None:
    """Writes the projectors' tensors; the same tensors give the same bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in projectors.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def is_quantized(module: nn.Module) -> bool:
    """Whether any of its layers is in 8 bits; those keep their weights packed, not as tensors."""
    return not all(isinstance(value, Tensor) for value in module.state_dict().values())


def check_no_foreign_files(folder: Path, config: ADPretrainConfig, variant: str) -> None:
    """Raises InputError if saving to a folder would leave what is another extractor's beside the new one.

    Those are projectors of another configuration, banks of another fingerprint, and the card of another backbone.
    """
    if not (folder / LAYOUT.config).is_file():
        return
    there, files = read_config(folder), files_in(folder)
    others = [name for name in variants_among(files, there) if name != variant]
    found = [f"the variants {others}"] if others and there != config else []
    banks = [name for name in files if name.startswith(f"{LAYOUT.references}/")]
    found += banks if there.fingerprint != config.fingerprint else []
    found += [LAYOUT.card] if LAYOUT.card in files and there.backbone != config.backbone else []
    if found:
        differing = sorted(name for name, value in config.to_dict().items() if there.to_dict()[name] != value)
        raise InputError(
            f"{folder} holds {', '.join(found)} of an extractor with another configuration (it differs in "
            f"{differing}): save to another folder, or remove that one first"
        )
