"""Loading from the Hub: the real client against a server on loopback that misbehaves on order."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import close_session
from safetensors.torch import load_file, save_file

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.cli import main
from adpretrain_hf.errors import BundleError, MissingPathError
from adpretrain_hf.files import is_intact
from tests.conftest import ROOT, make_extractor, random_image
from tests.loopback_hub.hub_server import HubServer
from tests.loopback_hub.loopback import Handler
from tests.tiny import save_tiny

OWNER = "hf_owner"
API = HfApi(token=OWNER)
# Requests for the weights go to a second origin; those for other files end in their name.
WEIGHTS, CONFIG, SMALL = (
    "GET /_cdn/",
    "GET .*/resolve/[^/]+/config.json",
    "GET .*/resolve/[^/]+/preprocessor_config.json",
)
load = ADPretrainFeatureExtractor.from_pretrained


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """acme/tiny: a bundle of two variants with a picture beside them; its first commit, and a later one on main."""
    folder = tmp_path_factory.mktemp("hub")
    save_tiny(folder / "backbone")
    angle = make_extractor(folder / "backbone")
    norm = make_extractor(folder / "backbone", seed=2)
    norm.variant = "norm"
    for extractor in (angle, norm):
        extractor.save_pretrained(folder / "bundle")
    (folder / "bundle" / "picture.png").write_bytes(b"\x89PNG" + bytes(1000))
    API.create_repo("acme/tiny")
    first = API.upload_folder(repo_id="acme/tiny", folder_path=folder / "bundle").oid
    API.create_tag("acme/tiny", tag="v1")
    later = make_extractor(folder / "backbone", seed=3)
    later.save_pretrained(folder / "later")
    weights = folder / "later" / "model.safetensors"
    API.upload_file(repo_id="acme/tiny", path_or_fileobj=weights, path_in_repo="model.safetensors")
    return {"first": first, "folder": str(folder / "bundle"), "later": str(folder / "later")}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def features_of(extractor: ADPretrainFeatureExtractor) -> torch.Tensor:
    return extractor.set_reference([random_image(1)])(random_image(0))["layer4"]


def requests(hub: HubServer, method: str, part: str) -> list[dict]:
    return [entry for entry in hub.log if entry["method"] == method and part in entry["path"]]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    everything = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=everything, timeout=120)


class TestFromPretrained:
    def test_is_bit_identical_by_branch_tag_and_commit(self, repository, hub, cache):
        first, later = features_of(load(repository["folder"])), features_of(load(repository["later"]))
        assert not torch.equal(first, later)
        assert torch.equal(features_of(load("acme/tiny", cache_dir=cache)), later)
        for revision in ("v1", repository["first"]):
            assert torch.equal(features_of(load("acme/tiny", revision=revision, cache_dir=cache)), first)

    def test_downloads_only_what_the_variant_needs(self, repository, hub, cache):
        extractor = load("acme/tiny", variant="norm", cache_dir=cache)
        assert torch.equal(features_of(extractor), features_of(load(repository["folder"], variant="norm")))
        files = {path.relative_to(path.parents[1]).as_posix() for path in (cache).rglob("snapshots/*/*")}
        names = {Path(name).name for name in files}
        assert names == {"config.json", "preprocessor_config.json", "model.norm.safetensors", "backbone"}

    def test_arguments_of_a_folder_work_alike(self, repository, hub, cache):
        extractor = load("acme/tiny", cache_dir=cache, dtype=torch.bfloat16, device="cpu", image_size=64)
        assert (extractor.dtype, extractor.image_size) == (torch.bfloat16, 64)

    def test_a_second_time_nothing_is_downloaded(self, repository, hub, cache):
        load("acme/tiny", cache_dir=cache)
        hub.log.clear()
        load("acme/tiny", cache_dir=cache)
        assert not requests(hub, "GET", "/_cdn/")
        hub.log.clear()
        load("acme/tiny", cache_dir=cache, local_files_only=True)
        assert not hub.log

    def test_force_download(self, repository, hub, cache):
        load("acme/tiny", cache_dir=cache)
        hub.log.clear()
        load("acme/tiny", cache_dir=cache, force_download=True)
        assert len(requests(hub, "GET", "/_cdn/")) == 2

    def test_the_other_origin_gets_no_token(self, repository, hub, cache):
        load("acme/tiny", cache_dir=cache, token=OWNER)
        assert {entry["auth"] for entry in hub.log if entry["server"] is hub.cdn} == {None}
        assert requests(hub, "HEAD", "/resolve/")[0]["auth"] == f"Bearer {OWNER}"

    def test_private_with_a_token(self, repository, hub, cache):
        API.create_repo("acme/private", private=True)
        API.upload_folder(repo_id="acme/private", folder_path=repository["folder"])
        assert load("acme/private", cache_dir=cache, token=OWNER).variant == "angle"

    def test_in_a_new_process_offline_from_the_cache(self, repository, hub, cache):
        load("acme/tiny", cache_dir=cache)
        code = f"""
from adpretrain_hf import ADPretrainFeatureExtractor as Extractor
print(Extractor.from_pretrained("acme/tiny", cache_dir={str(cache)!r}).variant)
try: Extractor.from_pretrained("acme/tiny", variant="norm", cache_dir={str(cache)!r})
except ValueError as error: print(error)
try: Extractor.from_pretrained("acme/other", cache_dir={str(cache)!r})
except ValueError as error: print(error)
"""
        lines = python(code, HF_HUB_OFFLINE="1").stdout.splitlines()
        assert lines[0] == "angle"
        assert "no variant 'norm'" in lines[1] or "acme/tiny at revision 'main' is not all in the cache" in lines[1]
        assert "acme/other at revision 'main' is not all in the cache, and the Hub cannot be asked" in lines[2]

    def test_a_backbone_that_was_left_out_is_fetched_at_its_commit(self, repository, hub, cache, tmp_path):
        API.create_repo("acme/backbone")
        save_tiny(tmp_path / "backbone")
        commit = API.upload_folder(repo_id="acme/backbone", folder_path=tmp_path / "backbone").oid
        extractor = ADPretrainFeatureExtractor.from_backbone(
            "acme/backbone", image_size=32, num_heads=4, hub={"cache_dir": cache}
        )
        assert extractor.config.backbone_revision == commit
        extractor.save_pretrained(tmp_path / "slim", include_backbone=False)
        API.upload_folder(repo_id="acme/backbone", folder_path=save_tiny(tmp_path / "other", seed=9))
        assert not (tmp_path / "slim" / "backbone").exists()
        again = load(tmp_path / "slim", cache_dir=tmp_path / "another cache")
        assert torch.equal(features_of(again), features_of(extractor))


FAULTS = {
    "500": {"status": 500},
    "502": {"status": 502},
    "503": {"status": 503},
    "503, Retry-After": {"status": 503, "headers": {"Retry-After": "1"}},
    "429, Retry-After": {"status": 429, "headers": {"Retry-After": "0"}},
    "dropped before the answer": {"drop_after": 0},
    "reset before the answer": {"drop_after": 0, "reset": True},
    "closed early": {"drop_after": 100},
    "reset in the body": {"drop_after": 100, "reset": True},
    "truncated": {"truncate": 50},
    "one bit flipped": {"corrupt": True},
    "slow": {"rate": 2_000_000},
}


def test_info_downloads_the_configuration_alone(repository, hub, cache, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    hub.log.clear()
    assert main(["info", "acme/tiny", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["variants"] == ["angle", "norm"] and facts["backbone_included"]
    assert not requests(hub, "GET", "/_cdn/")


class TestFaults:
    @pytest.mark.parametrize("target", [WEIGHTS, CONFIG, SMALL], ids=["weights", "config", "small file"])
    @pytest.mark.parametrize("fault", FAULTS)
    def test_one_of_each_is_survived(self, repository, hub, cache, target, fault):
        hub.fault(target, **FAULTS[fault])
        extractor = load("acme/tiny", cache_dir=cache)
        assert not any(rule["times"] for rule in hub.rules), "the fault did happen"
        assert torch.equal(features_of(extractor), features_of(load(repository["later"])))
        part = "/_cdn/" if target == WEIGHTS else "/config.json" if target == CONFIG else "preprocessor_config"
        usual = 2 if target != SMALL else 1
        again = len(requests(hub, "GET", part)) - usual
        assert again == (0 if fault == "slow" else 1)

    @pytest.mark.parametrize("part", ["HEAD .*/resolve/", "GET /api/models/acme/tiny"])
    @pytest.mark.parametrize("fault", ["500", "503", "429, Retry-After", "reset before the answer"])
    def test_one_while_looking_up_is_survived(self, repository, hub, cache, part, fault):
        hub.fault(part, **FAULTS[fault])
        assert torch.equal(features_of(load("acme/tiny", cache_dir=cache)), features_of(load(repository["later"])))

    @pytest.mark.parametrize("target", [WEIGHTS, CONFIG], ids=["weights", "config"])
    def test_damaged_twice_is_an_error_and_nothing_is_kept(self, repository, hub, cache, target):
        hub.fault(target, times=2 if target == CONFIG else 9, corrupt=True)
        with pytest.raises(BundleError, match="does not have the checksum that the Hub announced, twice"):
            load("acme/tiny", cache_dir=cache)
        hub.rules.clear()
        assert torch.equal(features_of(load("acme/tiny", cache_dir=cache)), features_of(load(repository["later"])))

    @pytest.mark.parametrize("fault", ["500", "503", "reset in the body", "dropped before the answer"])
    def test_for_good_is_one_clear_error_after_a_few_attempts(self, repository, hub, cache, monkeypatch, fault):
        monkeypatch.setenv("ADPRETRAIN_HUB_ATTEMPTS", "3")
        hub.fault(WEIGHTS, times=999, **FAULTS[fault])
        with pytest.raises(BundleError, match="again and again|connection to the Hub failed") as caught:
            load("acme/tiny", cache_dir=cache)
        assert caught.value.__cause__ is not None
        assert not list(cache.rglob("*.incomplete"))
        assert len(requests(hub, "GET", "/_cdn/")) <= 40

    def test_a_retry_after_beyond_the_limit_is_not_waited_for(self, repository, hub, cache, monkeypatch):
        monkeypatch.setenv("ADPRETRAIN_HUB_SECONDS", "2")
        hub.fault(CONFIG, times=99, status=503, headers={"Retry-After": "3600"})
        with pytest.raises(BundleError, match="the Hub answered 503 for acme/tiny"):
            load("acme/tiny", cache_dir=cache)

    def test_a_cached_file_that_rotted_is_fetched_again(self, repository, hub, cache):
        load("acme/tiny", cache_dir=cache)
        (weights,) = cache.rglob("snapshots/*/model.safetensors")
        blob = weights.resolve()
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.write_bytes(data)
        assert torch.equal(features_of(load("acme/tiny", cache_dir=cache)), features_of(load(repository["later"])))

    def test_a_cached_file_is_read_through_once(self, repository, hub, cache):
        """The network reads it anyway; a checksum of gigabytes at every start is what is spared."""
        load("acme/tiny", cache_dir=cache)
        (weights,) = cache.rglob("snapshots/*/model.safetensors")
        blob, data = weights.resolve(), bytearray(weights.read_bytes())
        before = blob.stat()
        data[-1] ^= 1
        blob.write_bytes(data)
        os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))  # as it was, but for a bit
        assert is_intact(weights)
        os.utime(blob)
        assert not is_intact(weights)
        blob.with_name(f"{blob.name}.intact").write_text(f"{before.st_size} {blob.stat().st_mtime_ns} another")
        assert not is_intact(weights)

    def test_a_read_only_cache_is_checked_every_time(self, repository, hub, cache, monkeypatch):
        load("acme/tiny", cache_dir=cache)
        (weights,) = cache.rglob("snapshots/*/model.safetensors")
        stamp = weights.resolve().with_name(f"{weights.resolve().name}.intact")
        stamp.unlink()
        stamp.mkdir()  # a name that cannot be written to
        assert is_intact(weights) and is_intact(weights)

    def test_files_of_other_variants_are_left_alone(self, repository, hub, cache, caplog):
        load("acme/tiny", variant="norm", cache_dir=cache)
        (other,) = cache.rglob("snapshots/*/model.norm.safetensors")
        other.resolve().write_bytes(b"damaged")
        load("acme/tiny", cache_dir=cache)
        assert other.read_bytes() == b"damaged" and not caplog.records

    def test_a_damaged_file_stays_where_it_cannot_be_fetched(self, repository, hub, cache):
        load("acme/tiny", cache_dir=cache)
        (weights,) = cache.rglob("snapshots/*/model.safetensors")
        weights.resolve().write_bytes(b"damaged")
        with pytest.raises(BundleError, match=r"model.safetensors of acme/tiny is damaged in the cache, and the Hub"):
            load("acme/tiny", cache_dir=cache, local_files_only=True)
        assert weights.read_bytes() == b"damaged"
        assert torch.equal(features_of(load("acme/tiny", cache_dir=cache)), features_of(load(repository["later"])))

    def test_a_hub_that_never_answers_is_given_up(self, repository, hub, cache, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.3)
        monkeypatch.setenv("ADPRETRAIN_HUB_ATTEMPTS", "2")
        hub.fault("GET /api/models/acme/tiny", times=9, delay=20)
        before = time.monotonic()
        with pytest.raises(BundleError, match="the connection to the Hub failed while loading acme/tiny"):
            load("acme/tiny", cache_dir=cache)
        assert time.monotonic() - before < 15

    def test_a_file_that_never_comes_is_given_up(self, repository, hub, cache, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
        monkeypatch.setenv("ADPRETRAIN_HUB_ATTEMPTS", "1")
        hub.fault(WEIGHTS, times=99, delay=20)
        before = time.monotonic()
        with pytest.raises(BundleError, match="the connection to the Hub failed while loading acme/tiny"):
            load("acme/tiny", cache_dir=cache)
        assert time.monotonic() - before < 15

    def test_requests_of_others_have_the_time_outs_that_they_ask_for(self, repository, hub, cache, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
        load("acme/tiny", cache_dir=cache)
        hub.fault("GET /api/models/acme/tiny", delay=1)
        assert API.model_info("acme/tiny", timeout=None).id == "acme/tiny"

    def test_a_stale_copy_is_not_taken_silently(self, repository, hub, cache):
        load("acme/tiny", cache_dir=cache)
        hub.fault("GET /api/models/acme/tiny", times=99, status=503)
        with pytest.raises(BundleError, match="the Hub answered 503 for acme/tiny"):
            load("acme/tiny", cache_dir=cache)

    def test_without_an_answer_the_cached_state_is_taken_with_a_warning(self, repository, hub, cache):
        load("acme/tiny", cache_dir=cache)
        code = f"""
import logging; logging.basicConfig()
from adpretrain_hf import ADPretrainFeatureExtractor as Extractor
print(Extractor.from_pretrained("acme/tiny", cache_dir={str(cache)!r}).variant)
"""
        gone = python(code, HF_ENDPOINT="http://127.0.0.1:9", ADPRETRAIN_HUB_ATTEMPTS="1")
        assert gone.stdout == "angle\n", gone.stderr
        assert "the Hub cannot be reached: taking the cached commit" in gone.stderr


@pytest.fixture(params=["info", "push", "new"])
def command(request, bundle, tmp_path) -> list[str]:
    """A command line that asks the Hub for a repository."""
    return {
        "info": ["info", "acme/tiny"],
        "push": ["push", str(bundle), "acme/tiny"],
        "new": ["new", "--backbone", "acme/tiny", "--output", str(tmp_path / "new")],
    }[request.param]


@pytest.fixture
def client_with(monkeypatch) -> Iterator[Callable[..., None]]:
    """Sets environment variables that the Hub's client reads when it makes its session."""

    def set_all(**environment: str) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        close_session()

    yield set_all
    close_session()


class TestAnswersThatAreNotTheHubs:
    """Each is one line that says what to do, wherever the Hub is asked."""

    def one_line(self, command: list[str], capsys, *parts: str) -> None:
        capsys.readouterr()
        assert main(command) == 1
        said = capsys.readouterr().err
        assert said.startswith("adpretrain: error: ") and said.count("\n") == 1
        for part in parts:
            assert part in said

    @pytest.mark.parametrize("status", [200, 403, 404])
    def test_a_login_page(self, repository, hub, command, capsys, status):
        hub.fault(".*", times=99, page=status)
        self.one_line(command, capsys, f"what answered for acme/tiny at {hub.url} is not the Hub", "HTTPS_PROXY")

    def test_a_page_of_another_service(self, repository, hub, command, capsys, monkeypatch):
        monkeypatch.setattr("tests.loopback_hub.hub_server.HubHandler.info", lambda self, *_: self.reply(["hello"]))
        self.one_line(command, capsys, "what answered for acme/tiny at", "is not the Hub")

    def test_a_proxy_that_wants_a_password(self, repository, hub, command, capsys, client_with):
        hub.fault(".*", times=99, status=407)
        self.one_line(command, capsys, "the proxy asks for a user and a password", "http://user:password@host:port")

    def test_a_proxy_that_opens_no_tunnel(self, hub, command, capsys, client_with, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example")
        monkeypatch.setattr("tests.loopback_hub.loopback.Handler.do_CONNECT", Handler.dispatch, raising=False)
        hub.fault("CONNECT", times=99, status=407)
        client_with(HTTPS_PROXY=hub.url)
        self.one_line(command, capsys, "the proxy does not let the request for acme/tiny through (407", "HTTPS_PROXY")

    @pytest.mark.parametrize("endpoint", ["hub.example", "http://hub:port"])
    def test_an_endpoint_that_is_no_address(self, hub, command, capsys, monkeypatch, endpoint):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        self.one_line(command, capsys, f"HF_ENDPOINT is '{endpoint}'", "expected")

    @pytest.mark.parametrize("token", ["hf_größe", "hf_two\nlines"])
    def test_a_token_that_cannot_be_sent(self, repository, hub, command, capsys, monkeypatch, token):
        monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: token)
        self.one_line(command, capsys, "the token for acme/tiny cannot be sent", "HF_TOKEN")
        with pytest.raises(BundleError, match="cannot be sent") as caught:
            load("acme/tiny", token=token)
        assert token.partition("\n")[0] not in "".join(traceback.format_exception(caught.value))

    @pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "nonsense://127.0.0.1:9"])
    def test_a_proxy_that_the_client_cannot_use(self, hub, command, capsys, client_with, proxy):
        client_with(ALL_PROXY=proxy)
        self.one_line(
            command, capsys, "the Hub's client cannot use the proxies or certificates that are set", "ALL_PROXY"
        )

    @pytest.mark.parametrize("name", ["ADPRETRAIN_HUB_ATTEMPTS", "ADPRETRAIN_HUB_SECONDS", "HF_HUB_ETAG_TIMEOUT"])
    def test_a_setting_that_is_no_number(self, repository, hub, command, capsys, monkeypatch, name):
        monkeypatch.setenv(name, "many")
        self.one_line(command, capsys, f"the environment variable {name} is 'many', expected a", "number, or unset it")

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"HF_HUB_DOWNLOAD_TIMEOUT": "ten"}, "HF_HUB_DOWNLOAD_TIMEOUT is 'ten', expected a whole number"),
            ({"HF_ENDPOINT": "http://hub:port"}, "HF_ENDPOINT is 'http://hub:port'"),
        ],
    )
    def test_settings_by_which_the_client_cannot_be_imported(self, setting, message):
        command = [sys.executable, "-m", "adpretrain_hf.cli", "info", "acme/tiny"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | setting, cwd=ROOT)
        assert done.returncode == 1 and done.stderr.startswith(f"adpretrain: error: the environment variable {message}")
        assert done.stderr.count("\n") == 1
        done = python("import adpretrain_hf; adpretrain_hf.ADPretrainConfig", **setting)
        assert done.stderr.splitlines()[-1].startswith("adpretrain_hf.errors.InputError: the environment variable")


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half(repository, hub, mount_disk):
    small_disk = mount_disk("300k")
    with pytest.raises(BundleError, match="the disk is full while loading acme/tiny: free some space") as caught:
        load("acme/tiny", cache_dir=small_disk)
    assert caught.value.__cause__ is not None
    assert not list(small_disk.rglob("*.incomplete"))
    assert all(is_intact(path) for path in small_disk.rglob("snapshots/**/*") if path.is_file())


def test_a_read_only_cache_serves_what_it_has_and_says_what_to_do_for_the_rest(repository, hub, mount_disk):
    disk = mount_disk("100m")
    expected = features_of(load("acme/tiny", cache_dir=disk))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert torch.equal(features_of(load("acme/tiny", cache_dir=disk)), expected)
    assert torch.equal(features_of(load("acme/tiny", cache_dir=disk, local_files_only=True)), expected)
    for lacking in ({"variant": "norm"}, {"revision": "v1"}, {"force_download": True}):
        with pytest.raises(BundleError, match="the cache cannot be written while loading acme/tiny .*cache_dir"):
            load("acme/tiny", cache_dir=disk, **lacking)


def test_a_read_only_cache_serves_an_older_commit_with_a_warning(repository, hub, mount_disk, caplog):
    disk = mount_disk("100m")
    expected = features_of(load("acme/tiny", cache_dir=disk, revision=repository["first"]))
    branch = disk / "models--acme--tiny" / "refs" / "main"
    branch.parent.mkdir()
    branch.write_text(repository["first"])  # as if loaded before the later push
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert torch.equal(features_of(load("acme/tiny", cache_dir=disk)), expected)
    assert f"the cache cannot be written: taking the cached commit {repository['first']} for" in caplog.text


class TestRefusals:
    def refused(self, message: str, name: str = "acme/tiny", kind: type = BundleError, **arguments: object) -> None:
        with pytest.raises(kind, match=message) as caught:
            load(name, **arguments)
        assert caught.value.__cause__ is not None

    def test_missing_repository(self, hub, cache):
        self.refused(
            "no repository acme/none on the Hub .and no such folder here., or",
            "acme/none",
            MissingPathError,
            cache_dir=cache,
        )

    def test_private_repository(self, repository, hub, cache):
        API.create_repo("acme/closed", private=True)
        self.refused(
            "no repository acme/closed on the Hub .and no such folder here., or", "acme/closed", MissingPathError
        )

    def test_gated_repository(self, repository, hub, cache):
        API.create_repo("acme/gated")
        API.upload_folder(repo_id="acme/gated", folder_path=repository["folder"])
        API.update_repo_settings("acme/gated", gated="manual")
        for token in (False, "hf_other"):
            self.refused("acme/gated is gated: ask for access", "acme/gated", cache_dir=cache, token=token)

    def test_wrong_token(self, repository, hub, cache):
        self.refused("no token, or one that the Hub does not accept, for acme/tiny", cache_dir=cache, token="hf_wrong")

    def test_tokens_are_not_told(self, repository, hub, cache, caplog, capfd):
        hub.fault(WEIGHTS, status=503)
        load("acme/tiny", cache_dir=cache, token=OWNER)
        with pytest.raises(BundleError) as caught:
            load("acme/tiny", cache_dir=cache, token="hf_wrong")
        said = caplog.text + "".join(capfd.readouterr()) + str(caught.value)
        assert OWNER not in said and "hf_wrong" not in said

    def test_missing_revision(self, repository, hub, cache):
        self.refused("acme/tiny has no revision 'v9'", cache_dir=cache, revision="v9")

    def test_missing_variant(self, repository, hub, cache):
        missing = r"acme/tiny has no variant 'other' \(model.other.safetensors is missing\)"
        with pytest.raises(BundleError, match=rf"{missing}: expected one of \['angle', 'norm'\]"):
            load("acme/tiny", variant="other", cache_dir=cache)

    def test_not_a_bundle(self, hub, cache, tmp_path):
        API.create_repo("acme/plain")
        self.refused("acme/plain at revision 'main' is not an ADPretrain bundle", "acme/plain", cache_dir=cache)
        API.upload_folder(repo_id="acme/plain", folder_path=save_tiny(tmp_path / "plain"))
        self.refused("format_version is None.*not an ADPretrain bundle", "acme/plain", cache_dir=cache)

    def test_a_damaged_bundle_on_the_hub_itself(self, repository, hub, cache, tmp_path):
        shutil.copytree(repository["folder"], tmp_path / "bundle")
        tensors = load_file(tmp_path / "bundle" / "model.safetensors")
        tensors.pop("levels.0.mlp.fc1.bias")
        save_file(tensors, tmp_path / "bundle" / "model.safetensors")
        API.create_repo("acme/damaged")
        API.upload_folder(repo_id="acme/damaged", folder_path=tmp_path / "bundle")
        with pytest.raises(BundleError, match=r"missing \['levels.0.mlp.fc1.bias'\]"):
            load("acme/damaged", cache_dir=cache)

    def test_neither_folder_nor_id(self, hub, tmp_path):
        self.refused("neither a folder nor the id of a repository", str(tmp_path / "a" / "b"), MissingPathError)


def test_configuration_on_the_hub_is_json(repository):
    assert json.loads(Path(repository["folder"], "config.json").read_text())["format_version"] == 1
