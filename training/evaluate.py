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

where plan.yaml has the arguments' names (see ``evaluation/example_plan.yaml``); arguments go before it. A detector's
own settings are given by name, ``--set patchcore.coreset_sampling_ratio=0.5``. A cell whose detector fails is noted in
failed/, the others go on, and the next run tries it again. The output folder gets plan.json, cells/, patches/,
metrics.json, tables.md, tables.tex and report.html. Where other programs compute on the same cores, set
OMP_WAIT_POLICY=PASSIVE.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adpretrain_hf.errors import run_program
from adpretrain_hf.files import write_text
from training.evaluation.arguments import parse_values
from training.evaluation.cells import Cell
from training.evaluation.detectors import check_settings
from training.evaluation.model_index import export_card
from training.evaluation.plan import Plan, read_plan_file
from training.evaluation.plan_cells import chosen_categories, plan_cells
from training.evaluation.plan_file import deciding_settings, write_plan
from training.evaluation.report import write_report
from training.evaluation.results import is_done, load_failures, load_results
from training.evaluation.run import run_cells
from training.evaluation.shared import Shared
from training.evaluation.tables import latex_tables, markdown_tables, summary
from training.run.folder import versions

_INTERRUPTED = 130  # what shells give a program that Ctrl-C ends


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the docstring of the module. Returns the exit code, see ``run_program``."""
    values = parse_values(argv, (__doc__ or "").splitlines()[0])
    command = shlex.join(["python", "-m", "training.evaluate", *(sys.argv[1:] if argv is None else argv)])
    return run_program("evaluate", lambda: _evaluate(values, command))


def _evaluate(values: dict[str, Any], command: str) -> int:
    config, card = values.pop("config", None), values.pop("export_card", None)
    plan = Plan.from_values((read_plan_file(config) if config else {}) | values)
    finished = _run(plan, command)
    failures = load_failures(plan.output)
    _write_outputs(plan, failures)
    if not finished:
        print(f"evaluate: interrupted; finished cells are in {plan.output}: the same command goes on", file=sys.stderr)
        return _INTERRUPTED
    if card:
        export_card(plan.output, card)
    if (tables := Path(plan.output, "tables.md")).is_file():
        print(tables.read_text(encoding="utf-8"))
    if failures:
        print(f"evaluate: {len(failures)} cells failed: see {plan.output}/failed", file=sys.stderr)
    return 1 if failures else 0


def _run(plan: Plan, command: str) -> bool:
    """Runs the cells that are not done; returns whether all are."""
    groups = plan_cells(plan)
    for detector, settings in plan.set.items():
        check_settings(detector, settings)
    shared = Shared(plan)
    variants = sorted({cell.variant for group in groups for cell in group if cell.variant})
    deciding = shared.identity(variants) | deciding_settings(plan, chosen_categories(plan))
    date = datetime.now(timezone.utc).isoformat(sep=" ", timespec="minutes")
    used = ", ".join(f"{name} {number}" for name, number in _versions().items())
    write_plan(plan, deciding, {"command": command, "date": date, "versions": used})
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


def _write_outputs(plan: Plan, failures: Mapping[Cell, str]) -> None:
    folder = Path(plan.output)
    results = load_results(folder)
    if not results:
        return
    metrics: dict[str, Any] = {"versions": _versions(), "summary": summary(results)}
    if failures:
        metrics["failures"] = {cell.name: reason for cell, reason in failures.items()}
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write_text(folder / "tables.md", markdown_tables(results, failures))
    write_text(folder / "tables.tex", latex_tables(results))
    write_report(folder)


def _versions() -> dict[str, str]:
    return versions() | {name: version(name) for name in ("anomalib", "scikit-learn")}


if __name__ == "__main__":
    sys.exit(main())
