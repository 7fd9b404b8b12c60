"""The table of verbs, and the program that runs one of them.

A verb's file says its help and its arguments, and imports what it needs only when it runs, so that help comes at once.
"""

import argparse
import contextlib
import difflib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from adpretrain_hf import __version__
from adpretrain_hf.cli import convert, demo, export, extract, info, new, push, reference, score, watch
from adpretrain_hf.errors import check_environment, run_program

MODULES = (score, watch, extract, reference, export, info, demo, new, convert, push)
VERBS = {module.__name__.rpartition(".")[2]: module for module in MODULES}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code.

    0: done. 1: something the user can mend, said in one line, or with ``--debug`` a traceback. 2: wrong usage. 130 or
    143: stopped by Ctrl-C or by SIGTERM.
    """
    args = build_parser().parse_args(argv)

    def run() -> int:
        check_environment()
        return args.run(args)

    with _terminated_like_interrupted() as terminated:
        code = run_program("adpretrain", run, debug=args.debug)
        return 128 + signal.SIGTERM if terminated else code


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[list[int]]:
    """SIGTERM ends what runs inside as Ctrl-C does, without half files; a list has it then."""
    terminated: list[int] = []

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait
        terminated.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone hears of signals
        yield terminated
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(prog="adpretrain", description="Pretrained features for industrial anomaly detection.")
    parser.add_argument("--version", action="version", version=f"adpretrain-hf {__version__}")
    verbs = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, verb in VERBS.items():
        one = verbs.add_parser(
            name,
            help=verb.HELP,
            description=f"{verb.HELP[0].upper()}{verb.HELP[1:]}.",
            epilog=f"examples:\n{verb.EXAMPLES.rstrip()}",
            formatter_class=_Formatter,
        )
        one.set_defaults(run=verb.run)
        one.add_argument("--debug", action="store_true", help="show tracebacks")
        verb.add_arguments(one)
    return parser


class _Parser(argparse.ArgumentParser):
    """Names a misspelt option before it misses the one that was meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See argparse."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """See argparse."""
        known = self._option_string_actions
        words = (word.partition("=")[0] for word in self._words if word.startswith("--"))
        for word in words:
            is_missed = "required: -" in message or message.endswith(" is required")
            if is_missed and not any(option.startswith(word) for option in known):
                close = difflib.get_close_matches(word, known, 1)
                message = f"unrecognized argument {word}" + (f": did you mean {close[0]}?" if close else "")
                break
        super().error(message)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Tells defaults that say something, and leaves the lines of examples as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False
        return action.help if says_nothing else super()._get_help_string(action)
