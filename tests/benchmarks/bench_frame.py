"""How long a warm extractor takes for one frame of a camera, from the array to the map and the decision.

python -m tests.benchmarks.bench_frame
"""

from __future__ import annotations

import numpy as np

from adpretrain_hf import ADPretrainFeatureExtractor
from tests.benchmarks.rows import Row, main
from tests.benchmarks.timing import side_by_side

BUNDLE = "hub_cards/adpretrain-dinov2-small"
NORMAL = "tests/photos/gravel/train/good"


def measure(device: str) -> list[Row]:
    """One frame of 640 x 480 at 224 px, 8 references, against the backbone alone on the prepared frame."""
    extractor = ADPretrainFeatureExtractor.from_pretrained(BUNDLE, image_size=224, device=device)
    extractor.set_reference(NORMAL, calibrate=True)
    frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    prepared = extractor.preprocess(frame)
    score, backbone = side_by_side(
        lambda: extractor.score(frame).is_anomalous(), lambda: extractor.encode(prepared), repeats=10
    )
    ours, other = f"{1000 * score:.0f} ms", f"bare backbone: {1000 * backbone:.0f} ms"
    return [Row("score of a frame of 640 x 480, the embedded bundle", ours, other, score / backbone)]


if __name__ == "__main__":
    main(measure, __doc__)
