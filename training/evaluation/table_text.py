"""A table of texts, and how it is written in Markdown and in LaTeX."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        **{special: f"\\{special}" for special in "&%$#_{}"},
    }
)


@dataclass(frozen=True)
class Table:
    """A table as it is printed.

    Attributes:
        title: above it.
        header: of the columns.
        rows: of texts, as many as in the header each.
        labels: how many columns at the left say what the numbers are of.
        best: (row, column) of what is printed bold.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int
    best: frozenset[tuple[int, int]] = frozenset()

    def markdown(self) -> str:
        """The table, without its title."""
        marks = ["---"] * self.labels + ["--:"] * (len(self.header) - self.labels)
        lines = [[markdown_text(text) for text in self.header], marks]
        for place, row in enumerate(self.rows):
            texts = [markdown_text(text) for text in row]
            lines.append([f"**{text}**" if (place, n) in self.best else text for n, text in enumerate(texts)])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def latex(self, caption: str) -> str:
        """The table as a ``longtable``, which may go over pages, with booktabs' rules."""
        columns = "l" * self.labels + "r" * (len(self.header) - self.labels)
        lines = [
            *(r"\begingroup", r"\footnotesize", r"\setlength{\tabcolsep}{3pt}"),
            f"\\begin{{longtable}}{{{columns}}}",
            f"\\caption{{{latex_text(caption)}}} \\\\",
            *(r"\toprule", _latex_row([latex_text(text) for text in self.header]), r"\midrule", r"\endhead"),
            *(r"\bottomrule", r"\endfoot"),
        ]
        for place, row in enumerate(self.rows):
            texts = [latex_text(text) if n < self.labels else _latex_number(text) for n, text in enumerate(row)]
            lines.append(
                _latex_row([f"\\textbf{{{t}}}" if (place, n) in self.best else t for n, t in enumerate(texts)])
            )
        return "\n".join([*lines, r"\end{longtable}", r"\endgroup", ""])


def markdown_text(text: str) -> str:
    """A text in Markdown that shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#&~])", r"\\\1", " ".join(text.split()))


def latex_text(text: str) -> str:
    """A text in LaTeX that shows as it is, on one line."""
    return " ".join(text.split()).translate(_LATEX)


def _latex_row(texts: list[str]) -> str:
    return f"{' & '.join(texts)} \\\\"


def _latex_number(text: str) -> str:
    """Numbers with a sign are set as formulas, for the minus and the plus-minus."""
    formula = text.replace("±", r"\pm")
    return f"${formula}$" if text[0] in "+-" and len(text) > 1 else text
