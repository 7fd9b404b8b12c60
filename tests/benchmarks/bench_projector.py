"""One projector against the published computation of it.

python -m tests.benchmarks.bench_projector
"""

from __future__ import annotations

import torch

from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.projector import Projectors
from tests.benchmarks.peak_memory import peak_memory
from tests.benchmarks.published import PublishedProjectors
from tests.benchmarks.rows import Row, at_least, at_most, main
from tests.benchmarks.timing import side_by_side
from training.run.state import initialise


@torch.no_grad()
def measure(device: str) -> list[Row]:
    """Time, memory and difference for a batch of 8 at C = 1024."""
    torch.manual_seed(0)
    config = ADPretrainConfig.preset("dinov2-large").replace(layers=(24,), residual_scale=(1.0,))
    ours = Projectors(config).requires_grad_(False)
    initialise(ours, 1.0)
    ours = ours.to(device)
    forms = {
        "ours": ours,
        "published": PublishedProjectors(ours),
        "published, fused attention": PublishedProjectors(ours, need_weights=False),
    }
    residuals = [torch.randn(8, 1024, 16, 16, device=device)]
    seconds = dict(zip(forms, side_by_side(*(lambda f=f: f(residuals) for f in forms.values())), strict=True))
    megabytes = {name: _peak(form, residuals) for name, form in forms.items()}
    own, published, fused = seconds.values()
    difference = max(float((ours(residuals)[0] - form(residuals)[0]).abs().max()) for form in forms.values())
    what = "projector, C = 1024, batch 8, float32"
    return [
        at_least(4, what, f"{own:.2f} s", f"published: {published:.2f} s", published / own),
        Row(what, f"{own:.2f} s", f"published, fused attention: {fused:.2f} s", fused / own),
        at_most(1e-5, "its output", "", "published: largest difference", difference),
        at_most(
            1 / 3,
            "its peak memory",
            f"{megabytes['ours']:.0f} MB",
            f"published: {megabytes['published']:.0f} MB",
            megabytes["ours"] / megabytes["published"],
        ),
    ]


def _peak(form: torch.nn.Module, residuals: list[torch.Tensor]) -> float:
    with peak_memory(residuals[0].device) as peak:
        form(residuals)
    return peak.megabytes


if __name__ == "__main__":
    main(measure, __doc__)
