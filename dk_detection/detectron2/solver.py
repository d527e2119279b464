"""Learning-rate factors of single parameters."""

from collections.abc import Mapping


class LearningRateFactors:
    """The `lr_factor_func` of `get_default_optimizer_params`: a factor for parameters by their names.

    In a LazyConfig::

        optimizer.params.base_lr = "${..lr}"
        optimizer.params.lr_factor_func = L(LearningRateFactors)(factors={"conv_offset": 0.1})

    Args:
        factors: From a part of the name to the factor. Of several parts that a name contains the longest counts.
    """

    def __init__(self, factors: Mapping[str, float]) -> None:
        self.factors = dict(factors)

    def __call__(self, name: str) -> float:
        """The factor of the parameter `name`; 1 where no part is in it."""
        return self.factors[max(found, key=len)] if (found := [part for part in self.factors if part in name]) else 1.0
