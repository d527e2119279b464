"""The pooling of R-FCN and its vote, against hand-computed cases."""

import pytest
import torch
from torch import nn

from dk_detection.layers import RFCNPool
from dk_detection.layers.rfcn_pool import vote
from dk_detection.ops import deform_psroi_pool

ROIS = torch.tensor([[0.0, 0, 0, 11, 11], [1, 2, 3, 9, 14], [0, 4, 4, 20, 9]])


def make(**options):
    return RFCNPool(3, 5, 2 + 4, 0.5, **options)


def wake(layer):
    for pool in (layer.score, layer.box):
        nn.init.normal_(pool.conv_offset.weight)
    return layer


def test_each_bin_reads_its_own_map():
    """Position-sensitive assignment: each map holds its own number, so that a bin shows which one it read."""
    layer = RFCNPool(3, 1, 2 + 4, deform=False)
    for pool, maps in ((layer.score, 2 * 9), (layer.box, 4 * 9)):
        nn.init.zeros_(pool.conv_score.weight)
        pool.conv_score.bias.data = torch.arange(float(maps))
    pooled = layer(torch.rand(1, 1, 12, 12), torch.tensor([[0.0, 0, 0, 11, 11]]))
    scores = torch.arange(18.0).view(2, 3, 3)  # class c, bin (i, j): 9 c + 3 i + j
    deltas = torch.arange(36.0).view(4, 3, 3)
    torch.testing.assert_close(pooled, torch.cat([scores, deltas])[None])
    by_class, boxes = vote(pooled)
    assert by_class.tolist() == [[4, 13]]  # the means of 0 to 8 and of 9 to 17
    assert boxes.tolist() == [[4, 13, 22, 31]]


def test_scores_and_boxes_have_offsets_of_their_own():
    layer, input = wake(make(samples_per_part=2, gamma=0.3)), torch.rand(2, 5, 9, 12)
    options = dict(spatial_scale=0.5, group_size=3, samples_per_part=2)
    expected = []
    for pool, channels, classes in ((layer.score, 2, 2), (layer.box, 4, 1)):
        offset = deform_psroi_pool(pool.conv_offset(input), ROIS, 3, output_channels=2 * classes, **options)
        expected.append(
            deform_psroi_pool(
                pool.conv_score(input), ROIS, 3, offset=offset, output_channels=channels, gamma=0.3, **options
            )
        )
    pooled = layer(input, ROIS)
    torch.testing.assert_close(pooled, torch.cat(expected, 1))
    pooled.square().sum().backward()
    assert all(p.grad.count_nonzero() > 0 for p in layer.parameters())


def test_it_starts_as_the_rigid_one():
    layer, rigid, input = make(), make(deform=False), torch.rand(2, 5, 9, 12)
    left_out = layer.load_state_dict(rigid.state_dict(), strict=False)
    assert [key for key in left_out.missing_keys if "conv_offset" not in key] == left_out.unexpected_keys == []
    torch.testing.assert_close(layer(input, ROIS), rigid(input, ROIS))


def test_no_rois():
    layer = make()
    scores, boxes = vote(layer(torch.rand(2, 5, 9, 12), ROIS[:0]))
    assert scores.shape == (0, 2) and boxes.shape == (0, 4)
    (scores.sum() + boxes.sum()).backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_wrong_channels():
    with pytest.raises(ValueError, match="RFCNPool: output_channels must be the number of classes and 4, got 4"):
        RFCNPool(3, 5, 4)


def test_the_papers_step_of_parameters():
    """Table 4 of Deformable ConvNets, 47.1M to 49.5M: what the branches of conv5 leave of it, 2.4 - 0.25."""
    count = [
        sum(p.numel() for p in RFCNPool(7, 1024, 20 + 1 + 4, deform=deform, device="meta").parameters())
        for deform in (True, False)
    ]
    assert (count[0] - count[1]) / 1e6 == pytest.approx(2.4 - 0.25, abs=0.1)
