"""The rows of the table of benchmarks, and the program that each benchmark is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

HEADER = ("what", "ours", "compared with", "ratio", "goal", "reached")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        what: was measured.
        ours, other: both sides, in words.
        ratio: of the two.
        goal: e.g. "at most 1.25"; empty where the row is there for comparison only.
        reached: whether the ratio is at its goal; None without one.
    """

    what: str
    ours: str
    other: str
    ratio: float
    goal: str = ""
    reached: bool | None = None

    def cells(self) -> tuple[str, ...]:
        """The cells of the table."""
        reached = {True: "yes", False: "**no**", None: ""}[self.reached]
        return self.what, self.ours, self.other, f"{self.ratio:.3g}", self.goal, reached


def at_least(goal: float, what: str, ours: str, other: str, ratio: float) -> Row:
    """A row whose ratio should be ``goal`` or more."""
    return Row(what, ours, other, ratio, f"at least {goal:g}", ratio >= goal)


def at_most(goal: float, what: str, ours: str, other: str, ratio: float) -> Row:
    """A row whose ratio should be ``goal`` or less."""
    return Row(what, ours, other, ratio, f"at most {goal:g}", ratio <= goal)


def table(rows: Sequence[tuple[str, ...]], header: Sequence[str]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(measure: Callable[[str], list[Row]], description: str | None) -> None:
    """Measures and prints, as a table or, for the program that runs all, as JSON."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is one")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    arguments = parser.parse_args()
    rows = measure(arguments.device)
    print(json.dumps([asdict(row) for row in rows]) if arguments.json else table([r.cells() for r in rows], HEADER))
