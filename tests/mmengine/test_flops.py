"""MMEngine's analysis counts our operators by the same rules as torch's counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmengine.analysis import FlopAnalyzer

import dk_detection.mmdet  # noqa: F401  (registers the handles)
from dk_detection.layers import DeformRoIPool, ModulatedDeformRoIPool


@pytest.mark.parametrize("layer_class", [DeformRoIPool, ModulatedDeformRoIPool])
@pytest.mark.parametrize(("ratio", "samples"), [(0, 4), (2, 4), (3, 9)])
def test_pooling(layer_class, ratio, samples):
    layer = layer_class(3, 4, deform_fc_channels=8, sampling_ratio=ratio).eval()
    maps, rois = torch.rand(1, 4, 16, 16), torch.tensor([[0.0, 1, 1, 9, 9], [0, 2, 2, 12, 14]])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(maps, rois)
    with torch.no_grad():
        analysis = FlopAnalyzer(layer, (maps, rois))
        pooling = analysis.by_operator()["deform_roi_pool"]
    values = 2 * 4 * 3 * 3  # of each of the two poolings
    assert pooling == 2 * values * samples * 2 + (values if layer_class is ModulatedDeformRoIPool else 0)
    assert analysis.total() * 2 == counter.get_total_flops()
