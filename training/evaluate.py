"""Detectors on raw, residual and pretrained features of a bundle, over data sets: the paper's tables, and a report.

Every combination of category, detector, features, variant, shots, noise, fraction and seed is a cell. A cell's result
is a file, whole or not there: the same command again goes on with the cells that are missing, and another plan with
the same --output adds to it.

    python -m training.evaluate hub_cards/adpretrain-dinov2-small --data realiad=realiad/ --categories toy zipper \\
        --output runs/table

fits six detectors on three kinds of features each. What is compared can be narrowed and widened:

    python -m training.evaluate hub_cards/adpretrain-dinov2-small --data realiad=realiad/ mvtecad=mvtec/ \\
        --detectors patchcore featurenorm --features raw residual pretrained --shots 1 2 4 8 --seeds 0 1 2 \\
        --noise 0 0.1 --fraction 0.1 1.0 --output runs/shots
    python -m training.evaluate --config plan.yaml --export-card hub_cards/adpretrain-dinov2-small

where plan.yaml has the arguments' names (``data`` and ``epochs`` as mappings); arguments go before it. The output
folder gets plan.json, cells/, patches/, metrics.json, tables.md, tables.tex and report.html. Where other programs
compute on the same cores, set OMP_WAIT_POLICY=PASSIVE.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adpretrain_hf.errors import run_program
from adpretrain_hf.files import write_text
from training.evaluation.arguments import parse_values
from training.evaluation.cells import Cell
from training.evaluation.model_index import export_card
from training.evaluation.plan import Plan, read_plan_file
from training.evaluation.plan_cells import chosen_categories, plan_cells
from training.evaluation.plan_file import deciding_settings, write_plan
from training.evaluation.report import write_report
from training.evaluation.results import is_done, load_results
from training.evaluation.run import run_cells
from training.evaluation.shared import Shared
from training.evaluation.tables import latex_tables, markdown_tables, summary
from training.run.folder import versions

_INTERRUPTED = 130  # what shells give a program that Ctrl-C ends


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the docstring of the module. Returns the exit code, see ``run_program``."""
    values = parse_values(argv, (__doc__ or "").splitlines()[0])
    return run_program("evaluate", lambda: _evaluate(values))


def _evaluate(values: dict[str, Any]) -> int:
    config, card = values.pop("config", None), values.pop("export_card", None)
    plan = Plan.from_values((read_plan_file(config) if config else {}) | values)
    finished = _run(plan)
    _write_outputs(Path(plan.output))
    if not finished:
        print(f"evaluate: interrupted; finished cells are in {plan.output}: the same command goes on", file=sys.stderr)
        return _INTERRUPTED
    if card:
        export_card(plan.output, card)
    print(Path(plan.output, "tables.md").read_text(encoding="utf-8"))
    return 0


def _run(plan: Plan) -> bool:
    """Runs the cells that are not done; returns whether all are."""
    groups = plan_cells(plan)
    shared = Shared(plan)
    variants = sorted({cell.variant for group in groups for cell in group if cell.variant})
    write_plan(plan, shared.identity(variants) | deciding_settings(plan, chosen_categories(plan)))
    pending = [group for group in groups if not all(is_done(plan.output, cell) for cell in group)]
    total, left = (sum(map(len, some)) for some in (groups, pending))
    with tqdm(total=total, initial=total - left, unit="cell", desc="evaluate") as bar:
        try:
            for group in pending:
                bar.set_postfix_str(_title(group))
                run_cells(shared, group)
                bar.update(len(group))
        except KeyboardInterrupt:
            return False
    return True


def _title(group: Sequence[Cell]) -> str:
    first = group[0]
    where = first.category if len(group) == 1 else f"{len(group)} categories"
    return " ".join(filter(None, (where, first.detector, first.features, first.variant)))


def _write_outputs(folder: Path) -> None:
    results = load_results(folder)
    if not results:
        return
    used = versions() | {name: version(name) for name in ("anomalib", "scikit-learn")}
    metrics = {"versions": used, "summary": summary(results)}
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write_text(folder / "tables.md", markdown_tables(results))
    write_text(folder / "tables.tex", latex_tables(results))
    write_report(folder)


if __name__ == "__main__":
    sys.exit(main())
