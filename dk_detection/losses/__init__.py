"""Training objectives that belong to no framework: `feature_mimicking`."""

from dk_detection.losses.feature_mimicking import FeatureMimicking

__all__ = ["FeatureMimicking"]
