import pytest
import torch
from torch import nn

from dk_detection.layers import DeformConv2d
from dk_detection.visualization import DilationTable, effective_dilation, observe
from dk_detection.visualization.dilation import CLASSES, classify_positions, thirds


def seen(offset_groups=1, scale=0.0, **options):
    network = nn.Sequential(
        nn.Conv2d(2, 2, 3, stride=2, padding=1), DeformConv2d(2, 2, 3, offset_groups=offset_groups, **options)
    )
    if scale:  # taps move away from the middle one by `scale` of their distance
        rest = torch.tensor([[y, x] for y in (-1.0, 0, 1) for x in (-1.0, 0, 1)])
        with torch.no_grad():
            network[1].conv_offset.bias.view(offset_groups, 9, 2)[-1] = scale * rest
    return observe(network.eval(), torch.rand(1, 2, 32, 40), "1")


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_a_resting_layer_has_its_dilation(dilation):
    values = effective_dilation(seen(padding=dilation, dilation=dilation).path[0])
    assert values.shape == (1, 16, 20)
    assert torch.equal(values, torch.full((1, 16, 20), dilation, dtype=torch.float64))


def test_taps_that_move_apart_by_half_have_one_and_a_half_times_the_dilation():
    values = effective_dilation(seen(offset_groups=2, scale=0.5, padding=1).path[0])
    assert torch.allclose(values[0], torch.ones(16, 20, dtype=torch.float64))
    assert torch.allclose(values[1], torch.full((16, 20), 1.5, dtype=torch.float64))


def test_a_position_belongs_to_the_smallest_object_around_it():
    boxes = torch.tensor([[0.0, 0, 40, 40], [0, 0, 12, 12], [4, 4, 6, 6]])
    centers = torch.tensor([[5.0, 5], [8, 8], [30, 30], [40, 20], [50, 5]])
    names = [CLASSES[i] for i in classify_positions(centers, boxes, (10, 200))]
    assert names == ["small", "medium", "large", "background", "background"]
    assert set(classify_positions(centers, boxes[:0], (10, 200)).tolist()) == {CLASSES.index("background")}


def test_the_table_tells_mean_deviation_and_number_by_size():
    table = DilationTable((100.0, 500.0))
    table.add(seen(padding=1), torch.tensor([[0.0, 0, 8, 8]]))
    table.add(seen(padding=1, scale=1.0), torch.tensor([[0.0, 0, 8, 8], [20, 0, 40, 32]]), size=(32, 36))
    rows = table.rows()["1"]
    assert rows["small"] == {"mean": pytest.approx(1.5), "std": pytest.approx(0.5), "count": 2 * 16}
    # Positions every 2 pixels: columns 20 to 35 of 36 are image, and 40 - 36 are padding.
    assert rows["large"] == {"mean": pytest.approx(2), "std": pytest.approx(0, abs=1e-6), "count": 8 * 16}
    assert "medium" not in rows


def test_thirds_part_objects_into_equally_large_classes():
    low, high = thirds([float(i) for i in range(90)])
    assert [sum(i <= low for i in range(90)), sum(i > high for i in range(90))] == [30, 30]
