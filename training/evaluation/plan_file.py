"""plan.json: what was asked for last, and what decides the results that are in the folder of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adpretrain_hf.errors import InputError
from adpretrain_hf.files import write_text
from training.evaluation.detectors import DETECTORS
from training.evaluation.plan import Plan

_FILE = "plan.json"


def write_plan(plan: Plan, deciding: Mapping[str, Any], made_by: Mapping[str, str]) -> None:
    """Writes a plan into the folder of its run.

    A folder may hold the results of several plans, as long as nothing differs that decides a result and is not in its
    cell.

    Args:
        plan: to write.
        deciding: what else decides the results, such as the bundle's weights, by name; as JSON holds it.
        made_by: what people want to know beside the results: command, date and versions.

    Raises:
        InputError: the folder holds results that something else has decided.
    """
    file = Path(plan.output) / _FILE
    decided = _read_decided(file) if file.is_file() else {}
    changed = [
        f"{key} {decided[key]} -> {value}" for key, value in deciding.items() if decided.get(key, value) != value
    ]
    if changed:
        raise InputError(
            f"{plan.output} holds results of something else ({'; '.join(changed)}): choose another --output"
        )
    values = {"plan": dataclasses.asdict(plan), "decided by": decided | dict(deciding), "made by": dict(made_by)}
    write_text(file, json.dumps(values, indent=2) + "\n")


def read_origin(folder: str | Path) -> dict[str, str]:
    """What a run's results come from, for people: bundle, command, date and versions; empty if it is not known."""
    file = Path(folder) / _FILE
    if not file.is_file():
        return {}
    values = json.loads(file.read_text(encoding="utf-8"))
    return {"bundle": str(values["plan"]["bundle"])} | values.get("made by", {})


def deciding_settings(plan: Plan, categories: Mapping[str, list[str]]) -> dict[str, Any]:
    """What decides results besides the bundle and what a cell says.

    Args:
        plan: the plan.
        categories: that are evaluated, of each data set.
    """
    settings: dict[str, Any] = {f"epochs of {name}": plan.epochs_of(name) for name in plan.detectors}
    settings |= {f"settings of {name}": dict(plan.set.get(name, {})) for name in plan.detectors}
    settings |= {f"folder of {name}": str(Path(root).resolve()) for name, root in plan.data.items()}
    for name in plan.detectors:
        if DETECTORS[name].serves_all:
            settings |= {
                f"categories of {data_set} that {name} serves": names for data_set, names in categories.items()
            }
    settings["reference list"] = _digest(plan.references) if plan.references else "drawn"
    return settings | {"batch_size": plan.batch_size}


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _read_decided(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["decided by"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is damaged ({error!r}): choose another --output, or remove the folder") from error
