"""Features -> anomaly maps and scores."""

from adpretrain_hf.scoring.maps import (
    SIGMA,
    AnomalyScores,
    ScoredImage,
    anomaly_map,
    blend_windows,
    feature_norm,
    gaussian_smooth,
    place_map,
    score_batch,
    score_images,
)
