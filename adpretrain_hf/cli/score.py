"""``adpretrain score``: anomaly scores, maps and overlays of many images."""

import argparse

from adpretrain_hf.cli.arguments import add_run

HELP = "write anomaly scores, maps and overlays"
EXAMPLES = """\
  adpretrain score hub_cards/adpretrain-dinov2-small images/ --reference normal_images/ --output results/
  adpretrain score org/adpretrain-dinov2-large images/ --reference screw.safetensors --output results/ --dtype bfloat16
  adpretrain score org/adpretrain-dinov2-large images/ --reference screw.safetensors --output results/ --ray
  adpretrain score my-bundle images/ --references banks/ --output results/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only this verb takes, and what it shares."""
    add_run(parser)
    parser.add_argument("--no-overlays", action="store_true", help="leave the overlay pictures out")


def run(args: argparse.Namespace) -> int:
    """Scores every image; writes scores.csv, scores.json, the maps and an overlay of each."""
    from adpretrain_hf.cli.folder_run import FolderRun, finish, prepare, run_on_ray
    from adpretrain_hf.cli.results import save_score, write_overlays, write_scores

    if args.ray or args.ray_address:
        return run_on_ray(args, features=False)
    images, extractor, settings = prepare(args)
    run = FolderRun(images, args.output, settings, {"maps": ".npz", "overlays": ".png"})
    run.write(
        lambda images, **options: ((one.image.name, one) for one in extractor.score_stream(images, **options)),
        save_score,
        args.batch_size,
    )
    write_scores(run)
    if not args.no_overlays:
        write_overlays(run)
    return finish(args.output, len(images.names), run.errors)
