"""What holds for all operators: their registration, shown on a toy; networks; a compiled library that does not fit."""

import inspect
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dk_detection import ops
from dk_detection.layers import DeformConv2d, LocalDeformKernel2d, ModulatedDeformConv2d
from dk_detection.ops._operator import Operator
from dk_detection.ops.flops import MULTIPLY_ADDS

ROOT = Path(__file__).resolve().parents[2]


def gain(input, exponent, bias, base):
    """The toy in plain torch: base ** exponent times each channel of input, and a bias."""
    return input * (base**exponent).view(-1, 1, 1) + (0 if bias is None else bias.view(-1, 1, 1))


def _backward(grad_output, input, exponent, base, output_mask):
    factor = (base**exponent).view(-1, 1, 1)
    gradients = (
        grad_output * factor,
        (grad_output * input * factor * math.log(base)).sum((0, 2, 3)),
        grad_output.sum((0, 2, 3)),
    )
    return tuple(g if wanted else g.new_empty(0) for g, wanted in zip(gradients, output_mask, strict=True))


def _output_shape(input, exponent, bias, base):
    if exponent.shape != input.shape[1:2]:
        raise ValueError(f"exponent has shape {list(exponent.shape)}")
    return input.shape


def _by_exponent(operator, values, direction):
    slope = (math.log(values["base"]) * direction).view(-1, 1, 1)
    return operator.forward(**values | {"input": values["input"] * slope})


@pytest.fixture(scope="module")
def toys():
    """Two operators that a compiled library might hold: all that their Python files would have to say."""
    library = torch.library.Library("dk_detection", "FRAGMENT")
    operators = []
    for name, slope in (("toy_gain", _by_exponent), ("toy_refusing_gain", None)):
        library.define(f"{name}(Tensor input, Tensor exponent, Tensor? bias, float base) -> Tensor")
        library.define(
            f"{name}_backward(Tensor grad_output, Tensor input, Tensor exponent, float base, bool[3] output_mask) -> "
            "(Tensor, Tensor, Tensor)"
        )
        library.impl(name, gain, "CPU")
        library.impl(f"{name}_backward", _backward, "CPU")
        operators.append(
            Operator(
                name,
                _output_shape,
                lambda shapes, out_shape: math.prod(out_shape),
                differentiable=("input", "exponent", "bias"),
                slopes={"exponent": slope},
            )
        )
    yield operators
    for toy in operators:
        del MULTIPLY_ADDS[f"dk_detection::{toy.name}"]


def arguments(requires_grad=False):
    torch.manual_seed(0)
    shapes = (2, 3, 4, 5), (3,), (3,)
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad) for shape in shapes)


def test_an_operator_states_three_things_and_has_the_rest(toys):
    toy, _ = toys
    torch.library.opcheck(toy.forward, (*arguments(requires_grad=True), 1.5))
    input, exponent, _ = arguments(requires_grad=True)
    torch.library.opcheck(toy.backward, (torch.randn_like(input), input, exponent, 1.5, [True, False, True]))

    def derivatives(function, *tensors):
        def call(*tensors):
            return function(*tensors, 1.5)

        every = (0, 1, 2)
        gradient = torch.func.grad(lambda *t: call(*t).square().sum(), every)
        return (
            torch.func.jvp(call, tensors, tensors),
            gradient(*tensors),
            torch.func.jvp(gradient, tensors, tensors),
            torch.func.grad(lambda *t: sum(g.square().sum() for g in gradient(*t)), every)(*tensors),
            torch.vmap(call, (0, None, None))(torch.stack([tensors[0]] * 2), *tensors[1:]),
        )

    torch.testing.assert_close(derivatives(toy, *arguments()), derivatives(gain, *arguments()))
    with FlopCounterMode(display=False) as counter:
        toy(*arguments(), 1.5)
    assert counter.get_total_flops() == 2 * 120
    with pytest.raises(ValueError, match=r"exponent has shape \[2\]"):
        toy(torch.rand(1, 3, 2, 2), torch.rand(2), None, 1.5)


def test_the_example_of_the_documentation_is_what_the_code_has():
    page = (ROOT / "docs" / "adding_an_operator.md").read_text(encoding="utf-8")
    (example,) = re.findall("```text\n(_operator = .*?)```", page, re.DOTALL)
    assert example in Path(inspect.getfile(inspect.unwrap(ops.deform_conv2d))).read_text(encoding="utf-8")


def test_what_an_operator_cannot_derive_is_refused_and_nothing_else(toys):
    _, toy = toys
    tensors = arguments()
    refusal = "toy_refusing_gain: neither forward-mode differentiation nor double backward is supported by exponent"

    def along(index, tensors):
        others = list(tensors)

        def call(value):
            return toy(*others[:index], value, *others[index + 1 :], 1.5)

        return torch.func.jvp(call, (tensors[index],), (tensors[index],))[1]

    with pytest.raises(RuntimeError, match=refusal):
        along(1, tensors)
    torch.testing.assert_close(along(0, tensors), gain(tensors[0], tensors[1], None, 1.5))

    leaves = arguments(requires_grad=True)
    gradients = torch.autograd.grad(toy(*leaves, 1.5).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=refusal):
        torch.autograd.grad(gradients[1].sum(), leaves[0], retain_graph=True)
    expected = torch.autograd.grad(gain(*leaves, 1.5).square().sum(), leaves, create_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad(gradients[0].sum(), leaves), torch.autograd.grad(expected[0].sum(), leaves)
    )


def test_the_memory_format_is_told_as_the_kernels_do():
    # Where an image has one channel, one row or one column, strides alone tell channels-last from contiguous.
    for shape in ((2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 3, 1, 4), (3, 1, 1, 1)):
        batch, channels, height, width = shape
        for input in (
            torch.rand(shape),
            torch.rand(shape).contiguous(memory_format=torch.channels_last),
            torch.rand(batch, height, width, channels).permute(0, 3, 1, 2),
            torch.rand(batch, 1, height, width).expand(shape),
            torch.rand(batch, channels, width, height).transpose(2, 3),
            torch.rand(batch, 2 * channels, height, width).contiguous(memory_format=torch.channels_last)[:, ::2],
        ):
            others = torch.zeros(batch, 2, height + 2, width + 2), torch.rand(2, channels, 1, 1)
            output = ops.deform_conv2d(input, *others, padding=1)
            told = ops.deform_conv2d(
                torch.empty_strided(shape, input.stride(), device="meta"), *(t.to("meta") for t in others), padding=1
            )
            assert told.stride() == output.stride(), f"shape {shape}, strides {input.stride()}"


def test_operators_compile_on_their_own_account():
    # torch.compile counts recompilations for each code object, and gives up at eight.
    functions = [getattr(ops, name) for name in ops.__all__ if name != "use_fused"]
    assert len({function.__code__ for function in functions}) == len(functions)


def test_torchscript_can_call_the_compiled_operator(tmp_path):
    def call(input, offset, weight):
        return torch.ops.dk_detection.deform_conv2d(input, offset, None, weight, None, [1, 1], [1, 1], [1, 1])

    tensors = torch.rand(1, 2, 5, 4), torch.rand(1, 18, 5, 4), torch.rand(3, 2, 3, 3)
    torch.jit.script(call).save(f"{tmp_path}/call.pt")
    assert torch.equal(torch.jit.load(f"{tmp_path}/call.pt")(*tensors), ops.deform_conv2d(*tensors, padding=1))


def run_python(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


# Every operator, called rightly.
CALLS = """
    import torch
    from dk_detection import ops
    image, rois, field = torch.rand(1, 4, 5, 6), torch.tensor([[0.0, 1, 1, 3, 3]]), torch.zeros(1, 18, 3, 4)
    weight = torch.rand(2, 4, 3, 3)
    calls = {
        "deform_conv2d": lambda: ops.deform_conv2d(image, field, weight),
        "deform_kernel_conv2d": lambda: ops.deform_kernel_conv2d(image, field, weight, kernel_size=3),
        "deform_roi_pool": lambda: ops.deform_roi_pool(image, rois, 2),
        "deform_psroi_pool": lambda: ops.deform_psroi_pool(image, rois, 2, output_channels=1, group_size=2),
        "kernel_evolution_conv2d": lambda: ops.kernel_evolution_conv2d(image, torch.zeros(4, 9, 2), weight.flatten(2)),
    }
    assert {*calls, "resample_kernel", "use_fused"} == set(ops.__all__)
    ops.resample_kernel(weight, torch.zeros(1, 18), kernel_size=3)  # has nothing compiled

    def refused(name, words):
        try:
            calls[name]()
        except RuntimeError as error:
            assert str(error).startswith(f"{name}: the compiled library of dk_detection {words}"), error
            assert "run `pip install --no-build-isolation -e .`, or `make setup`" in str(error), error
        else:
            raise AssertionError(f"{name} did not fail")
"""


def test_every_operator_says_that_the_library_is_missing():
    # Nothing but the operators needs it.
    run_python(f"""
    import sys
    sys.modules["dk_detection._C"] = None
    {CALLS}
    for name in calls:
        refused(name, "could not be loaded")
    from dk_detection.ops.flops import MULTIPLY_ADDS  # the rules need no library
    assert MULTIPLY_ADDS["dk_detection::deform_roi_pool"]([None] * 6 + [3], (5, 4, 7, 7)) == 5 * 4 * 49 * 3 * 3 * 2
    assert {{operator.removeprefix("dk_detection::") for operator in MULTIPLY_ADDS}} == set(calls)
    """)


def test_every_operator_says_that_the_library_is_outdated():
    # Operators that are not there; with other arguments, another order of them, or without a backward; and a new one
    # among them.
    run_python(f"""
    import sys, types
    import torch
    sys.modules["dk_detection._C"] = types.ModuleType("_C")
    library = torch.library.Library("dk_detection", "FRAGMENT")
    library.define("deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias) -> Tensor")
    library.define("deform_conv2d_backward(Tensor grad_output) -> Tensor")
    parts = "Tensor input, Tensor rois, Tensor? offset, Tensor? mask, int[2] output_size, float spatial_scale"
    library.define(f"deform_roi_pool({{parts}}, int sampling_ratio, float gamma) -> Tensor")
    library.define(f"deform_psroi_pool({{parts}}, int group_size, int output_channels, int[2] part_size, "
                   "int samples_per_part, float gamma) -> Tensor")
    library.define("deform_psroi_pool_backward(Tensor grad_output) -> Tensor")
    {CALLS}
    for name in calls:
        refused(name, "does not have this operator as it is called here: it was built from other sources. Build")
    from dk_detection import _extension
    assert _extension.is_available() and not _extension.built_with_cuda()
    """)


def network():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        DeformConv2d(4, 6, 3, padding=1),
        torch.nn.ReLU(),
        ModulatedDeformConv2d(6, 4, (3, 2), stride=2, offset_groups=2),
        LocalDeformKernel2d(4, 4, 3, padding=1, groups=2, parametrisation="paper"),
    ).double()
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layers, torch.rand(2, 3, 11, 9, dtype=torch.float64)


def test_features_of_a_network_with_our_layers_can_be_extracted():
    layers, image = network()
    create_feature_extractor = pytest.importorskip("torchvision.models.feature_extraction").create_feature_extractor
    extractor = create_feature_extractor(layers, {"1": "low", "4": "high"})
    features = extractor(image)
    assert torch.equal(features["low"], layers[1](layers[0](image)))
    assert torch.equal(features["high"], layers(image))


def test_forward_mode_through_a_network_with_our_layers():
    layers, image = network()
    direction = torch.randn_like(image)
    tangent = torch.func.jvp(layers, (image,), (direction,))[1]
    step = 1e-6 * direction  # central differences: wrong by its square, and by rounding of 1e-16 / 1e-6
    torch.testing.assert_close(tangent, (layers(image + step) - layers(image - step)) / 2e-6, rtol=1e-6, atol=1e-6)
