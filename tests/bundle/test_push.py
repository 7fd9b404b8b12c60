"""Pushing to the Hub: one commit or none, whatever the network does meanwhile."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.bundle import BundlePusher
from adpretrain_hf.cli import main
from adpretrain_hf.errors import BundleError, InputError
from tests.conftest import ROOT, make_extractor, random_image
from tests.loopback_hub.hub_server import HubServer
from tests.tiny import save_tiny

OWNER, READER, STRANGER = "hf_owner", "hf_reader", "hf_other"
API = HfApi(token=OWNER)
numbers = itertools.count()


@pytest.fixture
def name() -> str:
    """A repository that is not there yet."""
    return f"acme/push-{next(numbers)}"


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adpretrain_hf.hub.random.uniform", lambda low, high: 0.02)


def push(folder: Path, name: str, **arguments: object) -> str:
    message = {key: arguments.pop(key) for key in ("create_pr", "tag") if key in arguments}
    return BundlePusher(folder, name, **({"token": OWNER} | arguments)).push(**message)  # type: ignore[arg-type]


def files(name: str, revision: str = "main") -> set[str]:
    return set(API.list_repo_files(name, revision=revision)) - {".gitattributes"}


def local_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def commits(hub: HubServer, name: str) -> int:
    return len(hub.repos[f"models/{name}"]["commits"])


def features_of(extractor: ADPretrainFeatureExtractor) -> torch.Tensor:
    return extractor.set_reference([random_image(1)])(random_image(0))["layer4"]


def retrain(bundle: Path, tiny_folder: Path, seed: int = 7) -> None:
    make_extractor(tiny_folder, seed=seed).save_pretrained(bundle)


class TestPush:
    def test_all_files_in_one_commit_and_back_again(self, hub, bundle, name, tmp_path):
        push(bundle, name)
        assert files(name) == local_files(bundle)
        assert commits(hub, name) == 2  # the one that makes the repository, and ours
        again = ADPretrainFeatureExtractor.from_pretrained(name, cache_dir=tmp_path / "cache")
        assert torch.equal(features_of(again), features_of(ADPretrainFeatureExtractor.from_pretrained(bundle)))

    def test_from_memory(self, hub, extractor, name, tmp_path):
        url = extractor.push_to_hub(name, token=OWNER, private=True, tag="v1")
        assert url.startswith(f"{hub.url}/{name}/commit/")
        assert API.model_info(name).private
        again = ADPretrainFeatureExtractor.from_pretrained(
            name, revision="v1", token=OWNER, cache_dir=tmp_path / "cache"
        )
        assert torch.equal(features_of(again), features_of(extractor))

    def test_a_variant_from_memory_goes_beside_the_other(self, hub, bundle, extractor, name, tiny_folder, tmp_path):
        (bundle / "README.md").write_text("---\ntags: [mine]\n---\n")
        push(bundle, name)
        norm = make_extractor(tiny_folder, seed=2)
        norm.variant = "norm"
        norm.push_to_hub(name, token=OWNER)
        assert files(name) == local_files(bundle) | {"model.norm.safetensors"}
        load = ADPretrainFeatureExtractor.from_pretrained
        assert torch.equal(features_of(load(name, variant="norm", cache_dir=tmp_path / "c")), features_of(norm))
        assert torch.equal(features_of(load(name, cache_dir=tmp_path / "c")), features_of(extractor))
        assert API.model_info(name).tags == ["mine"]
        other = make_extractor(tiny_folder, num_reference_tokens=8)
        with pytest.raises(
            BundleError, match=r"holds the variants \['norm'\] of an extractor with another configuration"
        ):
            other.push_to_hub(name, token=OWNER)

    def test_the_backbone_stays_at_home_if_told_so(self, hub, extractor, name, tmp_path):
        extractor.config = extractor.config.replace(backbone_revision="0123abc")
        arguments = {"include_backbone": False, "push_to_hub": True, "repo_id": name, "token": OWNER}
        extractor.save_pretrained(tmp_path / "slim", **arguments)
        assert not [file for file in files(name) if file.startswith("backbone/")]
        with pytest.raises(TypeError, match=r"unknown arguments \['inclde_backbone'\]"):
            extractor.save_pretrained(tmp_path / "slim", inclde_backbone=False)

    def test_a_commit_stays_what_it_was_after_a_later_push(self, hub, bundle, name, tiny_folder, tmp_path):
        before = features_of(ADPretrainFeatureExtractor.from_pretrained(bundle))
        commit = push(bundle, name).rsplit("/", 1)[1]
        retrain(bundle, tiny_folder)
        push(bundle, name)
        load = ADPretrainFeatureExtractor.from_pretrained
        assert torch.equal(features_of(load(name, revision=commit, cache_dir=tmp_path / "c")), before)
        assert not torch.equal(features_of(load(name, cache_dir=tmp_path / "c")), before)

    def test_again_sends_nothing(self, hub, bundle, name):
        push(bundle, name)
        hub.log.clear()
        push(bundle, name)
        assert not [entry for entry in hub.log if entry["method"] in ("PUT", "POST")]
        assert commits(hub, name) == 2

    def test_a_change_sends_only_the_changed_file(self, hub, bundle, name, tiny_folder):
        push(bundle, name)
        retrain(bundle, tiny_folder)
        plan = BundlePusher(bundle, name, token=OWNER).plan()
        assert set(plan.send) == {"model.safetensors"}
        push(bundle, name)
        assert commits(hub, name) == 3

    def test_stale_files_go_in_the_same_commit_and_others_stay(self, hub, bundle, name, tiny_folder):
        norm = make_extractor(tiny_folder, seed=2)
        norm.variant = "norm"
        norm.save_pretrained(bundle)
        push(bundle, name)
        for path in ("backbone/model-00001-of-00002.safetensors", "picture.png", "references/screw.safetensors"):
            API.upload_file(repo_id=name, path_or_fileobj=b"\0" * 100, path_in_repo=path)
        (bundle / "model.norm.safetensors").unlink()
        before = commits(hub, name)
        push(bundle, name)
        assert commits(hub, name) == before + 1
        assert files(name) == local_files(bundle) | {"picture.png", "references/screw.safetensors"}

    def test_branch_tag_and_pull_request(self, hub, bundle, name, tiny_folder):
        push(bundle, name)
        retrain(bundle, tiny_folder)
        push(bundle, name, branch="next", tag="v2")
        assert API.model_info(name, revision="v2").sha == API.model_info(name, revision="next").sha
        retrain(bundle, tiny_folder, seed=8)
        main_before = API.model_info(name).sha
        assert "/discussions/1" in push(bundle, name, create_pr=True)
        assert API.model_info(name).sha == main_before

    def test_without_backbone(self, hub, extractor, name):
        extractor.config = extractor.config.replace(backbone_revision="0123abc")
        extractor.push_to_hub(name, token=OWNER, include_backbone=False)
        assert files(name) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}

    def test_command(self, hub, bundle, name, capsys, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", OWNER)
        assert main(["push", str(bundle), name, "--private", "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert "bytes  backbone/model.safetensors" in said and "6 files, " in said
        assert f"models/{name}" not in hub.repos
        assert main(["push", str(bundle), name, "--private", "--tag", "v1"]) == 0
        assert hub.repos[f"models/{name}"]["private"]
        assert main(["push", str(bundle), name, "--dry-run"]) == 0
        assert "0 files, 0 bytes; 6 are there already" in capsys.readouterr().out

    def test_in_a_new_process_with_an_empty_cache(self, hub, bundle, name, tmp_path):
        push(bundle, name)
        code = f"""
import hashlib, torch
from adpretrain_hf import ADPretrainFeatureExtractor
torch.manual_seed(0)
images, references = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
for place in ({str(bundle)!r}, {name!r}):
    extractor = ADPretrainFeatureExtractor.from_pretrained(place, cache_dir={str(tmp_path / "cache")!r})
    features = torch.stack(list(extractor(images, references).values()))
    print(hashlib.sha256(features.numpy().tobytes()).hexdigest())
"""
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, env=os.environ
        )
        digests = run.stdout.split()
        assert len(digests) == 2 and digests[0] == digests[1], run.stderr

    def test_killed_while_sending_the_branch_is_as_it_was_and_a_second_run_sends_the_rest(
        self, hub, bundle, name, tiny_folder
    ):
        push(bundle, name)
        head = API.model_info(name).sha
        retrain(bundle, tiny_folder, seed=1000 + next(numbers))
        hub.log.clear()
        hub.fault("POST .*/commit/", delay=30)
        command = [sys.executable, "-m", "adpretrain_hf.cli", "push", str(bundle), name]
        process = subprocess.Popen(command, env=os.environ | {"HF_TOKEN": OWNER}, cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not [entry for entry in hub.log if "/commit/" in entry["path"]] and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.wait()
        assert [entry for entry in hub.log if entry["method"] == "PUT"], "the weights were sent"
        assert API.model_info(name).sha == head
        hub.rules.clear()
        hub.log.clear()
        push(bundle, name)
        assert API.model_info(name).sha != head
        assert not [entry for entry in hub.log if entry["method"] == "PUT"], "they were not sent again"


class TestTags:
    def test_the_same_tag_for_the_same_commit(self, hub, bundle, name):
        push(bundle, name, tag="v1")
        commit = API.model_info(name, revision="v1").sha
        push(bundle, name, tag="v1")
        assert API.model_info(name, revision="v1").sha == API.model_info(name).sha == commit

    def test_a_tag_of_another_commit_is_refused_before_anything_is_sent(self, hub, bundle, name, tiny_folder):
        push(bundle, name, tag="v1")
        retrain(bundle, tiny_folder)
        tagged = API.model_info(name).sha
        message = f"{name} has the tag 'v1' already, on the commit {tagged}: nothing was sent. Give another tag"
        hub.log.clear()
        with pytest.raises(BundleError, match=message):
            push(bundle, name, tag="v1")
        assert not [entry for entry in hub.log if entry["method"] in ("PUT", "POST")]
        push(bundle, name, tag="v2")
        assert API.model_info(name, revision="v2").sha == API.model_info(name).sha != tagged

    def test_the_answer_to_a_tag_is_lost(self, hub, bundle, name):
        hub.fault("POST .*/tag/", lose_answer=True)
        push(bundle, name, tag="v1")
        assert API.model_info(name, revision="v1").sha == API.model_info(name).sha


class TestForeignRepositories:
    """What is no bundle is not overwritten, unless it is insisted on."""

    @pytest.fixture
    def foreign(self, hub, name, tmp_path) -> str:
        API.create_repo(name)
        save_tiny(tmp_path / "theirs")
        (tmp_path / "theirs" / "README.md").write_text("theirs")
        (tmp_path / "theirs" / "model-00001-of-00002.safetensors").write_bytes(b"\0" * 9)
        API.upload_folder(repo_id=name, folder_path=tmp_path / "theirs")
        hub.log.clear()
        return name

    MESSAGE = (
        r"holds something else than an ADPretrain bundle \(.*README.md.*\): nothing was sent.*--force \(force=True\)"
    )

    def test_a_model_of_another_kind(self, hub, bundle, extractor, foreign):
        there = files(foreign)
        for options in ({}, {"branch": "next"}, {"create_pr": True}):
            with pytest.raises(BundleError, match=self.MESSAGE):
                push(bundle, foreign, **options)
        with pytest.raises(BundleError, match=self.MESSAGE):
            BundlePusher(bundle, foreign, token=OWNER).plan()
        with pytest.raises(BundleError, match=self.MESSAGE):
            extractor.push_to_hub(foreign, token=OWNER)
        assert not [entry for entry in hub.log if entry["method"] in ("PUT", "POST")]
        assert files(foreign) == there

    def test_insisting(self, hub, bundle, foreign, monkeypatch, capsys, tmp_path):
        monkeypatch.setenv("HF_TOKEN", OWNER)
        assert main(["push", str(bundle), foreign]) == 1
        assert "holds something else than an ADPretrain bundle" in capsys.readouterr().err
        assert main(["push", str(bundle), foreign, "--force"]) == 0
        assert files(foreign) == local_files(bundle)
        again = ADPretrainFeatureExtractor.from_pretrained(foreign, cache_dir=tmp_path / "cache")
        assert torch.equal(features_of(again), features_of(ADPretrainFeatureExtractor.from_pretrained(bundle)))

    def test_insisting_from_memory(self, hub, extractor, foreign):
        extractor.push_to_hub(foreign, token=OWNER, force=True)
        assert "model.safetensors" in files(foreign) and "model-00001-of-00002.safetensors" not in files(foreign)

    @pytest.mark.parametrize(
        "config", ["{", "[]", '{"model_type": "bert"}', '{"format_version": 1, "model_type": "x"}']
    )
    def test_configurations_that_are_no_bundles(self, hub, bundle, name, config):
        API.create_repo(name)
        API.upload_file(repo_id=name, path_or_fileobj=config.encode(), path_in_repo="config.json")
        with pytest.raises(BundleError, match="holds something else than an ADPretrain bundle"):
            push(bundle, name)

    def test_a_bundle_with_another_configuration_is_one(self, hub, bundle, name, tiny_folder, tmp_path):
        push(bundle, name)
        make_extractor(tiny_folder, num_reference_tokens=8).save_pretrained(tmp_path / "other")
        push(tmp_path / "other", name)
        assert {"config.json", "model.safetensors"} <= set(files(name))


class TestRefusals:
    def test_public_where_private_was_asked_for(self, hub, bundle, name, tiny_folder):
        push(bundle, name)
        retrain(bundle, tiny_folder)
        hub.log.clear()
        with pytest.raises(BundleError, match="is public, and a private repository was asked for: nothing was sent"):
            push(bundle, name, private=True)
        assert not [entry for entry in hub.log if entry["method"] in ("PUT", "POST")]

    @pytest.mark.parametrize(
        ("token", "message"),
        [
            (False, "no token, or one that the Hub does not accept"),
            ("hf_wrong", "no token, or one that the Hub does not accept"),
            (READER, "use one with the rights for it .a write token for pushing"),
            (STRANGER, "use one with the rights for it"),
        ],
    )
    def test_tokens_that_may_not_write(self, hub, bundle, name, token, message):
        with pytest.raises(BundleError, match=message) as caught:
            push(bundle, name, token=token)
        assert str(token) not in str(caught.value) or token is False
        assert caught.value.__cause__ is not None
        assert f"models/{name}" not in hub.repos

    def test_what_is_no_bundle(self, hub, name, tmp_path, bundle):
        with pytest.raises(BundleError, match=r"there is no config.json"):
            push(tmp_path, name)
        (bundle / "model.safetensors").unlink()
        with pytest.raises(BundleError, match=r"has no projectors: expected model.safetensors"):
            push(bundle, name)
        shutil.rmtree(bundle / "backbone")
        (bundle / "model.safetensors").write_bytes(b"")
        with pytest.raises(BundleError, match="neither a backbone nor the commit"):
            push(bundle, name)

    def test_a_card_that_the_hub_does_not_accept(self, hub, bundle, name):
        (bundle / "README.md").write_text("---\nlicense: [1, 2]\n---\n")
        with pytest.raises(InputError, match="the Hub does not accept the card"):
            push(bundle, name)
        assert commits(hub, name) == 1

    def test_without_the_hub(self, hub, bundle, name, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
        with pytest.raises(BundleError, match=f"pushing to {name} needs the Hub, and HF_HUB_OFFLINE keeps the client"):
            push(bundle, name)

    def test_what_is_no_id(self, hub, bundle, capsys):
        assert main(["push", str(bundle), "a/b/c"]) == 1
        assert "adpretrain: error: a/b/c is no id of a repository, expected owner/name:" in capsys.readouterr().err

    def test_what_the_hub_refuses_is_told_in_its_words(self, hub, bundle, name, monkeypatch):
        hub.fault("POST /api/repos/create", times=99, status=402)
        with pytest.raises(BundleError, match=f"the Hub answered 402 for {name} and will again .injected fault."):
            push(bundle, name)

    def test_someone_else_pushed_meanwhile(self, hub, bundle, name, tiny_folder, monkeypatch):
        push(bundle, name)
        retrain(bundle, tiny_folder)
        pusher = BundlePusher(bundle, name, token=OWNER)
        plan = pusher.plan()
        API.upload_file(repo_id=name, path_or_fileobj=b"x", path_in_repo="other.txt")
        monkeypatch.setattr(pusher, "plan", lambda: plan)
        with pytest.raises(BundleError, match="someone else wrote to main"):
            pusher.push()


FAULTS = {
    "500": {"status": 500},
    "503": {"status": 503},
    "429": {"status": 429, "headers": {"Retry-After": "0"}},
    "dropped": {"drop_after": 0},
    "reset": {"drop_after": 0, "reset": True},
    "answer lost": {"lose_answer": True},
    "slow": {"delay": 0.5},
}
TARGETS = {
    "create": "POST /api/repos/create",
    "look-up": "GET .*/revision/",
    "preupload": "POST .*preupload",
    "LFS batch": "POST .*lfs/objects/batch",
    "PUT": "PUT /_lfs/",
    "verify": "POST /_lfs/.*/verify",
    "commit": "POST .*/commit/",
}
# Asked once in a push with a card, a branch and a tag.
OTHER_TARGETS = {"card": "validate-yaml", "branch": "POST .*/branch/", "tags": "GET .*/refs", "tag": "POST .*/tag/"}


class TestFaults:
    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("fault", FAULTS)
    def test_one_of_each_is_survived(self, hub, bundle, name, tiny_folder, target, fault):
        retrain(bundle, tiny_folder, seed=1000 + next(numbers))  # what the server has, it does not ask for again
        hub.fault(TARGETS[target], **FAULTS[fault])
        push(bundle, name)
        assert not any(rule["times"] for rule in hub.rules), "the fault did happen"
        assert files(name) == local_files(bundle)
        assert commits(hub, name) == 2
        posts = [entry for entry in hub.log if entry["method"] == "POST" and "/commit/" in entry["path"]]
        lost = target == "commit" and fault == "answer lost"
        assert len(posts) == (2 if target == "commit" and not lost and fault != "slow" else 1)

    @pytest.mark.parametrize("target", TARGETS | OTHER_TARGETS)
    def test_no_answer_is_given_up(self, hub, bundle, name, tiny_folder, monkeypatch, target):
        retrain(bundle, tiny_folder, seed=1000 + next(numbers))
        for limit in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
            monkeypatch.setattr(f"huggingface_hub.constants.{limit}", 0.2)
        monkeypatch.setenv("ADPRETRAIN_HUB_ATTEMPTS", "1")
        hub.fault((TARGETS | OTHER_TARGETS)[target], times=99, delay=20)
        before = time.monotonic()
        with pytest.raises(BundleError, match=f"the connection to the Hub failed while pushing to {name}"):
            push(bundle, name, branch="next", tag="v1")
        assert time.monotonic() - before < 15

    @pytest.mark.parametrize("target", ["preupload", "LFS batch", "PUT", "verify", "commit"])
    def test_for_good_leaves_the_branch_as_it_was(self, hub, bundle, name, tiny_folder, target, monkeypatch):
        push(bundle, name)
        head = API.model_info(name).sha
        retrain(bundle, tiny_folder, seed=100 + list(TARGETS).index(target))
        monkeypatch.setenv("ADPRETRAIN_HUB_ATTEMPTS", "2")
        hub.fault(TARGETS[target], times=999, status=400 if target == "PUT" else 403)
        with pytest.raises(BundleError):
            push(bundle, name)
        assert API.model_info(name).sha == head
        hub.rules.clear()
        push(bundle, name)
        assert API.model_info(name).sha != head
        assert not BundlePusher(bundle, name, token=OWNER).plan().send
