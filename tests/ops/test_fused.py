"""The fused kernels, run by Triton's interpreter on the CPU, and compiled for GPUs that are not there."""

import dataclasses
import importlib.util
import sys
from contextlib import contextmanager

import pytest
import torch

from dk_detection import reference
from dk_detection.ops import deform_conv2d, fused, use_fused
from tests.ops.test_deform_conv2d import make_case

triton = pytest.importorskip("triton", minversion="3.6")
interpreter = pytest.importorskip("triton.runtime.interpreter")
NAME = "dk_detection.ops._fused_deform_conv2d"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BFLOAT16, FLOAT32 = triton.language.bfloat16, triton.language.float32


class Interpreted(interpreter.InterpretedFunction):
    """A function called by a kernel. The interpreter would patch the language again at each call, and leave it so."""

    def __call__(self, *args, **kwargs):
        if self.fn.__module__ == NAME:
            return self.rewrite()(*args, **kwargs)
        scope = interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        finally:
            scope.restore()


def _create_dot(self, a, b, *others):
    # The interpreter keeps bfloat16 as integers, and would multiply those.
    def widen(x):
        if x.dtype.scalar != BFLOAT16:
            return x
        data = interpreter._convert_float(x.data, BFLOAT16, FLOAT32, None)
        return interpreter.TensorHandle(data.view("float32"), FLOAT32)

    return _dot(self, widen(a), widen(b), *others)


def _patch_tensor(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())  # NumPy 2.4 refuses int(array of one)


_dot, _patch = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor


@pytest.fixture
def kernels(monkeypatch):
    """A copy of the module of the fused kernels that is interpreted; whoever imports it meanwhile gets the copy."""
    monkeypatch.setattr(interpreter, "InterpretedFunction", Interpreted)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _create_dot)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", _patch_tensor)
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))  # slow
    for library in (triton.language, triton.language.standard):  # what is written in the language itself
        for name, function in list(vars(library).items()):
            if isinstance(function, triton.JITFunction):
                monkeypatch.setattr(library, name, Interpreted(function.fn))
    spec = importlib.util.find_spec(NAME)
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, NAME, module)
        yield module


@pytest.fixture
def tf32():
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    yield
    matmul.allow_tf32 = before


@contextmanager
def installed(kernels, other="host_run"):
    """The fused kernels in the place of the CPU's. Gives the list of the calls that they serve."""
    served = []
    call = kernels.Call

    class Recorded(call):
        def _run(self, kernel, *args, **kwargs):
            served.append(kernel.__name__)
            return super()._run(kernel, *args, **kwargs)

    kernels.Call = Recorded
    library = fused.install("CPU", other)
    try:
        yield served
    finally:
        library._destroy()
        kernels.Call = call


ALL = ["forward_kernel", "backward_kernel", "filter_gradient_kernel"]


def gradients(function, tensors, options):
    output = function(**tensors, **options)
    torch.manual_seed(1)
    grad = torch.randn(output.shape, dtype=torch.float64).to(output)
    return output, torch.autograd.grad(output, list(tensors.values()), grad)


def typed(case, dtype, **others):
    return {
        name: t.to(others.get(name, dtype if name in ("input", "weight", "bias") else torch.float32)).requires_grad_()
        for name, t in case.tensors.items()
    }


def check(case, tensors, tolerance):
    output, got = gradients(deform_conv2d, tensors, case.options)
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    expected, wanted = gradients(reference.deform_conv2d, exact, case.options)
    for name, a, b in zip(("output", *tensors), (output, *got), (expected, *wanted), strict=True):
        assert name == "output" or a.dtype == tensors[name].dtype
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < tolerance, f"{name}: relative error {error:.1e}"
    return output, got


CASES = (
    make_case("v2", channels=48, out_channels=80, size=(5, 4), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
    # Runs of 16 channels are of one group of the filter, 48 channels, and of one offset group, 32 channels.
    make_case("groups", channels=96, out_channels=32, size=(4, 5), kernel=(2, 1), groups=2, offset_groups=3),
    # Several blocks of channels in each of two offset groups, and of rows.
    make_case(
        "v1", channels=160, out_channels=16, size=(9, 7), kernel=(1, 2), padding=(0, 1), offset_groups=2, mask=False,
        bias=False, batch=1,
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((CASES[0], dtype) for dtype in DTYPES), (CASES[1], torch.float32), (CASES[2], torch.bfloat16)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_equals_reference(kernels, tf32, case, dtype):
    # Interpreted products of float32 are exact. Columns are rounded once, results once.
    with installed(kernels) as served:
        check(case, typed(case, dtype), 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
    assert served == ALL


def test_small_tiles_and_wide_indices(kernels, tf32):
    # Several blocks of rows and outputs, and several parts of the rows in the gradient of the filter. The kernels take
    # any number of channels; `covers` leaves those that 16 does not divide to others, as their loads would be narrow.
    case = make_case(
        "tiles", batch=3, channels=20, out_channels=17, size=(7, 4), kernel=(1, 1), padding=(0, 0), stride=(1, 1)
    )
    tensors = {name: t.detach() for name, t in typed(case, torch.float32).items()}
    tile = kernels.Tile(16, 16, 32, 4, 1)
    expected = reference.deform_conv2d(**case.tensors, **case.options)
    call = kernels.Call(
        *(tensors[name] for name in ("input", "offset", "mask", "weight")), *case.options.values(), expected.shape[2:],
        tiles=lambda geometry, dtype: (tile,) * 3, wide=True,
    )  # fmt: skip
    output = call.forward(tensors["bias"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(output, expected.float(), rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(output)
    by_input, by_offset, by_mask, by_weight, by_bias = call.backward(grad.permute(0, 2, 3, 1).contiguous(), [True] * 5)
    exact = {name: t.detach().requires_grad_() for name, t in case.tensors.items()}
    wanted = dict(zip(exact, torch.autograd.grad(
        reference.deform_conv2d(**exact, **case.options), list(exact.values()), grad.double()
    ), strict=True))  # fmt: skip
    got = {
        "input": by_input.permute(0, 3, 1, 2), "offset": by_offset, "mask": by_mask,
        "weight": by_weight.permute(0, 3, 1, 2), "bias": by_bias,
    }  # fmt: skip
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name].float(), rtol=1e-4, atol=1e-4, msg=name)


def test_what_is_not_finite_contributes_nothing(kernels):
    case = make_case("v2", channels=16, out_channels=16, size=(3, 4), kernel=(2, 1))
    tensors = typed(case, torch.float16)
    offset = tensors["offset"].detach()
    for start, value in ((0, "nan"), (1, "inf"), (2, "-inf"), (3, "1e30")):
        offset.view(-1)[start::9] = float(value)
    tensors["offset"] = offset.requires_grad_()
    with installed(kernels) as served:
        _, got = check(case, tensors, 4 * torch.finfo(torch.float16).eps)
    assert served == ALL
    assert got[1].isfinite().all() and got[1].view(-1)[::9].count_nonzero() == 0


def test_memory_formats_and_types(kernels):
    # The output follows the input; offsets and masks keep types of their own.
    case = make_case("v2", channels=16, out_channels=16, size=(3, 4), kernel=(2, 1))
    with installed(kernels) as served:
        tensors = typed(case, torch.float16, offset=torch.float16, mask=torch.float64)
        output, got = check(case, tensors, 4 * torch.finfo(torch.float16).eps)
        assert output.is_contiguous() and got[0].is_contiguous()
        for name in ("input", "offset", "mask", "weight"):
            tensors[name] = tensors[name].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        last, got_last = check(case, tensors, 4 * torch.finfo(torch.float16).eps)
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert got_last[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, output)
    assert served == ALL * 2


def test_each_gradient_alone(kernels):
    case = make_case("v2", channels=16, out_channels=16, size=(3, 4), kernel=(2, 1))
    _, together = gradients(deform_conv2d, typed(case, torch.bfloat16), case.options)
    kernels_of = {"input": ALL[1:2], "offset": ALL[1:2], "mask": ALL[1:2], "weight": ALL[2:], "bias": []}
    for name, expected in zip(case.tensors, together, strict=True):
        tensors = {other: t.detach().requires_grad_(other == name) for other, t in typed(case, torch.bfloat16).items()}
        with installed(kernels) as served:
            output = deform_conv2d(**tensors, **case.options)
            torch.manual_seed(1)
            grad = torch.randn(output.shape, dtype=torch.float64).to(output)
            (gradient,) = torch.autograd.grad(output, tensors[name], grad)
        assert served == [ALL[0], *kernels_of[name]]
        error = (gradient.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert error < 0.02, name


NOT_COVERED = {
    "float64": (dict(channels=16, out_channels=16), torch.float64),
    "float32_without_tf32": (dict(channels=16, out_channels=16), torch.float32),
    "outputs": (dict(channels=16, out_channels=24), torch.float16),
    "outputs_of_a_group": (dict(channels=32, out_channels=16, groups=2), torch.float16),
    "channels": (dict(channels=40, out_channels=16), torch.float16),
    "channels_of_an_offset_group": (dict(channels=32, out_channels=16, offset_groups=4), torch.float16),
    "channels_in_a_row": (dict(channels=48, out_channels=32, groups=2, offset_groups=3), torch.float16),
    "depthwise": (dict(channels=16, out_channels=16, groups=16), torch.float16),
    "no_images": (dict(channels=16, out_channels=16, batch=0), torch.float16),
}


@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_is_not_covered_goes_to_the_other_kernels(kernels, name):
    sizes, dtype = NOT_COVERED[name]
    case = make_case("x", **dict(size=(3, 4), kernel=(2, 1)) | sizes)
    with installed(kernels) as served:
        output, got = gradients(deform_conv2d, typed(case, dtype), case.options)
    expected, wanted = gradients(deform_conv2d, typed(case, dtype), case.options)
    assert served == []
    torch.testing.assert_close((output, got), (expected, wanted), rtol=0.02, atol=0.02)


def test_deterministic_gradients_come_from_the_other_kernels(kernels):
    case = make_case("v2", channels=16, out_channels=16, size=(3, 4), kernel=(2, 1))
    torch.use_deterministic_algorithms(True)
    try:
        with installed(kernels) as served:
            check(case, typed(case, torch.float16), 4 * torch.finfo(torch.float16).eps)
    finally:
        torch.use_deterministic_algorithms(False)
    assert served == ALL[:1]


def test_wrong_calls_of_the_operators_are_refused(kernels):
    case = make_case("v2", channels=16, out_channels=16, size=(3, 4), kernel=(2, 1))
    tensors = {name: t.detach() for name, t in typed(case, torch.float16).items()}
    input, offset, mask, weight = (tensors[name] for name in ("input", "offset", "mask", "weight"))
    geometry = [1, 1], [1, 1], [1, 1]
    operators = torch.ops.dk_detection
    with installed(kernels) as served:
        with pytest.raises(ValueError, match="deform_conv2d: offset has shape"):
            operators.deform_conv2d(input, offset[..., 1:], mask, weight, None, *geometry)
        with pytest.raises(ValueError, match="deform_conv2d: grad_output has shape"):
            operators.deform_conv2d_backward(input, input, offset, mask, weight, *geometry, [True] * 5)
        with pytest.raises(ValueError, match="deform_conv2d: a gradient of mask is asked for"):
            output = operators.deform_conv2d(input, offset, None, weight, None, *geometry)
            operators.deform_conv2d_backward(output, input, offset, None, weight, *geometry, [True] * 5)
    assert served == ALL[:1]


def test_under_autocast_and_compiled(kernels):
    case = make_case("v2", channels=16, out_channels=16, size=(3, 4), kernel=(2, 1))
    tensors = {name: t.float().requires_grad_() for name, t in case.tensors.items()}
    expected = gradients(reference.deform_conv2d, tensors, case.options)[0]
    compiled = torch.compile(deform_conv2d, fullgraph=True, dynamic=False, backend="aot_eager")
    with installed(kernels) as served, torch.autocast("cpu", torch.bfloat16):
        output, got = gradients(compiled, tensors, case.options)
    assert served == ALL and output.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in got)
    assert (output - expected).abs().max() < 0.02 * expected.abs().max()


def test_the_switch(monkeypatch):
    installs = []

    class Library:
        def __init__(self, *args):
            installs.append(args)

        def _destroy(self):
            installs.append("gone")

    monkeypatch.setattr(fused, "install", Library)
    with use_fused():
        assert installs == [("CUDA", "cuda")]
        with use_fused(False):
            assert installs == [("CUDA", "cuda"), "gone"]
        assert installs == [("CUDA", "cuda"), "gone", ("CUDA", "cuda")]
        use_fused()
    assert installs[3:] == ["gone"]
    use_fused()
    use_fused(False)
    assert installs[4:] == [("CUDA", "cuda"), "gone"]


def test_the_switch_says_what_is_missing(monkeypatch):
    if not hasattr(torch.ops.dk_detection, "_deform_conv2d_cuda"):
        with pytest.raises(RuntimeError, match="the compiled library of dk_detection has no kernels for CUDA"):
            use_fused()
    monkeypatch.setitem(sys.modules, NAME, None)
    with pytest.raises(RuntimeError, match=r"use_fused: the fused kernels need Triton 3\.6"):
        fused.install("CPU", "host_run")
    monkeypatch.undo()
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    with pytest.raises(RuntimeError, match=r"use_fused: the fused kernels need Triton 3\.6 or newer, got 3\.5\.1"):
        fused.install("CPU", "host_run")


@pytest.mark.parametrize(
    ("kernel", "dtype", "arch"),
    [("forward", torch.bfloat16, 90), ("backward", torch.bfloat16, 80), ("filter_gradient", torch.float32, 90)],
)
def test_no_spills(kernel, dtype, arch):
    # The whole table is benchmarks/fused_cost.py's.
    from benchmarks import fused_cost

    cost = fused_cost.compile_kernel(kernel, dtype, arch)
    assert cost.spill_bytes == 0
    assert 64 <= cost.registers <= 255
    assert cost.tensor_core_instructions > 0 and cost.wide_gathers > 0


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_a_gpu(tf32, case, dtype):
    tensors = {name: t.detach().cuda().requires_grad_() for name, t in typed(case, dtype).items()}
    with use_fused():
        check(case, tensors, 4e-3 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
