"""The command line: ``adpretrain``, or ``python -m adpretrain_hf.cli``; one file for each verb."""

from adpretrain_hf.cli.main import build_parser, main
