"""Plans: what they hold, the cells they come to, what tells cells apart, and what may share a folder."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adpretrain_hf.errors import InputError
from tests.training.evaluation import conftest
from training.evaluation.detectors import DETECTORS
from training.evaluation.plan import Cell, Plan, chosen_categories, parse_plan, plan_cells, write_plan


@pytest.fixture
def values(small_tree: Path, tmp_path: Path) -> dict[str, Any]:
    """What every plan needs: a bundle's name, the miniature tree, and a folder."""
    return {"bundle": "a/bundle", "data": {"mvtecad": str(small_tree)}, "output": str(tmp_path / "run")}


def plan_of(values: dict[str, Any], **others: Any) -> Plan:
    return conftest.plan_of(values | others)


# Values


def test_the_default_is_the_papers_table(values: dict[str, Any]) -> None:
    plan = plan_of(values)
    assert set(plan.detectors) == {"patchcore", "padim", "cflow", "glass", "uniad", "featurenorm"}
    assert plan.features == ("raw", "residual", "pretrained")
    assert (plan.shots, plan.seeds, plan.noise, plan.fraction) == ((8,), (0,), (0.0,), (1.0,))


def test_a_single_value_stands_for_a_list_and_whole_numbers_for_shares(values: dict[str, Any]) -> None:
    plan = plan_of(values, shots=4, noise=[0, 0.1, 0], detectors="padim", epochs={"glass": 7})
    assert (plan.shots, plan.noise, plan.detectors) == ((4,), (0.0, 0.1), ("padim",))
    assert (plan.epochs_of("glass"), plan.epochs_of("cflow")) == (7, DETECTORS["cflow"].epochs)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": {"imagenet": "."}}, "unknown data sets imagenet: expected some of mvtecad"),
        ({"detectors": ["patchcore", "patchcord"]}, "unknown detectors patchcord: expected some of featurenorm"),
        ({"epochs": {"glas": 3}}, "unknown detectors glas"),
        ({"set": {"glas": {"lr": 0.1}}}, "unknown detectors glas"),
        ({"epochs": {"glass": 0}}, "epochs of glass: expected epochs and batch_size >= 1"),
        ({"features": ["cooked"]}, "unknown features cooked: expected some of raw, residual, pretrained"),
        ({"shots": []}, "no shots given"),
        ({"data": {}, "noise": []}, "no data, noise given: expected at least one of each"),
        ({"seeds": [-1]}, "seeds: expected"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"workers": -1}, "workers: expected .* workers and seeds >= 0"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(values, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shot": 8}, r"run.yaml names \['shot'\], which are no settings: expected some of \['batch_size'"),
        ({"bundle": None}, "no bundle given: expected"),
        ({"data": None}, "no data given: expected"),
        ({"protocol": "quick"}, "protocol is 'quick', expected full or few-shot"),
    ],
)
def test_names_and_values_that_no_plan_has(values: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(values, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": "mvtec/"}, "'data'.*Mapping.*mvtec/"),
        ({"epochs": {"glass": 1.5}}, "'epochs'.*int.*1.5"),
        ({"shots": [1, True]}, "'shots'.*int.*True"),
        ({"shots": 1.5}, "'shots'.*int.*1.5"),
        ({"noise": ["a"]}, "'noise'.*float.*a"),
        ({"set": {"padim": 3}}, "'set'.*Mapping.*3"),
    ],
)
def test_values_of_another_kind_are_named(
    values: dict[str, Any], changed: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        plan_of(values, **changed)
    assert re.search(message, printed_error(capsys))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"noise": [0.3]}, "noise is 0.3, expected a share of anomalous images from 0 to 0.2"),
        ({"fraction": [0]}, r"fraction is 0.0, expected a share of the training images in \(0, 1\]"),
        ({"shots": [0]}, "shots is 0, expected"),
        ({"categories": ["bolt", "screw"]}, "unknown categories screw: expected some of mvtecad: bolt, nut"),
    ],
)
def test_values_that_no_cell_can_have_are_named(values: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_cells(plan_of(values, **changed))


def test_a_file_and_the_command_line_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        "bundle: a/bundle\noutput: run\ndata: {mvtecad: tree}\nshots: [1, 2]\nnoise: 0.1\nepochs: {glass: 3}\n"
        "set: {padim: {n_features: 50, layer: last}}\nbatch_size: 4\ncategories: ['01', 'ä😀']\nreferences:\n"
    )
    text = (
        "a/bundle --output run --data mvtecad=tree --shots 1 2 --noise 0.1 --epochs glass=3 --batch-size 4 "
        "--categories 01,ä😀 --set padim.n_features=50 padim.layer=last"
    )
    words = text.split()
    expected = Plan(
        **{"bundle": "a/bundle", "output": "run", "data": {"mvtecad": "tree"}, "shots": (1, 2), "noise": (0.1,)},
        **{"epochs": {"glass": 3}, "set": {"padim": {"n_features": 50, "layer": "last"}}, "batch_size": 4},
        **{"categories": ("01", "ä😀")},
    )
    assert parse_plan(["--config", str(file)]) == (expected, None)
    assert parse_plan(words) == (expected, None)
    assert parse_plan([*words[1:], "--export-card", "card", "a/bundle"]) == (expected, "card")


def test_flags_go_before_the_file_on_either_side_of_it(values: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(values, shots=[1, 2], data={"mvtecad": "tree", "mpdd": "mpdd"}, batch_size=3)
    config = ["--config", str(tmp_path / "run.yaml")]
    flags = ["--shots", "4", "--data", "visa=a=b", "--output=other"]
    changed = replace(plan, bundle="b", shots=(4,), data={"visa": "a=b"}, output="other")
    assert parse_plan(["b", *config, *flags])[0] == parse_plan(["b", *flags, *config])[0] == changed
    assert parse_plan(["--bundle", "b", *config, *flags])[0] == changed
    assert parse_plan(["--bundle=--b", *config])[0].bundle == "--b"


def test_a_printed_plan_is_a_file_of_it(values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(values, shots=[1, 2], set={"padim": {"n_features": 50}}, categories=["01"])
    file = Path(f"{values['output']}.yaml")
    with pytest.raises(SystemExit, match="0"):
        parse_plan(["--config", str(file), "--print_config"])
    file.write_text(capsys.readouterr().out)
    assert parse_plan(["--config", str(file)])[0] == plan


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    with pytest.raises(InputError, match=r"plan.yaml cannot be read as YAML: .*No such file"):
        parse_plan(["--config", str(file)])
    file.write_text("- shots\n")
    with pytest.raises(InputError, match=r"plan.yaml holds .'shots'., expected settings"):
        parse_plan(["--config", str(file)])
    file.write_text("shots: [1, 2\n")
    with pytest.raises(InputError, match=r"plan.yaml cannot be read as YAML"):
        parse_plan(["--config", str(file)])
    file.write_bytes(b"shots: \xff\n")
    with pytest.raises(InputError, match=r"plan.yaml cannot be read as YAML"):
        parse_plan(["--config", str(file)])


@pytest.mark.parametrize("word", ["mvtecad", "=tree", "mvtecad="])
def test_words_that_are_no_mapping_are_named(word: str) -> None:
    with pytest.raises(InputError, match=f"--data: got '{word}', expected name=value"):
        parse_plan(["--bundle=b", "--output=run", "--data", word])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--set padim=3", "'set'.*Mapping.*3"),
        ("--epochs glass=many", "'epochs'.*int.*many"),
        ("--shots 1 two", "'shots'.*int.*two"),
        ("--shot 1", "nrecognized arguments: --shot"),
        ("--bundle b c d", "nrecognized arguments: d"),
        ("--config", "argument --config: expected one argument"),
    ],
)
def test_words_of_another_kind_are_named(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_plan(["--bundle=b", "--output=run", "--data=mvtecad=tree", *words.split()])
    assert re.search(message, printed_error(capsys))


def printed_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The message on one line; which quotes stand in it differs between jsonargparse's releases."""
    return " ".join(capsys.readouterr().err.partition("error:")[2].split()).replace('"', "'")


def test_help_tells_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_plan(["--help"], "A program.")
    text = " ".join(capsys.readouterr().out.split())
    assert "A program. Data sets: mvtecad, visa," in text
    for one in fields(Plan):
        assert f"--{one.name.replace('_', '-')} " in text
    assert re.search(r"numbers of reference images \(type: tuple\[int, .*default: \(8,\)\)", text)


# Cells


def test_variants_are_those_of_the_paper_or_all_that_are_named(values: dict[str, Any]) -> None:
    published = {
        cell.detector: cell.variant for group in plan_cells(plan_of(values, features="pretrained")) for cell in group
    }
    assert published == {
        "patchcore": "angle",
        "padim": "angle",
        "cflow": "norm",
        "glass": "norm",
        "uniad": "norm",
        "featurenorm": "norm",
    }
    both = plan_cells(plan_of(values, detectors="padim", categories="nut", variants=["angle", "published", "norm"]))
    assert [(one[0].features, one[0].variant) for one in both] == [
        ("raw", ""),
        ("residual", ""),
        ("pretrained", "angle"),
        ("pretrained", "norm"),
    ]


def test_categories_follow_each_other_and_one_model_serves_all_at_the_end(values: dict[str, Any]) -> None:
    groups = plan_cells(plan_of(values, seeds=[0, 1], features="raw", detectors=["glass", "uniad", "patchcore"]))
    assert [[cell.category for cell in group] for group in groups] == [["bolt"]] * 4 + [["nut"]] * 4 + [
        ["bolt", "nut"]
    ] * 2
    assert [group[0].detector for group in groups] == ["patchcore"] * 2 + ["glass"] * 2 + ["patchcore"] * 2 + [
        "glass"
    ] * 2 + ["uniad"] * 2


def test_everything_is_combined_with_everything(values: dict[str, Any]) -> None:
    plan = plan_of(
        values, detectors=["patchcore", "uniad"], shots=[1, 2], seeds=[0, 1], noise=[0, 0.1], fraction=[0.5, 1.0]
    )
    cells = [cell for group in plan_cells(plan) for cell in group]
    assert len(cells) == len(set(cells)) == 2 * 2 * 3 * 16
    assert Cell("mvtecad", "nut", "uniad", "pretrained", "norm", 2, 0.1, 0.5, 1) in cells


def test_categories_may_be_named_with_their_data_set(values: dict[str, Any]) -> None:
    both = values["data"] | {"mpdd": values["data"]["mvtecad"]}
    plan = plan_of(values, data=both, categories=["bolt", "mpdd/nut"])
    assert chosen_categories(plan) == {"mvtecad": ["bolt"], "mpdd": ["bolt", "nut"]}


# plan.json


def keep(plan: Plan, **bundle: str) -> None:
    write_plan(plan, bundle, [cell for group in plan_cells(plan) for cell in group])


def test_plans_that_differ_in_cells_share_a_folder(values: dict[str, Any]) -> None:
    keep(plan_of(values, detectors="patchcore", categories="nut"), bundle="1", **{"weights of angle": "2"})
    keep(plan_of(values, detectors="glass", shots=[1]), bundle="1", **{"weights of norm": "3"})
    kept = json.loads(Path(values["output"], "plan.json").read_text())
    assert kept["plan"]["detectors"] == ["glass"]
    assert kept["decided by"]["weights of angle"] == "2"
    assert kept["decided by"]["weights of norm"] == "3"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": {"glass": 9}}, r"epochs of glass \d+ -> 9"),
        ({"batch_size": 5}, "batch_size 8 -> 5"),
        ({"categories": "nut"}, "uniad serves .*bolt"),
    ],
)
def test_plans_that_decide_otherwise_do_not(values: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    keep(plan_of(values), bundle="1")
    with pytest.raises(InputError, match=f"{message}.*choose another --output"):
        keep(plan_of(values, **changed), bundle="1")
    with pytest.raises(InputError, match="bundle 1 -> 2"):
        keep(plan_of(values), bundle="2")
    keep(plan_of(values), bundle="1")


def test_what_has_no_result_yet_may_be_decided_otherwise(values: dict[str, Any]) -> None:
    first = plan_of(values, detectors=["patchcore", "glass", "uniad"], set={"patchcore": {"width": 3}})
    patchcore = [cell for group in plan_cells(first) for cell in group if cell.detector == "patchcore"]
    write_plan(first, {"bundle": "1"})
    other = plan_of(values, detectors=["glass", "uniad"], epochs={"glass": 9}, batch_size=5, categories="nut")
    write_plan(other, {"bundle": "2"})
    write_plan(first, {"bundle": "1"})
    with pytest.raises(InputError, match="batch_size 8 -> 5"):
        write_plan(other, {"bundle": "1"}, patchcore)
    write_plan(replace(other, batch_size=8), {"bundle": "1"}, patchcore)
    with pytest.raises(InputError, match=r"settings of patchcore .* -> {}"):
        write_plan(plan_of(values, detectors=["patchcore"]), {"bundle": "1"}, patchcore)


def test_another_folder_of_the_data_or_list_of_references_is_noticed(values: dict[str, Any], tmp_path: Path) -> None:
    keep(plan_of(values))
    moved = {"mvtecad": str(shutil.copytree(values["data"]["mvtecad"], tmp_path / "other"))}
    with pytest.raises(InputError, match=r"folder of mvtecad .*tree -> .*other"):
        keep(plan_of(values, data=moved))
    listed = plan_of(values, references=str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("nut/train/good/000.png\n")
    with pytest.raises(InputError, match="reference list drawn -> [0-9a-f]{16}"):
        keep(listed)


def test_a_damaged_plan_file_is_named(values: dict[str, Any]) -> None:
    keep(plan_of(values))
    Path(values["output"], "plan.json").write_text("{")
    with pytest.raises(InputError, match=r"plan.json is damaged .*choose another --output"):
        keep(plan_of(values))


# A cell: names that tell them apart, and values that cannot be


CELL = {
    "data_set": "mvtecad",
    "category": "bolt",
    "detector": "padim",
    "features": "pretrained",
    "variant": "angle",
    "shots": 8,
    "noise": 0.1,
    "fraction": 0.5,
    "seed": 3,
}
OTHERS = [("category", "nut"), ("detector", "cflow"), ("variant", "norm"), ("shots", 4), ("noise", 0.0), ("seed", 2)]


def test_a_cell_comes_back_from_its_dictionary():
    cell = Cell(**CELL)
    assert asdict(cell) == CELL | {"view": ""}
    assert Cell.from_dict(CELL | {"seconds": 1.0}) == cell


@pytest.mark.parametrize(("name", "value"), [*OTHERS, ("fraction", 1.0), ("data_set", "visa")])
def test_names_tell_cells_apart(name, value):
    assert Cell(**CELL).name != Cell(**CELL | {name: value}).name


@given(category=st.text(min_size=1, max_size=20))
def test_the_name_of_a_cell_is_one_part_of_a_path(category):
    assert "/" not in Cell(**CELL | {"category": category}).name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 0}, "shots is 0, expected a number of reference images >= 1"),
        ({"noise": 0.3}, "noise is 0.3, expected a share of anomalous images from 0 to 0.2"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"fraction": 0.0}, r"fraction is 0.0, expected a share of the training images in \(0, 1\]"),
    ],
)
def test_impossible_cells_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Cell(**CELL | changes)
