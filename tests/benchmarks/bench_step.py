"""A training step with the reference cache beside one that computes as the released code does, in one run.

    python -m tests.benchmarks.bench_step --backbone facebook/dinov2-small --batch-size 8

Both see the same images, references and weights, and must come to the same loss. The released form encodes the
references anew, projects the reference tokens once for every image, and compares with full similarity matrices. Prints
the time of every part of both steps and the peak of the process's memory in it.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.images import normalize
from tests.benchmarks.peak_memory import peak_memory
from tests.benchmarks.published import PublishedProjectors, encode_references, published_residual
from tests.training.real_iad_tree import load_real_iad
from training import synthetic
from training.data.augment import augment
from training.data.samples import Item, Samples, collate
from training.losses import level_losses
from training.references import ReferencePatches, ReferencePool, autocast, match
from training.run.state import initialise
from training.settings import PretrainSettings

PARTS = ("decode, crop", "augment", "backbone", "references", "match", "project", "loss", "backward", "update")


class Clock:
    """Times of every part over several steps, and the peak of memory in one step that is not timed."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.megabytes: dict[str, float] = {}
        self.looks_at_memory = True

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if self.looks_at_memory:
            with peak_memory(self.device) as peak:
                yield
            self.megabytes[part] = peak.megabytes
            return
        start = time.perf_counter()
        yield
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.seconds[part].append(time.perf_counter() - start)

    def total(self) -> float:
        """The sum of the medians of all parts but decoding, which workers do beside the step."""
        return sum(median(self.seconds[part]) for part in PARTS[1:])


class Bench:
    """One batch, its references, and both ways of computing a step from them."""

    def __init__(
        self,
        backbone: str,
        folder: Path,
        batch_size: int,
        references: int,
        tokens: int,
        precision: str,
        device: str = "cpu",
    ) -> None:
        self.device, self.precision = device, precision
        self.extractor = ADPretrainFeatureExtractor.from_backbone(backbone, num_reference_tokens=tokens, device="cpu")
        initialise(self.extractor.projectors, 1.0)  # new ones are the identity, which any computation gets right
        self.projectors = self.extractor.to(device).projectors.requires_grad_()
        dataset = load_real_iad(synthetic.generate(folder / "data", categories=2, normals=8), resolution="256")
        pool = ReferencePool(*(dataset[name] for name in ("category", "view", "is_good")))
        settings = PretrainSettings(plain_first=True)
        self.samples = Samples(dataset, range(len(dataset)), self.extractor.config, pool, settings)
        normals = [n for n, anomalous in enumerate(dataset["is_anomalous"]) if not anomalous]
        anomalous = [n for n in range(len(dataset)) if n not in normals]
        positions = [*anomalous[: batch_size // 2], *normals[: batch_size - batch_size // 2]]
        self.items = [Item(position, 0, references) for position in positions]
        keys, file = list(map(str, range(len(dataset)))), folder / "references.bin"
        self.patches = ReferencePatches(
            self.extractor, self.samples.load_normal, pool, keys, file=file, precision=precision
        )
        self.members = pool.members
        self.collate = functools.partial(collate, "coverage", self.extractor.config.patch_size)
        self.centers = torch.zeros(len(self.extractor.config.layers), self.extractor.config.hidden_size, device=device)

    def cached(self, clock: Clock) -> float:
        """One step as the training program makes it."""
        scales = [1.0] * len(self.centers)
        return self._step(
            clock, self.projectors, self.patches.gather, lambda tokens, patches: match(tokens, patches, scales)
        )

    def released(self, clock: Clock, *, need_weights: bool = True) -> float:
        """The same step as the released code makes it; see ``PublishedProjectors`` for ``need_weights``."""

        def encode_anew(references: Tensor) -> list[list[Tensor]]:
            positions = [self.members[place] for place in references.flatten().tolist()]
            images = torch.stack([self.samples.load_normal(position) for position in positions])
            with autocast(self.extractor.device, self.precision):
                return [encode_references(self.extractor.encode, part) for part in images.chunk(len(references))]

        def match_each(tokens: list[Tensor], references: list[list[Tensor]]) -> list[Tensor]:
            images = len(references)
            return [
                torch.cat(
                    [published_residual(maps[n : n + 1], references[n % images][level]) for n in range(len(maps))]
                )
                for level, maps in enumerate(tokens)
            ]

        return self._step(clock, PublishedProjectors(self.projectors, need_weights), encode_anew, match_each)

    def _step(self, clock: Clock, projectors: Any, look_up: Callable[..., Any], find: Callable[..., Any]) -> float:
        optimizer = torch.optim.Adam(self.projectors.parameters(), lr=0.0)
        config, device = self.extractor.config, self.extractor.device
        with clock("decode, crop"):
            batch = self.collate([self.samples[item] for item in self.items])
        with clock("augment"):
            views = augment(batch.images.to(device), batch.augmentations.to(device))
        with clock("backbone"), torch.no_grad(), autocast(device, self.precision):
            tokens = self.extractor.encode(normalize(views, config.mean, config.std))
        with clock("references"):
            patches = look_up(batch.references)
        with clock("match"), torch.no_grad():
            residuals = find(tokens, patches)
        with clock("project"), autocast(device, self.precision):
            features = projectors(residuals)
        with clock("loss"):
            angle, norm = level_losses(features, batch.labels, self.centers)
            loss = angle + norm
        with clock("backward"):
            loss.backward()
        with clock("update"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def report(clocks: dict[str, Clock]) -> str:
    """The steps side by side, as a Markdown table: seconds, and megabytes above what was in use before the part."""
    lines = [f"| part of a step | {' | '.join(clocks)} |", "|---" * (1 + len(clocks)) + "|"]
    for part in PARTS:
        cells = (f"{median(clock.seconds[part]):.2f} s, {clock.megabytes[part]:.0f} MB" for clock in clocks.values())
        lines.append(f"| {part} | {' | '.join(cells)} |")
    ours, *others = (clock.total() for clock in clocks.values())
    totals = [f"{ours:.2f} s", *(f"{other:.2f} s, {other / ours:.1f} times ours" for other in others)]
    return "\n".join([*lines, f"| all but decoding | {' | '.join(totals)} |"])


def time_steps(bench: Bench, repeats: int) -> tuple[dict[str, Clock], dict[str, float]]:
    """The clock and the loss of every way to make a step."""
    steps: dict[str, Callable[[Clock], float]] = {
        "ours": bench.cached,
        "released form": bench.released,
        "released form, fused attention": functools.partial(bench.released, need_weights=False),
    }
    clocks = {name: Clock(bench.device) for name in steps}
    for _ in range(1 + repeats):  # the first is for the memory
        losses = {name: step(clocks[name]) for name, step in steps.items()}
        for clock in clocks.values():
            clock.looks_at_memory = False
    return clocks, losses


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="facebook/dinov2-small")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--references", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        sizes = args.batch_size, args.references, args.tokens
        bench = Bench(args.backbone, Path(folder), *sizes, args.precision, args.device)
        clocks, losses = time_steps(bench, args.repeats)
    print(", ".join(f"loss of {name}: {loss:.6f}" for name, loss in losses.items()))
    print(report(clocks))


if __name__ == "__main__":
    main()
