import pytest
import torch
from torch import nn
from torchvision.ops import roi_align

from dk_detection.layers import DeformPSRoIPool, DeformRoIPool, ModulatedDeformRoIPool
from dk_detection.ops import deform_psroi_pool, deform_roi_pool

ROIS = torch.tensor([[1, 1.3, 2.1, 8.2, 14.9], [0, -2.7, 3.3, 9.1, 9.4], [1, 10.2, 0.4, 19.7, 17.6]])
LAYERS = (DeformRoIPool, ModulatedDeformRoIPool)
layers = pytest.mark.parametrize("layer_class", LAYERS)
branches = pytest.mark.parametrize("branch", ("paper", "mmcv"))


def make(layer_class, **options):
    options = {"output_size": (3, 2), "output_channels": 5, "deform_fc_channels": 16, "spatial_scale": 0.5} | options
    return layer_class(**options)


def make_ps(**options):
    options = {"output_size": 3, "in_channels": 5, "output_channels": 4, "spatial_scale": 0.5} | options
    return DeformPSRoIPool(**options)


BUILDS = {
    "v1": lambda: make(DeformRoIPool),
    "v1-mmcv": lambda: make(DeformRoIPool, branch="mmcv"),
    "v2": lambda: make(ModulatedDeformRoIPool),
    "v2-mmcv": lambda: make(ModulatedDeformRoIPool, branch="mmcv"),
    "ps": make_ps,
}
builds = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


def maps(**options):
    return torch.randn(2, 5, 9, 11, **options)


def wake(layer):
    """Gives a layer that has learned something."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@branches
@layers
@pytest.mark.parametrize("ratio", (0, 2))
def test_at_rest_it_is_aligned_roi_pooling(layer_class, branch, ratio):
    layer, input = make(layer_class, branch=branch, sampling_ratio=ratio), maps()
    expected = roi_align(input, ROIS, (3, 2), 0.5, ratio or -1, aligned=True)
    modulation = 0.5 if layer_class is ModulatedDeformRoIPool else 1
    torch.testing.assert_close(layer(input, ROIS), modulation * expected)


@pytest.mark.parametrize(
    ("layer_class", "branch", "shapes"),
    [
        (DeformRoIPool, "paper", {"offset_fc.0": (12, 30)}),
        (DeformRoIPool, "mmcv", {"offset_fc.0": (16, 30), "offset_fc.2": (16, 16), "offset_fc.4": (12, 16)}),
        (ModulatedDeformRoIPool, "paper", {"offset_fc.0": (16, 30), "offset_fc.2": (18, 16)}),
        (
            ModulatedDeformRoIPool,
            "mmcv",
            {
                "offset_fc.0": (16, 30), "offset_fc.2": (16, 16), "offset_fc.4": (12, 16),
                "mask_fc.0": (16, 30), "mask_fc.2": (6, 16),
            },
        ),
    ],
)  # fmt: skip
def test_branches(layer_class, branch, shapes):
    expected = {f"{name}.weight": shape for name, shape in shapes.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    state = make(layer_class, branch=branch).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


def test_default_branch_has_the_papers_width():
    # 7 x 7 bins of 256 channels: v1 one layer to 2 * 49, v2 1024 features and 3 * 49.
    with torch.device("meta"):
        v1, v2 = (layer(7, 256) for layer in LAYERS)
    assert sum(p.numel() for p in v1.parameters()) == (256 * 49 + 1) * 98
    assert sum(p.numel() for p in v2.parameters()) == (256 * 49 + 1) * 1024 + 1025 * 147


def test_branch_output_is_x_then_y_then_modulation():
    layer, input = wake(make(ModulatedDeformRoIPool, gamma=0.3)), maps()
    options = {"spatial_scale": 0.5, "gamma": 0.3}
    pooled = deform_roi_pool(input, ROIS, (3, 2), **options)
    values = layer.offset_fc(pooled.flatten(1))
    offset, mask = values[:, :12].view(3, 2, 3, 2), values[:, 12:].view(3, 3, 2).sigmoid()
    expected = deform_roi_pool(input, ROIS, (3, 2), offset=offset, mask=mask, **options)
    torch.testing.assert_close(layer(input, ROIS), expected)


@layers
def test_branch_size(layer_class):
    layer, input = wake(make(layer_class, branch_size=(2, 4))), maps()
    assert layer.offset_fc[0].in_features == 5 * 2 * 4
    assert layer.offset_fc[-1].out_features == 6 * (3 if layer_class is ModulatedDeformRoIPool else 2)
    offset, mask = layer._offset_and_mask(deform_roi_pool(input, ROIS, (2, 4), spatial_scale=0.5).flatten(1))
    if mask is not None:
        mask = mask.view(3, 3, 2)
    expected = deform_roi_pool(input, ROIS, (3, 2), offset=offset.view(3, 2, 3, 2), mask=mask, spatial_scale=0.5)
    torch.testing.assert_close(layer(input, ROIS), expected)


@builds
def test_scale_of_a_call(build):
    layer, input = wake(build()), maps()
    output = layer(input, ROIS, spatial_scale=0.25)
    assert not torch.allclose(output, layer(input, ROIS))
    layer.spatial_scale = 0.25
    torch.testing.assert_close(output, layer(input, ROIS))


@pytest.mark.parametrize(
    ("layer_class", "name"),
    [(DeformRoIPool, "DeformRoIPoolPack"), (ModulatedDeformRoIPool, "ModulatedDeformRoIPoolPack")],
)
def test_checkpoints_of_mmcv(layer_class, name):
    ops = pytest.importorskip("mmcv.ops")
    theirs = wake(getattr(ops, name)((3, 2), 5, deform_fc_channels=16, spatial_scale=0.5, sampling_ratio=2))
    ours = make(layer_class, branch="mmcv", sampling_ratio=2)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())

    # What mmcv's forward does with its branches; its kernels do not run on a CPU.
    input = maps()
    pooled = deform_roi_pool(input, ROIS, (3, 2), spatial_scale=0.5, sampling_ratio=2).flatten(1)
    offset = theirs.offset_fc(pooled).view(3, 2, 3, 2)
    expected = deform_roi_pool(input, ROIS, (3, 2), offset=offset, spatial_scale=0.5, sampling_ratio=2)
    if layer_class is ModulatedDeformRoIPool:
        expected = expected * theirs.mask_fc(pooled).view(3, 1, 3, 2)
    torch.testing.assert_close(ours(input, ROIS), expected)


@branches
@layers
def test_every_parameter_learns(layer_class, branch):
    layer, input = make(layer_class, branch=branch, gamma=1.0), maps()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):  # the layers under a zero one get their first gradient after its first step
        optimizer.zero_grad()
        layer(input, ROIS).square().sum().backward()
        optimizer.step()
    assert all(p.grad.count_nonzero() > 0 for p in layer.parameters())


@branches
@layers
def test_gradcheck(layer_class, branch):
    layer = wake(make(layer_class, branch=branch, dtype=torch.float64, sampling_ratio=2))
    input = maps(dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, ROIS)),
        (input, *parameters),
        fast_mode=True,
    )


@builds
def test_no_rois_keep_every_parameter_in_the_graph(build):
    # Otherwise a process of distributed training that sees no RoI would wait for the others for ever.
    layer, input = build(), maps(requires_grad=True)
    output = layer(input, torch.zeros(0, 5))
    assert output.shape == (0, layer.output_channels, *layer.output_size)
    output.sum().backward()
    for tensor in (input, *layer.parameters()):
        assert tensor.grad is not None and tensor.grad.count_nonzero() == 0


@layers
def test_memory_formats(layer_class):
    layer, input = wake(make(layer_class)), maps()
    last = input.contiguous(memory_format=torch.channels_last)
    output, output_last = layer(input, ROIS), layer(last, ROIS)
    torch.testing.assert_close(output, output_last)
    assert output.is_contiguous() and output_last.is_contiguous(memory_format=torch.channels_last)


@builds
def test_autocast(build):
    layer, input = wake(build()), maps()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(input, ROIS)
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


def rest(layer, input):
    """What a layer with a branch of zeros gives."""
    if isinstance(layer, DeformPSRoIPool):
        scores = layer.conv_score(input)
        return deform_psroi_pool(scores, ROIS, 3, spatial_scale=0.5, output_channels=4, group_size=3)
    pooled = deform_roi_pool(input, ROIS, (3, 2), spatial_scale=0.5)
    return pooled / 2 if isinstance(layer, ModulatedDeformRoIPool) else pooled


@builds
def test_torch_fx(build):
    layer, input = build(), maps()
    wake(layer)
    traced = torch.fx.symbolic_trace(layer, concrete_args={"spatial_scale": None})
    assert torch.equal(traced(input, ROIS), layer(input, ROIS))
    assert torch.equal(traced(input, ROIS[:1]), layer(input, ROIS[:1]))


@builds
def test_reset_brings_back_rest(build):
    layer, input = build(), maps()
    wake(layer)
    assert not torch.allclose(layer(input, ROIS), rest(layer, input))
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    torch.testing.assert_close(layer(input, ROIS), rest(layer, input))


def test_rest_survives_mmengine():
    mmengine = pytest.importorskip("mmengine.model")
    model = mmengine.BaseModule(init_cfg=[dict(type="Xavier", layer=["Linear", "Conv2d"], bias=3.0)])
    model.pool, model.listed = make(ModulatedDeformRoIPool), nn.ModuleList([make(ModulatedDeformRoIPool)])
    model.ps, model.other = make_ps(), nn.Linear(3, 3)
    model.init_weights()
    assert model.other.bias.tolist() == [3.0] * 3
    for pool in (model.pool, *model.listed):
        assert pool.offset_fc[0].bias[0] == 3  # it did go over them
        assert pool.offset_fc(torch.rand(2, 30)).count_nonzero() == 0
    assert model.ps.conv_offset.weight.count_nonzero() == model.ps.conv_offset.bias.count_nonzero() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branch": "none"}, "branch must be 'paper' or 'mmcv', got 'none'"),
        ({"output_channels": 0}, "output_channels must be at least 1, got 0"),
        ({"deform_fc_channels": 0}, "deform_fc_channels must be at least 1, got 0"),
        ({"output_size": 0}, "output_size must be at least 1, got 0"),
        ({"branch_size": 0}, "branch_size must be at least 1, got 0"),
    ],
)
@layers
def test_wrong_arguments(layer_class, options, message):
    with pytest.raises(ValueError, match=f"{layer_class.__name__}: {message}"):
        make(layer_class, **options)


def test_wrong_channels():
    with pytest.raises(ValueError, match="DeformRoIPool: input has 4 channels, expected output_channels=5"):
        make(DeformRoIPool)(torch.rand(2, 4, 9, 11), ROIS)


def test_repr():
    expected = "output_size=(3, 2), output_channels=5, spatial_scale=0.5, sampling_ratio=0, gamma=0.1, branch='paper'"
    assert expected in repr(make(DeformRoIPool))
    assert "output_size=(3, 3), output_channels=4, spatial_scale=0.5, group_size=3" in repr(make_ps())


@pytest.mark.parametrize("classes", (1, 2))
def test_position_sensitive_layer(classes):
    layer, input = make_ps(part_size=2, num_classes=classes, gamma=0.3, samples_per_part=2), maps()
    options = {"spatial_scale": 0.5, "group_size": 3, "part_size": (2, 2), "samples_per_part": 2}
    scores = layer.conv_score(input)
    rest = deform_psroi_pool(scores, ROIS, 3, output_channels=4, **options)
    assert layer(input, ROIS).shape == (3, 4, 3, 3)
    torch.testing.assert_close(layer(input, ROIS), rest)

    wake(layer.conv_offset)
    offset = deform_psroi_pool(layer.conv_offset(input), ROIS, 2, output_channels=2 * classes, **options)
    expected = deform_psroi_pool(scores, ROIS, 3, offset=offset, output_channels=4, gamma=0.3, **options)
    output = layer(input, ROIS)
    torch.testing.assert_close(output, expected)
    assert (output - rest).abs().max() > 0.01
    output.square().sum().backward()
    assert all(p.grad.count_nonzero() > 0 for p in layer.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_size": (3, 2)}, r"group_size must be given if output_size is not square, got \(3, 2\)"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"num_classes": 3}, "num_classes must be positive and divide output_channels, got num_classes=3"),
        ({"part_size": 0}, "part_size must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_of_the_position_sensitive_layer(options, message):
    with pytest.raises(ValueError, match=f"DeformPSRoIPool: {message}"):
        make_ps(**options)
