"""The test backends themselves: see tests/ops/suite.py."""

import pytest
import torch


def test_lock_step_adds_up_as_a_warp_does():
    # In a butterfly: first over lanes 16 apart, then 8, ... in float32, which a plain sum in double would not repeat.
    torch.manual_seed(0)
    values = torch.randn(7, 32) * 10 ** torch.linspace(-4, 4, 32)
    expected = values
    for step in (16, 8, 4, 2, 1):
        expected = expected + expected[:, torch.arange(32) ^ step]
    assert torch.equal(torch.ops.dk_detection._lock_step_sum(values, -1), expected)


@pytest.mark.parametrize("absent", (0, 5, 31))
def test_lock_step_notices_a_lane_that_misses_a_sum(absent):
    with pytest.raises(RuntimeError, match=r"lock step: lane .* is not at the sum that lane 0 is at"):
        torch.ops.dk_detection._lock_step_sum(torch.ones(5, 32), absent)
