"""``adpretrain info``: what a bundle or a reference bank is."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from adpretrain_hf.cli.arguments import add_preparation, preparation

HELP = "say what a bundle or a reference bank is"
EXAMPLES = """\
  adpretrain info hub_cards/adpretrain-dinov2-small
  adpretrain info screw.safetensors --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only this verb takes, and what it shares."""
    parser.add_argument("path", help="a bundle (folder or id on the Hub), or a .safetensors bank")
    add_preparation(parser, "as the bundle says")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Says what a bundle or a reference bank is."""
    import torch

    from adpretrain_hf.bundle import LAYOUT, describe_bundle, read_projectors, variants_among
    from adpretrain_hf.reference import ReferenceBank

    if str(args.path).endswith(".safetensors"):
        bank = ReferenceBank.load(args.path)
        if args.json:
            print(json.dumps(_bank_facts(bank) | _judging_facts(bank), indent=2))
        else:
            print(bank, *(f"{name:22} {value}" for name, value in _judging_facts(bank).items()), sep="\n")
        return 0
    config, names = describe_bundle(args.path)
    config = config.replace(**preparation(args))
    variants = variants_among(names, config)
    facts = config.to_dict() | {
        "fingerprint": config.fingerprint,  # of reference banks, which fit one size and mode
        "variants": variants,
        "backbone_included": any(name.startswith(f"{LAYOUT.backbone}/") for name in names),
        "references": [Path(name).stem for name in names if re.fullmatch(r"references/[^/]+\.safetensors", name)],
    }
    if Path(args.path).is_dir():  # on the Hub, only the weights would tell
        weights = LAYOUT.weights_of((variants or [config.default_variant])[0], config)
        projectors = read_projectors(Path(args.path) / weights, config, torch.float32)
        facts["trained"] = not projectors.are_identity()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    if facts.get("trained") is False:
        facts["trained"] = "no: the projectors are the identity, the features are the residuals"
    print("\n".join(f"{name:22} {value}" for name, value in facts.items()))
    return 0


def _bank_facts(bank: Any) -> dict[str, Any]:
    patches, channels = bank.patches[0].shape
    about = {name: getattr(bank, name) for name in ("category", "num_images", "fingerprint")}
    dtype = str(bank.patches[0].dtype).removeprefix("torch.")
    about["images"] = [image.name for image in bank.images]
    if bank.tiles:
        about |= {"tiles": bank.tiles.to_dict(), "tile_reference": bank.tile_reference}
    return about | {"patches": patches, "levels": len(bank.patches), "channels": channels, "dtype": dtype}


def _judging_facts(bank: Any) -> dict[str, Any]:
    """By what a bank's product is judged."""
    from adpretrain_hf.scoring import region_mask

    judgement, calibration = bank.judgement, bank.judgement.calibration
    facts = {"core_set": bank.compacted, "augment_references": bank.augmentation or "none"}
    facts |= {name: value for name, value in bank.options.items() if name in ("image_score", "top")}
    counting = None if judgement.region is None else float(region_mask(judgement.region).float().mean())
    facts["region"] = counting and f"{counting:.1%} of the image count"
    facts["calibration"] = calibration and {
        "images": len(calibration.scores),
        "false_alarms": calibration.false_alarms,
        "threshold": calibration.threshold(),
        "approximate": calibration.approximate,
    }
    return facts
