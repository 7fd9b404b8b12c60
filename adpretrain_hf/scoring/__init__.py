"""Features -> anomaly maps and scores."""

from adpretrain_hf.scoring.maps import (
    SIGMA,
    AnomalyScores,
    ScoredImage,
    anomaly_map,
    feature_norm,
    gaussian_smooth,
    maps_of,
    place_map,
    score_batch,
)
