"""Detectors on raw, residual and pretrained features of a bundle, over data sets: the paper's tables, and a report.

Every combination of category, detector, features, variant, shots, noise, fraction and seed is a cell. A cell's result
is a file, whole or not there: the same command again goes on with the cells that are missing, and another plan with
the same --output adds to it.

    python -m training.evaluate org/adpretrain-dinov2-large --data realiad=realiad/ --output runs/table

fits six detectors on three kinds of features each. What is compared can be narrowed and widened:

    python -m training.evaluate hub_cards/adpretrain-dinov2-small --data realiad=realiad/ mvtecad=mvtec/ \\
        --detectors patchcore featurenorm --features raw residual pretrained --shots 1 2 4 8 --seeds 0 1 2 \\
        --noise 0 0.1 --fraction 0.1 1.0 --output runs/shots
    python -m training.evaluate --config plan.yaml --export-card hub_cards/adpretrain-dinov2-small

where plan.yaml has the flags' names (see ``evaluation/example_plan.yaml``); flags win. A detector's own settings go by
name, ``--set patchcore.coreset_sampling_ratio=0.5``. A cell whose detector fails is noted in failed/, the others go on,
and the next run tries it again. The output folder gets plan.json, cells/, patches/, metrics.json, tables.md, tables.tex
and report.html. Where other programs compute on the same cores, set OMP_WAIT_POLICY=PASSIVE.
"""

import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from adpretrain_hf.errors import run_program
from adpretrain_hf.files import write_text
from training.evaluation.detectors import DETECTORS, check_settings
from training.evaluation.plan import Cell, Plan, parse_plan, plan_cells, write_plan
from training.evaluation.report import export_card, write_report
from training.evaluation.run import Evaluation
from training.evaluation.store import is_done, load_failures, load_results
from training.evaluation.tables import latex_tables, markdown_tables, summary
from training.run.folder import versions

_LOG = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the docstring of the module. Returns the exit code, see ``run_program``."""
    return run_program("evaluate", lambda: _evaluate(sys.argv[1:] if argv is None else argv))


def _evaluate(words: Sequence[str]) -> int:
    plan, card = parse_plan(words, (__doc__ or "").splitlines()[0])
    used = versions("anomalib", "scikit-learn")
    try:
        _run(plan, shlex.join(["python", "-m", "training.evaluate", *words]), used)
    finally:
        failures = _write_outputs(plan, used)  # of the cells that are finished
    if card:
        export_card(plan.output, card)
    if (tables := Path(plan.output, "tables.md")).is_file():
        print(tables.read_text(encoding="utf-8"))
    if failures:
        told = (f"  {cell.name}: {reason}" for cell, reason in islice(failures.items(), 10))
        print(f"evaluate: {len(failures)} cells failed, see {plan.output}/failed:", *told, sep="\n", file=sys.stderr)
    return 1 if failures else 0


def _run(plan: Plan, command: str, used: Mapping[str, str]) -> None:
    """Runs the cells that are not done."""
    groups = plan_cells(plan)
    for detector, settings in plan.set.items():
        check_settings(detector, settings)
    if unused := sorted({*plan.set, *plan.epochs} - {*plan.detectors}):
        _LOG.warning("settings of %s are not used: not among --detectors", ", ".join(unused))
    date = datetime.now(timezone.utc).isoformat(sep=" ", timespec="minutes")
    listed = ", ".join(f"{name} {number}" for name, number in used.items())
    evaluation = Evaluation(plan, command=command, date=date, versions=listed)
    variants = sorted({cell.variant for group in groups for cell in group if cell.variant})
    write_plan(plan, evaluation.identity(variants), [result.cell for result in load_results(plan.output)])
    pending = [group for group in groups if not all(is_done(plan.output, cell) for cell in group)]
    for cell in chain.from_iterable(pending):  # what is wrong with a plan is told before its first result
        evaluation.draw(cell)
    for cell in {cell.detector: cell for cell in chain.from_iterable(pending)}.values():
        if plan.set.get(cell.detector) and DETECTORS[cell.detector].model:
            evaluation.model(cell)
    total, left = (sum(map(len, some)) for some in (groups, pending))
    with tqdm(total=total, initial=total - left, unit="cell", desc="evaluate") as bar:
        for number, group in enumerate(pending, start=1):
            cell, *others = group
            where = f"{len(group)} categories" if others else cell.category
            bar.set_postfix_str(f"{where} {cell.detector} {cell.features} {cell.variant}".rstrip())
            evaluation.run(group)
            evaluation.forget(but=chain.from_iterable(pending[number:]))
            bar.update(len(group))


def _write_outputs(plan: Plan, used: Mapping[str, str]) -> Mapping[Cell, str]:
    """Writes tables and the report of the results in the folder of a run; returns the cells that failed, and why."""
    folder = Path(plan.output)
    results, failures = load_results(folder), load_failures(folder)
    if not results:
        return failures
    failed = {"failures": {cell.name: reason for cell, reason in failures.items()}} if failures else {}
    metrics = {"versions": used, "summary": summary(results)} | failed
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write_text(folder / "tables.md", markdown_tables(results, failures))
    write_text(folder / "tables.tex", latex_tables(results))
    write_report(folder)
    return failures


if __name__ == "__main__":
    sys.exit(main())
