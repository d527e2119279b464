import pytest
import torch
import torch.nn.functional as F

from dk_detection import reference
from dk_detection.ops import resample_kernel


def make(name="clip", *, batch=3, out_channels=4, group_in=2, kernel=(3, 2), scope=(4, 3), clip=True):
    torch.manual_seed(0)
    weight = torch.randn(out_channels, group_in, *scope, dtype=torch.float64)
    axes = []
    for axis in (0, 1):  # sampling positions away from whole cells, inside the scope and beyond
        tap = torch.arange(kernel[axis]).view(-1, 1) if axis == 0 else torch.arange(kernel[axis])
        position = torch.randint(-2, scope[axis] + 1, (batch, *kernel)) + 0.1
        position = position + 0.8 * torch.rand(batch, *kernel, dtype=torch.float64)
        axes.append(position - tap - (scope[axis] - kernel[axis]) / 2)
    offset = torch.stack(axes, dim=-1).view(batch, -1)
    return pytest.param(weight, offset, {"kernel_size": kernel, "clip": clip}, id=name)


cases = pytest.mark.parametrize(
    ("weight", "kernel_offset", "options"),
    [
        make(),
        make("no_clip", clip=False),
        make("scope_of_kernel_size", scope=(3, 2)),
        make("large_scope", kernel=(2, 3), scope=(9, 7)),
        make("pointwise", kernel=(1, 1), scope=(2, 2)),
        make("row", kernel=(1, 3), scope=(1, 4)),
    ],
)


@cases
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_equals_reference(weight, kernel_offset, options, dtype):
    tensors = [t.to(dtype).requires_grad_() for t in (weight, kernel_offset)]
    output, expected = resample_kernel(*tensors, **options), reference.resample_kernel(*tensors, **options)
    assert output.shape == (3, *weight.shape[:2], *options["kernel_size"])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5  # sums of four products of order one
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(output)
    for got, wanted in zip(
        torch.autograd.grad(output, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=10 * tolerance, atol=10 * tolerance)


@cases
def test_gradients_of_any_order(weight, kernel_offset, options):
    tensors = [t.clone().requires_grad_() for t in (weight, kernel_offset)]
    assert torch.autograd.gradcheck(lambda *t: resample_kernel(*t, **options), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: resample_kernel(*t, **options), tensors, fast_mode=True)


def test_rest_positions():
    # In a scope of kernel size the taps lie on the cells, one cell more puts them in the middle between four.
    weight = torch.arange(16.0).view(1, 1, 4, 4)
    nothing = torch.zeros(1, 18)
    assert torch.equal(resample_kernel(weight[..., :3, :3], nothing, kernel_size=3)[0], weight[..., :3, :3])
    assert torch.equal(resample_kernel(weight, nothing, kernel_size=3)[0], F.avg_pool2d(weight, 2, stride=1))
    assert torch.equal(resample_kernel(weight, nothing[:, :8], kernel_size=2)[0], weight[..., 1:3, 1:3])


def test_offsets_are_down_then_across():
    weight = torch.arange(9.0).view(1, 1, 3, 3)
    assert resample_kernel(weight, torch.tensor([[1.0, 0]]), kernel_size=1).item() == 7
    assert resample_kernel(weight, torch.tensor([[0.0, -0.5]]), kernel_size=1).item() == 3.5


@pytest.mark.parametrize(
    ("clip", "position", "value", "slope"),
    [
        (True, -0.5, 1, 0),
        (True, 0, 1, 9),
        (True, 1, 10, 90),
        (True, 2, 100, 90),
        (True, 2.5, 100, 0),
        (True, float("inf"), 100, 0),
        (True, float("nan"), 0, 0),
        (False, -1, 0, 0),
        (False, -0.5, 0.5, 1),
        (False, 2, 100, -100),
        (False, float("-inf"), 0, 0),
        (False, float("nan"), 0, 0),
    ],
)
def test_edges_of_the_scope(clip, position, value, slope):
    for axis in (0, 1):
        weight = torch.tensor([1.0, 10, 100]).view((1, 1, 3, 1) if axis == 0 else (1, 1, 1, 3)).requires_grad_()
        offset = torch.zeros(1, 2)
        offset[0, axis] = position - 1
        offset.requires_grad_()
        kernel = resample_kernel(weight, offset, kernel_size=1, clip=clip)
        kernel.backward()
        assert kernel.item() == value
        assert offset.grad[0, axis].item() == slope
        assert weight.grad.isfinite().all()
        if clip:
            assert offset.grad[0, 1 - axis].item() == 0


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_types(dtype):
    weight, kernel_offset, options = make().values
    weight = weight.to(dtype)
    kernels = resample_kernel(weight, kernel_offset.float(), **options)
    assert kernels.dtype == dtype
    exact = resample_kernel(weight.double(), kernel_offset, **options)
    # One rounding, at the end.
    torch.testing.assert_close(kernels.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_autocast_leaves_it_alone():
    weight, kernel_offset, options = make().values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kernels = resample_kernel(weight.float(), kernel_offset.float(), **options)
    assert torch.equal(kernels, resample_kernel(weight.float(), kernel_offset.float(), **options))


def test_empty_batch():
    weight = torch.randn(4, 2, 4, 3, requires_grad=True)
    offset = torch.zeros(0, 12, requires_grad=True)
    kernels = resample_kernel(weight, offset, kernel_size=(3, 2))
    assert kernels.shape == (0, 4, 2, 3, 2)
    kernels.sum().backward()
    assert offset.grad.shape == offset.shape
    assert weight.grad.count_nonzero() == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.rand(4, 4)}, ValueError, r"weight must be .* got shape \[4, 4\]"),
        ({"weight": torch.rand(4, 0, 4, 4)}, ValueError, r"weight must be .* got shape \[4, 0, 4, 4\]"),
        ({"weight": torch.ones(4, 2, 4, 4).int()}, TypeError, "weight must be floating-point, got torch.int32"),
        ({"weight": torch.rand(4, 2, 2, 4)}, ValueError, "weight has a scope of 2x4, .* kernel_size = 3x3"),
        ({"kernel_offset": [0] * 18}, TypeError, "kernel_offset must be a tensor, got list"),
        ({"kernel_offset": torch.zeros(18)}, ValueError, r"kernel_offset has shape \[18\], .* = \[N, 18\]"),
        ({"kernel_offset": torch.zeros(2, 16)}, ValueError, r"kernel_offset has shape \[2, 16\], .* = \[N, 18\]"),
        ({"kernel_offset": torch.zeros(2, 18).long()}, TypeError, "kernel_offset must be floating-point"),
        ({"kernel_offset": torch.zeros(2, 18, device="meta")}, ValueError, "kernel_offset is on meta, .* weight, cpu"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
        ({"kernel_size": 1.5}, TypeError, "kernel_size must be an int or a pair of ints, got 1.5"),
    ],
)
def test_wrong_input(change, error, message):
    good = {"weight": torch.rand(4, 2, 4, 4), "kernel_offset": torch.zeros(2, 18), "kernel_size": 3}
    with pytest.raises(error, match=f"resample_kernel: {message}"):
        resample_kernel(**good | change)


def test_compile_without_graph_break():
    weight, kernel_offset, options = make().values
    compiled = torch.compile(resample_kernel, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(weight, kernel_offset, **options), resample_kernel(weight, kernel_offset, **options)
    )


def test_transforms():
    weight, kernel_offset, options = make().values

    def call(weight, kernel_offset):
        return resample_kernel(weight, kernel_offset, **options)

    def expected(weight, kernel_offset):
        return reference.resample_kernel(weight, kernel_offset, **options)

    tensors = weight, kernel_offset
    torch.testing.assert_close(torch.func.jvp(call, tensors, tensors), torch.func.jvp(expected, tensors, tensors))
    torch.testing.assert_close(torch.func.jacrev(call, 1)(*tensors), torch.func.jacfwd(expected, 1)(*tensors))
    weights = torch.stack([weight, -weight / 3])
    torch.testing.assert_close(
        torch.vmap(call, (0, None))(weights, kernel_offset), torch.stack([call(w, kernel_offset) for w in weights])
    )
    traced = torch.fx.symbolic_trace(call)
    assert [node.target for node in traced.graph.nodes if node.op.startswith("call")] == [resample_kernel]
    assert torch.equal(traced(*tensors), call(*tensors))


def test_works_without_the_compiled_library(monkeypatch):
    from dk_detection import _extension

    monkeypatch.setattr(_extension, "_error", ImportError("not built"))
    assert resample_kernel(torch.rand(4, 2, 4, 4), torch.zeros(2, 18), kernel_size=3).shape == (2, 4, 2, 3, 3)
