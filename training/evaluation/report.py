"""What people read of a run beside its tables: report.html, one file, and the ``model-index`` of a model card."""

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from adpretrain_hf.errors import BundleError, InputError
from adpretrain_hf.files import write_text
from training.evaluation import store, tables
from training.evaluation.figures import scatter_figure, scores_figure, strips
from training.evaluation.plan import FEATURES, Cell
from training.evaluation.store import METRICS, PatchSample, Result


def write_report(folder: str | Path) -> Path:
    """Writes ``report.html`` into the folder of a run, from its finished cells; returns its path.

    Raises:
        InputError: no cell is finished.
        BundleError: a file of the run is damaged.
    """
    results, samples = store.load_results(folder), sorted(store.load_patches(folder), key=_place)
    # Also what comes from names of files is escaped.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    asked = (tables.proper_name, tables.features_name, tables.settings_text, tables.misses, store.load_shown)
    drawn = (by_settings, plainest, strips, scores_figure, scatter_figure)
    text = environment.get_template("report_template.html").render(
        folder=folder,
        results=results,
        samples=samples,
        sections=tables.data_set_tables(results),
        origins=list({tuple(one.made_by.items()): one.made_by for one in results if one.made_by}.values()),
        failures=store.load_failures(folder),
        **{one.__name__: one for one in (*asked, *drawn)},
    )
    path = Path(folder, "report.html")
    write_text(path, text)
    return path


def by_settings(results: Iterable[Result]) -> list[tuple[str, str, list[Result]]]:
    """Results by detector and settings, with both, the settings in words."""
    settings = attrgetter("cell.detector", *(f"cell.{name}" for name in tables.SETTINGS))
    groups = groupby(sorted(results, key=settings), settings)
    return [(detector, tables.settings_text(*own), list(some)) for (detector, *own), some in groups]


def plainest(results: Iterable[Result]) -> list[Result]:
    """Of every detector and kind of features the result of the plainest settings: most references, least noise."""
    plain = sorted(results, key=lambda one: (one.cell.shots, -one.cell.noise, one.cell.fraction, -one.cell.seed))
    chosen = {(one.cell.detector, *_place(one.cell)): one for one in plain}  # the last one of each
    return [chosen[key] for key in sorted(chosen)]


def _place(one: Cell | PatchSample) -> tuple[int, str]:
    return FEATURES.index(one.features), one.variant  # the paper's order


# What tells these entries from others in a card, to replace them.
_MEASURED = "measured by training.evaluate"
_TYPES = {"auroc": "roc_auc", "ap": "average_precision", "f1": "f1", "aupro": "aupro"}
_DATA_SET_IDS = {"mvtecad": "mvtec-ad", "mvtec3d": "mvtec-3d-ad", "realiad": "Real-IAD/Real-IAD"}


def export_card(folder: str | Path, bundle_folder: str | Path) -> None:
    """Writes the means over the classes, with pretrained features, into the front matter of a bundle's README.md.

    Raw and residual features are left out: a model's index would pass their numbers off as the model's. What an
    earlier export wrote on the same data sets is replaced; all else in the card is kept.

    Raises:
        InputError: no finished cell has pretrained features.
        BundleError: the bundle has no card, or its front matter cannot be read.
    """
    means = [row for row in tables.summary(store.load_results(folder)) if row["category"] is None]
    rows = [row for row in means if row["features"] == "pretrained"]
    if not rows:
        raise InputError(f"{folder} has no finished cells with pretrained features: run some, then export again")
    path = Path(bundle_folder, "README.md")
    card = _read_card(path)
    new = [entry for row in rows for entry in _entries(row)]
    replaced = {entry.dataset_type for entry in new}
    old = card.data.get("eval_results", [])
    kept = [one for one in old if one.dataset_type not in replaced or _MEASURED not in (one.metric_name or "")]
    heading = re.search(r"^# (.+?)\s*$", card.text, re.MULTILINE)
    card.data["model_name"] = card.data.get("model_name") or (heading[1] if heading else path.resolve().parent.name)
    card.data["eval_results"] = [*kept, *new]
    write_text(path, str(card))


def _read_card(path: Path) -> ModelCard:
    if not path.is_file():
        raise BundleError(f"{path.parent} has no README.md: expected the folder of a bundle, with its model card")
    try:
        # Not ModelCard.load(), which reads other line ends as \n.
        return ModelCard(path.read_bytes().decode())
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # YAML's own go over lines
        raise BundleError(f"the front matter of {path} cannot be read: {reason}. Mend it, then export again") from error


def _entries(row: Mapping[str, Any]) -> list[EvalResult]:
    data_set, seeds = row["data_set"], row["seeds"]
    over = f"mean of {row['categories']} class{'es' * (row['categories'] != 1)}"
    over += f" and {seeds} seeds" if seeds > 1 else ""
    what = f"{tables.proper_name(row['detector'])}, {tables.features_name(row['features'], row['variant'])} features"
    settings = tables.settings_text(*(row[name] for name in tables.SETTINGS))
    return [
        EvalResult(
            task_type="image-feature-extraction",  # the Hub has no task of this name
            task_name="Image anomaly detection",
            dataset_type=_DATA_SET_IDS.get(data_set, data_set),
            dataset_name=tables.proper_name(data_set),
            # Entries of one task, data set, configuration and split are joined: not with those of others.
            dataset_config="mean of classes",
            dataset_split="test",
            metric_type=_TYPES[metric.rpartition("_")[2]],
            metric_name=f"{tables.METRIC_NAMES[metric]}, {what}, {settings}, {over} ({_MEASURED})",
            metric_value=round(row[metric], 5),
            verified=False,
        )
        for metric in METRICS
        if row[metric] is not None
    ]
