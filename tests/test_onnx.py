"""Operators, layers and networks in ONNX: files that the checker accepts, and ONNX Runtime's outputs beside ours."""

import pytest
import torch
from torch import nn
from torch.export import Dim

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript", reason="torch's exporter needs it")

import onnx
import onnxruntime

from dk_detection import ops
from dk_detection.backbones import MobileNetV2, ResNetDW
from dk_detection.config_files import shipped
from dk_detection.layers._base import ZeroConv2d, ZeroLinear
from dk_detection.layers.table import TABLE
from dk_detection.onnx import decompositions
from tests.networks import MOBILENET_V2, RESNET_DW, deformed, exchange_in, settled

# Of float32 sums in another order; through a network its layers amplify them.
CLOSE = dict(rtol=1e-4, atol=1e-5)
CLOSE_NETWORK = dict(rtol=1e-3, atol=1e-4)

CONVOLUTIONS = [row for row in TABLE if row.kind == "conv"]
# Corners off the map, an empty RoI, an inverted one, a side that bins divide into whole pixels but for rounding.
ROIS = torch.tensor(
    [[0, 1.0, 2, 20, 30], [1, -4, -8, 60, 70], [1, 10, 10, 10, 10], [1, 20, 9, 4, 2], [0, 10.1, 10.2, 24.1, 24.2]]
)
SIZES = dict(batch=Dim("batch"), height=Dim("height", min=5), width=Dim("width", min=5), rois=Dim("rois", min=0))


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function, modules=None):
        super().__init__()
        self.function, self.of_function = function, modules

    def forward(self, *tensors):
        return self.function(*tensors)


def learned(module):
    """As after training: branches that move something."""
    for branch in module.modules():
        if isinstance(branch, (ZeroConv2d, ZeroLinear)):
            nn.init.normal_(branch.weight, std=0.3 / branch.weight[0].numel() ** 0.5)
            nn.init.normal_(branch.bias, std=0.5)
    return module.eval()


def dynamic(*names):
    """Names of the sizes of a tensor, or None, as torch.export takes them."""
    return {dim: SIZES[name] for dim, name in enumerate(names) if name}


def session(path_or_program):
    model = path_or_program.model_proto if hasattr(path_or_program, "model_proto") else onnx.load(path_or_program)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}, "not of the standard"
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session, *tensors):
    outputs = session.run(None, {x.name: t.numpy() for x, t in zip(session.get_inputs(), tensors, strict=True)})
    return [torch.from_numpy(output) for output in outputs]


def export(module, example, dynamic_shapes=None, **options):
    return session(
        torch.onnx.export(module.eval(), example, dynamic_shapes=dynamic_shapes, dynamo=True, verbose=False, **options)
    )


def check(session, module, *tensors, **close):
    expected = module(*tensors)
    expected = [expected] if isinstance(expected, torch.Tensor) else expected
    torch.testing.assert_close(run(session, *tensors), list(expected), **(close or CLOSE))


def test_convolution_layers_of_any_size():
    geometry = dict(stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, bias=True)
    layers = nn.ModuleList([learned(row.layer(4, 6, (3, 2), **geometry)) for row in CONVOLUTIONS])
    module = Call(lambda x: [layer(x) for layer in layers], layers)
    exported = export(module, (torch.randn(2, 4, 9, 11),), ((dynamic("batch", None, "height", "width"),),))
    for shape in ((3, 4, 6, 13), (1, 4, 12, 7)):
        check(exported, module, torch.randn(shape))


def test_deform_conv2d_is_one_node():
    x, weight, bias = torch.randn(2, 8, 9, 11), torch.randn(4, 4, 3, 3), torch.randn(4)
    offset, mask = 3 * torch.randn(2, 2 * 2 * 9, 5, 11), torch.rand(2, 2 * 9, 5, 11)
    module = Call(lambda *tensors: ops.deform_conv2d(*tensors[:4], (2, 1), 1, 1, tensors[4]))
    program = torch.onnx.export(module, (x, offset, weight, bias, mask), dynamo=True, verbose=False)
    assert [node.op_type for node in program.model_proto.graph.node] == ["DeformConv"]
    check(session(program), module, x, offset, weight, bias, mask)


def test_deform_kernel_conv2d():
    """Two groups of channels, of kernel offsets and of offsets, offsets beyond the scope and beyond the map."""

    def function(x, kernel_offset, weight, offset, mask):
        return [
            ops.deform_kernel_conv2d(x, kernel_offset, weight, None, (2, 1), 1, kernel_size=3, clip=clip, **maps)
            for maps in ({}, {"offset": offset}, {"mask": mask}, {"offset": offset, "mask": mask})
            for clip in (True, False)
        ]

    tensors = torch.randn(2, 8, 9, 11), 2 * torch.randn(2, 2 * 2 * 9, 5, 11), torch.randn(4, 4, 4, 5)
    tensors += 3 * torch.randn(2, 2 * 2 * 9, 5, 11), torch.rand(2, 2 * 9, 5, 11)
    check(export(Call(function), tensors), function, *tensors)


def test_roi_pooling_of_any_size():
    """deform_roi_pool with both grids and deform_psroi_pool with two classes, each at rest and moved."""

    def function(x, rois, offset, mask):
        options = dict(spatial_scale=0.25)
        by_class = dict(options, output_channels=6, group_size=2, part_size=(3, 2), samples_per_part=2)
        one_class = dict(offset=offset[:, :2], mask=mask[:, :1])
        return [
            *(ops.deform_roi_pool(x, rois, (3, 2), sampling_ratio=ratio, **options) for ratio in (0, 2)),
            *(ops.deform_roi_pool(x, rois, (3, 2), sampling_ratio=n, **one_class, **options) for n in (0, 2)),
            ops.deform_psroi_pool(x, rois, (4, 5), **by_class),
            ops.deform_psroi_pool(x, rois, (4, 5), offset=offset, mask=mask, **by_class),
        ]

    def tensors(rois, *size):
        return torch.randn(2, 24, *size), rois, 2 * torch.randn(len(rois), 4, 3, 2), torch.rand(len(rois), 2, 3, 2)

    shapes = (dynamic("batch", None, "height", "width"), *[dynamic("rois")] * 3)
    exported = export(Call(function), tensors(ROIS, 9, 11), (shapes,))
    whole = torch.tensor([[0, 4.0 * n + 0.1, 8, 4 * n + 24.1, 32] for n in range(20)])  # bins of 3 x 2 whole pixels
    for rois in (ROIS[:3], ROIS[:0], whole):
        check(exported, function, *tensors(rois, 13, 30))
    x, rois, offset, mask = tensors(ROIS, 9, 11)
    offset[0, 0, 0, 0], offset[1, 3, 0, 1] = torch.nan, torch.inf
    check(exported, function, x, rois, offset, mask)


def test_other_data_types():
    """Positions stay in float32 where the maps are narrower."""

    def function(rois, offset, x, weight):
        results = [
            ops.deform_conv2d(x.half(), offset.float(), weight.half()),
            ops.deform_roi_pool(x.half(), rois.float(), 3, offset=offset[:5, :2, :3, :3].float(), spatial_scale=0.25),
            ops.deform_conv2d(x, offset, weight),
            ops.deform_roi_pool(x, rois, 3, offset=offset[:5, :2, :3, :3], spatial_scale=0.25),
        ]
        return [result.double() for result in results]

    tensors = ROIS, torch.randn(5, 18, 4, 298), torch.randn(5, 4, 6, 300), torch.randn(4, 4, 3, 3)
    tensors = tuple(tensor.double() for tensor in tensors)
    outputs, expected = run(export(Call(function), tensors), *tensors), function(*tensors)
    torch.testing.assert_close(outputs[:2], expected[:2], rtol=2e-3, atol=4e-3)  # of float16
    torch.testing.assert_close(outputs[2:], expected[2:])


@pytest.mark.parametrize(
    ("network", "places", "layers", "shapes"),
    [
        (
            ResNetDW,
            RESNET_DW,
            {"3x3 in c5": "dk"},
            [dynamic("batch", None, "height", "width")],
        ),
        (MobileNetV2, MOBILENET_V2, {"3x3 in c2": "dkmdconv", "3x3 in c5": "dconv"}, None),
    ],
    ids=("resnet of any size", "mobilenet of one size"),
)
def test_backbone(network, places, layers, shapes):
    net = learned(settled(deformed(network(), exchange_in(places, layers))))
    exported = export(net, (torch.randn(2, 3, 64, 96),), shapes)
    check(exported, net, torch.randn(*((1, 3, 75, 64) if shapes else (2, 3, 64, 96))), **CLOSE_NETWORK)


def test_mask_rcnn_up_to_its_heads():
    """Backbone, neck and RoI extractor of a detector of MMDetection, for any number of RoIs."""
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    import dk_detection.mmdet  # noqa: F401  (registers)

    init_default_scope("mmdet")
    stem = "mask-rcnn_r18-mdconv-c3-c5_fpn_mdpool_1k_deformed-shapes.py"
    detector = MODELS.build(Config.fromfile(shipped("mmdet", f"deformed_shapes/{stem}")).model)
    learned(settled(detector))
    extractor = detector.roi_head.bbox_roi_extractor

    def pool(image, rois):
        return extractor(detector.extract_feat(image)[: extractor.num_inputs], rois)

    module = Call(pool, detector)
    boxes = torch.tensor([[0, 3.0, 2, 20, 30], [1, 5, 5, 93, 62], [1, 30, 10, 70, 60], [0, 1, 30, 50, 60]])
    exported = export(module, (torch.randn(2, 3, 64, 96), boxes), (({}, dynamic("rois")),))
    for rois in (boxes[:2], boxes[:0]):
        check(exported, module, torch.randn(2, 3, 64, 96), rois, **CLOSE_NETWORK)


def test_program_that_torch_export_made():
    layer = learned(TABLE[1].layer(4, 6, 3))
    x = torch.randn(2, 4, 7, 8)
    program = torch.export.export(layer, (x,)).run_decompositions(decompositions())
    check(session(torch.onnx.export(program, dynamo=True, verbose=False)), layer, x)


def torchscript(module, tensors, path, **options):
    options = dict(opset_version=19, dynamo=False) | options
    torch.onnx.export(module.eval(), tensors, str(path), **options)
    return session(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("token", ("dconv", "mdconv"))
def test_torchscript_exporter(tmp_path, token):
    (row,) = (row for row in TABLE if row.token == token)
    layer = learned(row.layer(4, 6, 3, stride=(2, 1), padding=1, groups=2))
    axes = dict(input_names=["x"], dynamic_axes={"x": {0: "n", 2: "h", 3: "w"}})
    exported = torchscript(layer, (torch.randn(2, 4, 9, 11),), tmp_path / "layer.onnx", **axes)
    check(exported, layer, torch.randn(3, 4, 6, 13))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_exporter_says_what_to_use(tmp_path):
    pool = Call(lambda x, rois: ops.deform_roi_pool(x, rois, 3))
    with pytest.raises(RuntimeError, match=r"deform_roi_pool.*dynamo=True"):
        torchscript(pool, (torch.randn(2, 4, 9, 11), ROIS), tmp_path / "pool.onnx")
