"""The commands that deal with bundles: new, convert, push and info."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from adpretrain_hf import bundle
from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.convert import convert as convert_released
from adpretrain_hf.convert import fetch_released
from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.hub import describe_bundle
from adpretrain_hf.push import BundlePusher
from adpretrain_hf.reference import ReferenceBank


def new(args: Namespace) -> int:
    """Makes a bundle from a backbone; its projectors are the identity."""
    overrides = {
        "layers": args.levels,
        "image_size": args.image_size,
        "resize_mode": args.resize_mode,
        "num_reference_tokens": args.reference_tokens,
        "backbone": args.upstream,
        "backbone_revision": args.revision,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    _check_free(args.output)
    torch.manual_seed(args.seed)
    extractor = ADPretrainFeatureExtractor.from_backbone(args.backbone, dtype=getattr(torch, args.dtype), **overrides)
    extractor.save_pretrained(args.output, include_backbone=not args.no_backbone)
    print(f"{args.output}: {_describe(extractor.config)}")
    return 0


def convert(args: Namespace) -> int:
    """Makes a bundle from the authors' released checkpoints."""
    files = {"angle": args.angle, "norm": args.norm}
    checkpoints = {variant: path for variant, path in files.items() if path is not None}
    if bool(checkpoints) == bool(args.from_hub):
        raise InputError("give either --from-hub or the files, --angle and --norm")
    _check_free(args.output)
    if args.from_hub:
        checkpoints = fetch_released(args.backbone, args.from_hub)
    overrides = {"layers": args.levels, "backbone": args.upstream}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    extractor = convert_released(args.backbone, checkpoints, args.output, **overrides)
    print(f"{args.output}: {_describe(extractor.config)}, variants {', '.join(checkpoints)}")
    return 0


def push(args: Namespace) -> int:
    """Pushes a bundle to the Hub, or says what would be sent."""
    pusher = BundlePusher(args.bundle, args.repository, private=args.private or None, branch=args.branch)
    if not args.dry_run:
        print(pusher.push(args.message, create_pr=args.create_pr, tag=args.tag))
        return 0
    plan = pusher.plan()
    for name, size in plan.send.items():
        print(f"send    {size:>14,} bytes  {name}")
    for name in plan.delete:
        print(f"delete  {'':>14}        {name}")
    print(f"{len(plan.send)} files, {sum(plan.send.values()):,} bytes; {len(plan.keep)} are there already")
    return 0


def info(args: Namespace) -> int:
    """Says what a bundle or a reference bank is."""
    if str(args.path).endswith(".safetensors"):
        bank = ReferenceBank.load(args.path)
        print(json.dumps(_bank_facts(bank), indent=2) if args.json else bank)
        return 0
    config, names = describe_bundle(args.path)
    facts = config.to_dict() | {
        "fingerprint": config.fingerprint,
        "variants": bundle.variants_among(names, config),
        "backbone_included": any(name.startswith(f"{bundle.BACKBONE_FOLDER}/") for name in names),
        "references": [Path(name).stem for name in names if re.fullmatch(r"references/[^/]+\.safetensors", name)],
    }
    print(json.dumps(facts, indent=2) if args.json else "\n".join(f"{k:22} {v}" for k, v in facts.items()))
    return 0


def _check_free(output: Path) -> None:
    if (output / bundle.CONFIG_FILE).exists():
        raise InputError(f"{output} holds a bundle already, whose projectors would be lost: give another --output")


def _bank_facts(bank: ReferenceBank) -> dict[str, Any]:
    patches, channels = bank.patches[0].shape
    return {
        "category": bank.category,
        "num_images": bank.num_images,
        "patches": patches,
        "levels": len(bank.patches),
        "channels": channels,
        "dtype": str(bank.patches[0].dtype).removeprefix("torch."),
        "fingerprint": bank.fingerprint,
    }


def _describe(config: ADPretrainConfig) -> str:
    return (
        f"{config.backbone}, levels {', '.join(map(str, config.layers))}, {config.hidden_size} channels, "
        f"{config.image_size} px, {config.num_reference_tokens} reference tokens"
    )
