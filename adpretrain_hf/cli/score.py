"""``adpretrain score``: anomaly scores, decisions, maps and overlays of many images."""

import argparse

from adpretrain_hf.cli.arguments import add_judgement, add_run, positive, refuse_given

HELP = "write anomaly scores, decisions, maps and overlays"
EXAMPLES = """\
  adpretrain score hub_cards/adpretrain-dinov2-small images/ --reference normal_images/ --output results/
  adpretrain score org/adpretrain-dinov2-large images/ --reference screw.safetensors --output results/ --dtype bfloat16
  adpretrain score my-bundle images/ --reference screw.safetensors --output out/ --false-alarms 0.01 --fail-on-anomaly
  adpretrain score org/adpretrain-dinov2-large images/ --reference screw.safetensors --output results/ --ray
  adpretrain score my-bundle images/ --references banks/ --output results/
"""
_DECISIONS = ("fail_on_anomaly", "false_alarms")
_REGIONS = ("min_area", "max_regions")
_PICTURES = ("regions", "colours", "no_overlays")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only this verb takes, and what it shares."""
    add_run(parser)
    add_judgement(parser)
    parser.add_argument("--fail-on-anomaly", action="store_true", help="exit with 3 if an image is anomalous")
    parser.add_argument(
        "--colours",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="map values of the darkest and the brightest colour; by default the calibration says them",
    )
    parser.add_argument(
        "--regions",
        action="store_true",
        help="also write where the images are anomalous, to regions.csv, and outline it",
    )
    parser.add_argument("--min-area", type=positive, metavar="N", help="leave smaller regions out, in pixels")
    parser.add_argument("--max-regions", type=positive, metavar="K", help="of an image; those of the highest peaks")
    parser.add_argument("--no-overlays", action="store_true", help="leave the overlay pictures out")


def run(args: argparse.Namespace) -> int:
    """Scores every image; writes scores.csv, scores.json, the maps and an overlay of each."""
    from adpretrain_hf.cli.folder_run import FolderRun, finish, prepare, run_on_ray
    from adpretrain_hf.cli.results import decisions_of, save_score, write_overlays, write_scores

    if args.ray or args.ray_address:
        refuse_given(args, _DECISIONS, "Ray's Parquet files have no decisions: read their p_value")
        refuse_given(args, (*_REGIONS, *_PICTURES), "Ray writes Parquet files, and neither maps nor overlays")
        return run_on_ray(args, features=False)
    if not args.regions:
        refuse_given(args, _REGIONS, "expected --regions with it")
    images, extractor, settings = prepare(args)
    decisions = decisions_of(extractor, args)
    run = FolderRun(images, args.output, settings, {"maps": ".npz", "overlays": ".png"})
    run.write(
        lambda images, **options: ((one.image.name, one) for one in extractor.score_stream(images, **options)),
        save_score,
        args.batch_size,
    )
    anomalous = write_scores(run, decisions)
    if not args.no_overlays:
        write_overlays(run, decisions)
    code = finish(args.output, len(images.names), run.errors)
    return 3 if args.fail_on_anomaly and anomalous else code
