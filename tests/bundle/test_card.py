"""Model cards: front matter that the Hub takes, code that runs, and no number that nobody measured."""

from __future__ import annotations

import re
import runpy
import shlex

import pytest
import torch
from huggingface_hub import ModelCard

from adpretrain_hf.bundle import card_text, convert
from adpretrain_hf.bundle.card import PUBLISHED
from adpretrain_hf.bundle.released import FOLDERS, RELEASE
from adpretrain_hf.cli import build_parser
from adpretrain_hf.config import ADPretrainConfig
from tests.conftest import BUNDLE, GOLDEN, ROOT

CARDS = ROOT / "hub_cards"
published_cards = runpy.run_path(str(CARDS / "render.py"))["published_cards"]
NON_COMMERCIAL = "cc-by-nc-sa-4.0"
BASE_MODELS = {
    "dinov2-base": "facebook/dinov2-base",
    "dinov2-large": "facebook/dinov2-large",
    "clip-base": "openai/clip-vit-base-patch16",
    "clip-large": "openai/clip-vit-large-patch14",
    "imagebind": None,
}
SCORES = {
    "angle": {"img_auc": 0.98765, "pix_auc": 0.85, "pix_pro": 0.91},
    "norm": {"img_auc": 0.875, "pix_auc": 0.8, "pix_pro": 1.0},
}
CONVERTED = ADPretrainConfig.preset("dinov2-large", reported_scores=SCORES)
NEW = ADPretrainConfig.preset("dinov2-base")


def read(name: str) -> str:
    return (CARDS / f"adpretrain-{name}" / "README.md").read_text(encoding="utf-8")


ALL = {name: read(name) for name in (*PUBLISHED, "dinov2-small")}
ALL |= {"converted": card_text(CONVERTED), "new": card_text(NEW)}
every_card = pytest.mark.parametrize("text", ALL.values(), ids=ALL)


def code(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def table(text: str) -> list[list[str]]:
    """The rows of the results' table, without its header."""
    results = text.partition("## Results")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in results.splitlines() if line[:1] == "|"][2:]


class TestPublishedCards:
    def test_are_what_the_generator_writes(self):
        for name, text in published_cards().items():
            again = "write it again: python hub_cards/render.py"
            assert (CARDS / name / "README.md").read_text(encoding="utf-8") == text, again

    def test_there_is_one_for_every_release(self):
        assert set(PUBLISHED) == set(FOLDERS)
        assert {path.parent.name for path in CARDS.glob("adpretrain-*/README.md")} == {*published_cards(), BUNDLE.name}
        assert all(f"https://huggingface.co/{RELEASE}" in text for text in published_cards().values())

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_front_matter(self, name):
        data = ModelCard.load(CARDS / f"adpretrain-{name}" / "README.md").data
        assert data.license == NON_COMMERCIAL
        assert data.base_model == BASE_MODELS[name]
        assert data.datasets == ["Real-IAD/Real-IAD"]
        assert data.eval_results is None

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_body_says_why_it_is_not_commercial_and_what_is_wrong_with_the_training(self, name):
        text = " ".join(read(name).split())
        assert "trained on RealIAD, and these are the terms of its data. The authors' code is under MIT" in text
        assert "RealIAD is no evaluation set" in text
        assert "chosen on MVTecAD's test set" in text
        assert ("DINOv2 training queries were normalised with CLIP's" in text) == name.startswith("dinov2")
        assert "this card was written without the checkpoints" in text

    def test_the_papers_numbers_are_where_they_belong(self):
        rows = {name: [row[:3] + row[3:6:2] for row in table(read(name))] for name in PUBLISHED}
        assert rows.pop("dinov2-base") == [["MVTecAD", "angle", "PatchCore", "+3.5", "+4.7"]]
        assert rows.pop("clip-base") == [["MPDD", "angle", "PatchCore", "+10.1", "+28.7"]]
        assert rows.pop("imagebind") == [
            ["VisA", "angle", "PaDiM", "92.6 -> 95.4", "86.3 -> 88.7"],
            ["VisA", "angle", "PatchCore", "91.6 -> 94.6", "81.3 -> 87.0"],
            ["VisA", "norm", "FeatureNorm", "49.2 -> 94.2", "44.5 -> 89.0"],
        ]
        assert not any(rows.values())
        assert {row[-1] for name in PUBLISHED for row in table(read(name))} == {
            "reported in the paper, not measured here"
        }

    @pytest.mark.parametrize(
        ("name", "millions"), [("dinov2-base", 10.43), ("clip-large", 17.84), ("imagebind", 27.22)]
    )
    def test_size_of_the_projectors(self, name, millions):
        assert f"{millions} M parameters each" in read(name)

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_command_is_understood(self, name):
        (command,) = code(read(name), "bash")
        args = build_parser().parse_args(shlex.split(command)[1:])
        assert (args.backbone, args.from_hub, str(args.output)) == (name, RELEASE, f"adpretrain-{name}")


class TestEveryCard:
    @every_card
    def test_front_matter(self, text):
        data = ModelCard(text).data
        assert (data.library_name, data.pipeline_tag) == ("adpretrain-hf", "image-feature-extraction")
        assert data.tags == ["arxiv:2511.05245", "anomaly-detection", "industrial-inspection"]

    @every_card
    def test_is_taken_by_the_hub_as_it_is(self, text, hub):
        card = ModelCard(text)
        card.validate()
        assert [(entry["path"], entry["status"]) for entry in hub.log] == [("/api/validate-yaml", 200)]
        assert str(card) == text

    @every_card
    def test_lines_are_short(self, text):
        lines = ModelCard(text).text.splitlines()
        assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []

    @every_card
    def test_limits_are_told(self, text):
        limits = text.partition("## Limits")[2].partition("\n## ")[0]
        for needed in ("needs normal images", r"pixels of the (224|336) px input", "not on one scale"):
            assert re.search(needed, limits)


class TestConverted:
    def test_scores_survive_the_model_index(self):
        card = ModelCard(ALL["converted"])
        assert card.data.model_name == "adpretrain-dinov2-large"
        found = {}
        for result in card.data.eval_results:
            assert (result.dataset_name, result.dataset_split, result.verified) == ("MVTecAD", "test", False)
            assert (result.source_name, result.source_url.endswith(RELEASE)) == ("the authors' checkpoints", True)
            assert result.metric_name.endswith(
                "(reported by the authors, selected on this test set, not measured here)"
            )
            found[tuple(result.metric_name.partition(" (")[0].split(", "))] = (result.metric_type, result.metric_value)
        assert found == {
            ("image AUROC", "angle", "PatchCore"): ("roc_auc", 0.98765),
            ("pixel AUROC", "angle", "PatchCore"): ("roc_auc", 0.85),
            ("PRO", "angle", "PatchCore"): ("aupro", 0.91),
            ("image AUROC", "norm", "FeatureNorm"): ("roc_auc", 0.875),
            ("pixel AUROC", "norm", "FeatureNorm"): ("roc_auc", 0.8),
            ("PRO", "norm", "FeatureNorm"): ("aupro", 1.0),
        }

    def test_table_has_the_scores_and_their_protocol(self):
        protocol = "reported by the authors, selected on this test set, not measured here"
        assert table(ALL["converted"]) == [
            ["MVTecAD", "angle", "PatchCore", "98.8", "85.0", "91.0", protocol],
            ["MVTecAD", "norm", "FeatureNorm", "87.5", "80.0", "100.0", protocol],
        ]
        assert "written without the checkpoints" not in ALL["converted"]

    def test_only_known_scores_of_known_meaning_are_listed(self):
        card = card_text(CONVERTED.replace(reported_scores={"other": {"img_auc": 0.5, "epoch": 7}, "angle": {}}))
        assert [row[1:6] for row in table(card)] == [
            ["other", "unknown", "50.0", "", ""],
            ["angle", "PatchCore", "", "", ""],
        ]
        assert [result.metric_value for result in ModelCard(card).data.eval_results] == [0.5]

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_the_papers_numbers_are_not_in_it(self, name):
        card = card_text(ADPretrainConfig.preset(name, reported_scores=SCORES))
        assert [row[0] for row in table(card)] == ["MVTecAD", "MVTecAD"]
        assert "reported in the paper" not in card
        assert '"a -> b"' not in card

    def test_a_tiny_score_stays_a_number(self):
        card = card_text(CONVERTED.replace(reported_scores={"angle": {"pix_pro": 1e-05}}))
        assert [result.metric_value for result in ModelCard(card).data.eval_results] == [1e-05]

    def test_the_command_writes_them_into_the_card(self, tmp_path):
        config = convert(str(GOLDEN / "dinov2_tiny"), {"angle": GOLDEN / "checkpoints_pro_angle.pth"}, tmp_path)
        data = ModelCard.load(tmp_path / "README.md").data
        assert [result.metric_value for result in data.eval_results] == list(config.reported_scores["angle"].values())
        assert (data.license, data.base_model) == (NON_COMMERCIAL, None)
        assert "In this bundle: `angle`." in (tmp_path / "README.md").read_text()


class TestNew:
    def test_claims_nothing(self):
        data = ModelCard(ALL["new"]).data
        assert (data.eval_results, data.model_name, data.datasets) == (None, None, None)
        assert "**Nothing was trained.**" in ALL["new"]
        assert table(ALL["new"]) == []
        assert "RealIAD" not in ALL["new"]
        assert card_text(CONVERTED, released=False) == card_text(CONVERTED.replace(reported_scores={}))

    @pytest.mark.parametrize(
        ("source", "licence", "base_model"),
        [
            ("facebook/dinov2-giant", "apache-2.0", "facebook/dinov2-giant"),
            ("facebook/dinov2-with-registers-small", "apache-2.0", "facebook/dinov2-with-registers-small"),
            ("open_clip:ViT-B-16-quickgelu/openai", "mit", "openai/clip-vit-base-patch16"),
            ("open_clip:ViT-B-32-quickgelu/openai", "mit", None),
            ("open_clip:ViT-B-32/laion2b_s34b_b79k", None, None),
            ("imagebind:/data/imagebind_huge.pth", NON_COMMERCIAL, None),
            ("facebook/dinov3-vitb16-pretrain-lvd1689m", None, None),
            ("models/dinov2-base", None, None),
            ("/data/facebook/dinov2-base", None, None),
        ],
    )
    def test_licence_is_the_backbones_where_that_is_known(self, source, licence, base_model):
        text = card_text(NEW.replace(backbone=source))
        data = ModelCard(text).data
        assert (data.license, data.base_model) == (licence, base_model)
        assert ("None is given here" in text) == (licence is None)

    def test_whatever_has_a_commit_on_the_hub_is_a_base_model(self):
        config = NEW.replace(backbone="acme/vit", backbone_revision="0123abc")
        text = card_text(config, repository="acme/features")
        assert ModelCard(text).data.base_model == "acme/vit"
        assert "# features\n" in text
        assert 'from_pretrained("acme/features")' in text
        assert "`acme/vit`, commit `0123abc`" in text

    def test_sizes_are_those_of_the_configuration(self):
        text = card_text(NEW.replace(layers=(2, 5), residual_scale=(), image_size=448, normalize_tokens=True))
        for said in ("layer2, layer5:", "448 px (centre crop, 32 x 32 patches)", "LayerNorm, scaled to unit length"):
            assert said in text


@pytest.mark.parametrize("released", [False, True])
def test_code_of_a_card_runs(extractor, bundle, image_folder, monkeypatch, released):
    monkeypatch.chdir(image_folder.parent)
    text = card_text(extractor.config, released=released)
    (block,) = code(text.replace("your-name/adpretrain-dinov2", str(bundle)), "python")
    names: dict = {}
    exec(compile(block.replace('"normal_images"', '"images"'), "model card", "exec"), names)
    assert names["features"]["layer1"].shape == (5, 32, 4, 4)
    assert '{"layer1": (B, 32, h, w), ...}' in block
    assert names["result"].maps.shape == (5, 40, 48)
    assert names["result"].scores.shape == (5,)


def test_a_card_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    card_text(NEW)
    assert torch.equal(torch.get_rng_state(), before)
