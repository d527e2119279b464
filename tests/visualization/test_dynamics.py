import pytest
import torch
from torch import nn

from dk_detection.errors import UserError
from dk_detection.layers import CondConv2d, DeformConv2d, GlobalDeformKernel2d
from dk_detection.visualization import embed, listening, nearest_neighbour_figures, object_dynamics
from dk_detection.visualization.dynamics import dynamics_of, size_deciles


def test_an_object_has_the_mean_offset_inside_its_box():
    network = nn.Sequential(DeformConv2d(1, 1, 1, stride=2)).eval()
    with torch.no_grad():
        network[0].conv_offset.weight[0] = 1
    image = torch.zeros(1, 1, 16, 20)
    image[..., 4:8, 8:16] = 5
    with listening(network) as calls:
        network(image)
    boxes = torch.tensor([[8.0, 4, 16, 8], [0, 0, 4, 4], [8, 0, 16, 8], [19, 15, 20, 16]])
    values = dynamics_of(calls[0])
    assert object_dynamics(values, boxes, (16, 20)).tolist() == [[5, 0], [0, 0], [2.5, 0], [0, 0]]
    assert object_dynamics(values, boxes[:0], (16, 20)).shape == (0, 2)


@pytest.mark.parametrize(("layer", "size"), [(GlobalDeformKernel2d, 18), (CondConv2d, 8)])
def test_a_layer_with_one_kernel_an_image_has_one_vector(layer, size):
    network = nn.Sequential(layer(1, 1, 3)).eval()
    with listening(network) as calls:
        network(torch.rand(1, 1, 9, 9))
    assert dynamics_of(calls[0]).shape == (size,)


def test_deciles_are_those_of_the_rank():
    areas = torch.tensor([5.0, 1e6, 3, 4]).repeat_interleave(5) + torch.arange(20) * 1e-3
    deciles = size_deciles(areas)
    assert deciles.bincount().tolist() == [2] * 10
    assert set(deciles[5:10].tolist()) == {7, 8, 9}


def test_neighbours_predict_what_the_vectors_hold():
    torch.manual_seed(0)
    n = 200
    labels, areas = torch.randint(4, (n,)), torch.rand(n)
    constant = torch.ones(n, 1)  # a dimension that tells nothing
    by_size = nearest_neighbour_figures(torch.cat([areas[:, None], constant], 1), labels, areas)
    by_class = nearest_neighbour_figures(nn.functional.one_hot(labels) + 1e-3 * torch.rand(n, 4), labels, areas)
    assert by_size.decile_accuracy > 0.9 > 0.4 > by_size.class_accuracy
    assert by_size.decile_error < 0.1
    assert by_class.class_accuracy == 1
    assert by_class.decile_accuracy < 0.2
    assert by_size.class_chance == pytest.approx(0.25, abs=0.02)
    assert by_size.decile_chance == pytest.approx(19 / 199)
    assert by_size.decile_error_chance == pytest.approx(3.3, abs=0.05)


def test_the_embedding_keeps_groups_apart():
    pytest.importorskip("sklearn")
    groups = torch.arange(2).repeat_interleave(20)
    points = embed(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) + 20 * groups[:, None])
    assert points.shape == (40, 2)
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    assert torch.equal(groups[distances.argmin(1)], groups)


@pytest.mark.parametrize(
    ("vectors", "message"), [(torch.rand(1, 3), "at least two objects, got 1"), (torch.ones(5, 3), "learned nothing")]
)
def test_nothing_to_compare(vectors, message):
    with pytest.raises(UserError, match=message):
        nearest_neighbour_figures(vectors, torch.zeros(len(vectors)), torch.ones(len(vectors)))
