"""Features -> anomaly maps, scores and decisions."""

from adpretrain_hf.scoring.decision import BY_MAXIMUM, Calibration, Judgement, of_product, rank_of_threshold, required
from adpretrain_hf.scoring.interest import Area, encode_region, region_mask
from adpretrain_hf.scoring.maps import (
    SIGMA,
    AnomalyScores,
    MapStack,
    ScoredImage,
    anomaly_map,
    blend_windows,
    feature_norm,
    gaussian_smooth,
    place_map,
    score_images,
)
from adpretrain_hf.scoring.regions import Region, find_regions, mark_regions
