"""The drawing of Fig. 2 of Differentiable Kernel Evolution shows what the paper says."""

import pytest
import torch

from docs.search_path import NEAR, START, detour, search, steps_to


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2])
def test_the_gaussian_reaches_the_optimum_in_fewer_steps(rate):
    gaussian, bilinear = (search(name, rate=rate) for name in ("gaussian", "bilinear"))
    assert gaussian[0].tolist() == bilinear[0].tolist() == list(START)
    assert steps_to(gaussian) < 60
    assert gaussian[-1].norm() < 1e-3
    assert steps_to(bilinear) is None or steps_to(bilinear) > steps_to(gaussian)
    assert bilinear[-20:].norm(dim=1).max() > NEAR  # it moves back and forth across the optimum
    assert detour(gaussian) < 1e-9 < 0.05 < detour(bilinear)


def test_measures_of_a_path():
    there = torch.tensor([[-1.0, 0.0], [-0.5, 0.2], [0.01, 0.0], [0.2, 0.0]], dtype=torch.float64)
    assert detour(there) == pytest.approx(0.2)
    assert steps_to(there) is None
    assert steps_to(torch.cat([there, 0 * there[:1].expand(21, -1)])) == 4
