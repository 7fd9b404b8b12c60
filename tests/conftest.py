"""Fixtures that several test files share."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.loopback_hub.hub_server import HubServer

# Read when huggingface_hub is imported: the Hub of all tests is on loopback, and none may reach for another one.
HUB_FOLDER = tempfile.TemporaryDirectory(prefix="loopback-hub-")
HUB = HubServer(Path(HUB_FOLDER.name) / "hub").start()
os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": str(Path(HUB_FOLDER.name) / "home"),
    "HF_HUB_DISABLE_XET": "1",  # the protocol that the server does not speak
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DOWNLOAD_TIMEOUT": "3",
    "HF_HUB_ETAG_TIMEOUT": "3",
}
for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
    os.environ.pop(name, None)
    os.environ.pop(name.lower(), None)

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from adpretrain_hf import ADPretrainFeatureExtractor
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
PHOTOS = ROOT / "tests" / "photos"
BUNDLE = ROOT / "hub_cards" / "adpretrain-dinov2-small"


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> None:
    """Begins with the imports for tests that start processes, if there are any, beside the tests before them."""
    if processes := sys.modules.get("tests.processes"):
        processes.start_server()


def pytest_configure(config: pytest.Config) -> None:
    """Hides a GPU from all tests but its own: they expect a CPU's numbers."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        # Threads of one that wait for those of another take longer than one thread.
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of processes that tests start
        torch.set_num_threads(threads)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Starts the random numbers of every test anew, or some would depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class QuickClock:
    """The module ``time``, but for pauses, which are a fiftieth as long."""

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / 50)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub on loopback, with an empty log and no faults waiting; its clients try again sooner than usual."""
    for module in ("adpretrain_hf.hub", "huggingface_hub.file_download", "huggingface_hub.utils._http"):
        monkeypatch.setattr(f"{module}.time", QuickClock())
    HUB.rules.clear()
    HUB.log.clear()
    yield HUB
    HUB.rules.clear()


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system of a size such as ``"400k"``; skips the test where mounting is not allowed."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system: run as root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    """Inputs and outputs of the authors' code; float16 inputs come as float32."""
    tensors = load_file(GOLDEN / "golden.safetensors")
    return {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}


@pytest.fixture(scope="session")
def released() -> dict[str, Tensor]:
    """The projectors of the authors' stored checkpoint, in bfloat16."""
    from numpy._core.multiarray import scalar

    allowed = [(scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Float64DType]
    with torch.serialization.safe_globals(allowed):
        return torch.load(GOLDEN / "checkpoints_pro_angle.pth", weights_only=True)["projectors"]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DINOv2 in transformers' format: 4 blocks, C = 32, patches of 8 px, 32 px."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "dinov2")


@pytest.fixture
def extractor(tiny_folder: Path) -> ADPretrainFeatureExtractor:
    """A tiny extractor with trained-looking projectors: 32 px, levels 1 to 4, C = 32."""
    return make_extractor(tiny_folder)


@pytest.fixture
def bundle(extractor: ADPretrainFeatureExtractor, tmp_path: Path) -> Path:
    """The tiny extractor saved as a bundle."""
    extractor.save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def bank(extractor: ADPretrainFeatureExtractor, tmp_path: Path) -> Path:
    """A reference bank of two normal images."""
    path = tmp_path / "bank.safetensors"
    extractor.make_reference([random_image(100), random_image(101)]).save(path)
    return path


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder of five random images, two of them in a subfolder: images/{0,1,2}.png, images/sub/{3,4}.jpg."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for number in range(5):
        name = f"{number}.png" if number < 3 else f"sub/{number}.jpg"
        random_image(number).save(folder / name)
    return folder


def make_extractor(folder: Path, seed: int = 1, **overrides: object) -> ADPretrainFeatureExtractor:
    """An extractor on a backbone's folder, its projectors random instead of the identity."""
    # The crop makes one batch of images of any shape.
    settings = {"image_size": 32, "resize_mode": "crop", "num_reference_tokens": 24, "num_heads": 4} | overrides
    torch.manual_seed(seed)
    extractor = ADPretrainFeatureExtractor.from_backbone(str(folder), **settings)
    with torch.no_grad():
        for parameter in extractor.projectors.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return extractor


def random_image(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """A random RGB image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
