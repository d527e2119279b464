"""The checks every operator passes, on every backend. A test module supplies the samples.

Backends: "cpu", the host kernels; "host_run", the device bodies in a plain loop on the host; "lock_step", the same with
32 lanes a warp that meet at every sum; "cuda", where a GPU is present.
"""

import inspect
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch.autograd import forward_ad

HOST_BACKENDS = ("host_run", "lock_step")  # of the CPU beside its own kernels
BACKENDS = ("cpu", "host_run", pytest.param("cuda", marks=pytest.mark.cuda))
# Older versions of torch let overriding pass without a word.
_ALLOW = "allow_override"
OVERRIDE = {_ALLOW: True} if _ALLOW in inspect.signature(torch.library.Library.impl).parameters else {}
in_lock_step = pytest.mark.parametrize("device", (*BACKENDS, "lock_step"), indirect=True)  # slow: for the arithmetic


@dataclass(frozen=True)
class Case:
    """One call: float64 tensors by argument name, and the arguments that are no tensors."""

    name: str
    tensors: dict[str, torch.Tensor]
    options: dict = field(default_factory=dict)


def away_from_kinks(shape, spread: int = 3) -> torch.Tensor:
    """Random float64 offsets of up to `spread` cells with fractional part in [0.1, 0.9], where sampling is smooth."""
    return torch.randint(-spread, spread, shape) + 0.1 + 0.8 * torch.rand(shape, dtype=torch.float64)


@contextmanager
def backend(name: str, operator: str):
    """Lets `operator` run on a backend. Gives the device that its tensors have to lie on."""
    if name not in HOST_BACKENDS:
        yield name
        return
    library = torch.library.Library("dk_detection", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # overriding is the purpose
        for suffix in ("", "_backward"):
            body = getattr(torch.ops.dk_detection, f"_{operator}_{name}{suffix}")
            library.impl(f"{operator}{suffix}", body, "CPU", **OVERRIDE)
    try:
        yield "cpu"
    finally:
        library._destroy()


@contextmanager
def late_reports():
    """Lets what device bodies on the host report of their RoIs arrive at the end, as a GPU would that lags behind."""
    torch.ops.dk_detection._host_run_lag(True)
    try:
        yield
    finally:
        torch.ops.dk_detection._host_run_lag(False)


def find_wrong_rois(device: str) -> None:
    """Raises what a device has found in the RoIs of earlier calls, once it has come to them."""
    if device == "cuda":
        torch.cuda.synchronize()
    with backend(device if device == "cuda" else "host_run", "deform_roi_pool") as device:
        torch.ops.dk_detection.deform_roi_pool(
            torch.zeros(1, 1, 1, 1, device=device), torch.zeros(0, 5, device=device), None, None, (1, 1), 1.0, 1, 0.1
        )


@contextmanager
def host_limits(*, column_bytes=32 << 20, contributions=4 << 20, elements=2**31 - 1):
    """Other bounds for the device bodies on the host: for chunks of small tensors, and for indices of 64 bits."""
    torch.ops.dk_detection._host_run_limits(column_bytes, contributions, elements)
    try:
        yield
    finally:
        torch.ops.dk_detection._host_run_limits(32 << 20, 4 << 20, 2**31 - 1)


def gradcheck(function, tensors, **options) -> bool:
    """torch's, with the slack that sums by atomics need on a GPU: their order is left to chance."""
    return torch.autograd.gradcheck(function, tensors, nondet_tol=1e-10 if tensors[0].is_cuda else 0.0, **options)


class OperatorSuite:
    """Subclass as `Test...` and set the class attributes; pytest runs every check for every case and backend.

    Attributes:
        name: the operator's name.
        function, reference: staticmethods; the public function and its slow twin.
        data: names of the tensors that carry the data type; the others (positions) stay in float32 when data is
            narrower.
        maps: names of those that are feature maps, in either memory format.
        cases: samples with batch > 1, small, odd and unequal sizes, and positions away from kinks.
        once: whether derivatives of gradients are refused.
    """

    name: str
    function = None
    reference = None
    data: tuple[str, ...] = ()
    maps: tuple[str, ...] = ("input",)
    cases: tuple[Case, ...] = ()
    once = False

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=lambda case: case.name)

    @pytest.fixture(params=BACKENDS)
    def device(self, request):
        with backend(request.param, self.name) as device:
            yield device

    def tensors(self, case, device="cpu", dtype=torch.float64, requires_grad=True):
        """The case's tensors on a device, data in `dtype`, positions in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        return {
            name: tensor.to(device, dtype if name in self.data else wide).requires_grad_(requires_grad)
            for name, tensor in case.tensors.items()
        }

    def run(self, function, tensors, case):
        return function(**tensors, **case.options)

    def gradients(self, function, tensors, case):
        output = self.run(function, tensors, case)
        torch.manual_seed(1)
        grad = torch.randn(output.shape, dtype=torch.float64).to(output)
        return output, torch.autograd.grad(output, list(tensors.values()), grad)

    @in_lock_step
    @pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
    def test_equals_reference(self, case, device, dtype):
        # Both sides sum a few hundred terms of order 1; float32 gets the slack of a different order of sums.
        tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
        output, gradients = self.gradients(self.function, self.tensors(case, device, dtype), case)
        expected, expected_gradients = self.gradients(self.reference, self.tensors(case, device, dtype), case)
        torch.testing.assert_close(output, expected, **tolerance)
        for name, gradient, wanted in zip(case.tensors, gradients, expected_gradients, strict=True):
            torch.testing.assert_close(
                gradient, wanted, msg=lambda m, name=name: f"gradient of {name}: {m}", **tolerance
            )

    @in_lock_step
    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
    def test_half_types(self, case, device, dtype):
        tensors = self.tensors(case, device, dtype)
        output, gradients = self.gradients(self.function, tensors, case)
        assert output.dtype == dtype
        exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
        expected, expected_gradients = self.gradients(self.reference, exact, case)
        # Inputs are equal; what is left are single roundings: of results, and on devices of columns.
        eps = torch.finfo(dtype).eps
        for name, got, wanted in zip(
            ("output", *tensors), (output, *gradients), (expected, *expected_gradients), strict=True
        ):
            assert name == "output" or got.dtype == tensors[name].dtype
            error = (got.double() - wanted).abs().max() / wanted.abs().max()
            assert error < 4 * eps, f"{name}: relative error {error:.2e} with {dtype}"

    @pytest.mark.parametrize("name", HOST_BACKENDS)
    @pytest.mark.parametrize("deterministic", (False, True))
    def test_chunks_and_wide_indices(self, case, name, deterministic):
        # Few positions and contributions at a time, and indices of 64 bits: the same numbers as in one piece.
        torch.use_deterministic_algorithms(deterministic)
        try:
            with backend(name, self.name), host_limits(column_bytes=3000, contributions=500, elements=0):
                output, gradients = self.gradients(self.function, self.tensors(case), case)
        finally:
            torch.use_deterministic_algorithms(False)
        expected, expected_gradients = self.gradients(self.reference, self.tensors(case), case)
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-9)

    def test_gradcheck(self, case, device):
        tensors = self.tensors(case, device)
        names = list(tensors)
        assert gradcheck(
            lambda *values: self.run(self.function, dict(zip(names, values, strict=True)), case),
            tuple(tensors.values()),
            fast_mode=True,  # along random directions; test_equals_reference compares element by element
        )

    def test_single_gradients(self, case, device):
        # Each gradient alone equals the one computed together with the others.
        _, together = self.gradients(self.function, self.tensors(case, device), case)
        for name, expected in zip(case.tensors, together, strict=True):
            tensors = self.tensors(case, device, requires_grad=False)
            tensors[name].requires_grad_()
            output = self.run(self.function, tensors, case)
            torch.manual_seed(1)
            grad = torch.randn(output.shape, dtype=torch.float64).to(output)
            torch.testing.assert_close(torch.autograd.grad(output, tensors[name], grad)[0], expected)

    def test_strides_and_memory_formats(self, case, device):
        output, gradients = self.gradients(self.function, self.tensors(case, device), case)
        tensors = self.tensors(case, device)
        for name, tensor in tensors.items():  # every other element of a larger tensor
            holder = torch.full((*tensor.shape, 2), float("nan"), dtype=tensor.dtype, device=device)
            holder[..., 0] = tensor.detach()
            tensors[name] = holder[..., 0].requires_grad_()
        strided, strided_gradients = self.gradients(self.function, tensors, case)
        torch.testing.assert_close(strided, output)
        for name in self.maps:
            tensors[name] = tensors[name].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        last, last_gradients = self.gradients(self.function, tensors, case)
        torch.testing.assert_close(last, output)
        assert last.is_contiguous(memory_format=torch.channels_last) and output.is_contiguous()
        for expected, *others in zip(gradients, strided_gradients, last_gradients, strict=True):
            for other in others:
                torch.testing.assert_close(other, expected)

    def test_opcheck(self, case, device):
        calls = []
        operator = getattr(torch.ops.dk_detection, self.name)
        backward = getattr(torch.ops.dk_detection, f"{self.name}_backward")

        class Record(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                if function in (operator, operator.default):
                    calls.append(args)
                return function(*args, **(kwargs or {}))

        with Record():
            output = self.run(inspect.unwrap(self.function), self.tensors(case, device), case)
        (args,) = calls
        torch.library.opcheck(operator, args)
        args = self.backward_arguments(torch.randn_like(output), args)
        if not self.once:
            torch.library.opcheck(backward, args, test_utils="test_autograd_registration")
        torch.library.opcheck(backward, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args))

    def backward_arguments(self, grad, args):
        """Arguments of the backward operator, given the output's gradient and the forward operator's arguments."""
        raise NotImplementedError

    @in_lock_step
    def test_same_result_twice(self, case, device):
        torch.use_deterministic_algorithms(True)
        try:
            first = self.gradients(self.function, self.tensors(case, device, torch.float32), case)[1]
            second = self.gradients(self.function, self.tensors(case, device, torch.float32), case)[1]
            expected = self.gradients(self.reference, self.tensors(case, device, torch.float32), case)[1]
        finally:
            torch.use_deterministic_algorithms(False)
        for a, b, wanted in zip(first, second, expected, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, wanted, rtol=1e-4, atol=1e-4)

    def pure(self, function, case, names, device="cpu"):
        """`function` of the tensors called `names` alone, and those tensors."""
        tensors = self.tensors(case, device, requires_grad=False)

        def call(*values):
            # Not with `|`: torch.compile of torch 2.6 does not know that.
            return self.run(function, {**tensors, **dict(zip(names, values, strict=True))}, case)

        return call, tuple(tensors[name] for name in names)

    def directions(self, tensors):
        torch.manual_seed(2)
        return tuple(torch.randn_like(tensor) for tensor in tensors)

    def test_forward_mode(self, case, device):
        # Along each argument alone, and along all together.
        for names in (*((name,) for name in case.tensors), tuple(case.tensors)):
            function, tensors = self.pure(self.function, case, names, device)
            expected, _ = self.pure(self.reference, case, names, device)
            directions = self.directions(tensors)
            _, wanted = torch.func.jvp(expected, tensors, directions)
            output, tangent = torch.func.jvp(function, tensors, directions)
            assert wanted.count_nonzero() > 0
            torch.testing.assert_close(output, function(*tensors))
            torch.testing.assert_close(tangent, wanted, rtol=1e-9, atol=1e-9, msg=lambda m, n=names: f"{n}: {m}")
        with forward_ad.dual_level():
            output = function(*map(forward_ad.make_dual, tensors, directions))
            torch.testing.assert_close(forward_ad.unpack_dual(output).tangent, wanted, rtol=1e-9, atol=1e-9)

    def test_forward_mode_fits_the_backward_on_kinks(self, case, device):
        # <u, J d> = <J^T u, d>, also where slopes to the left and to the right differ, and where there is no sample.
        names = tuple(case.tensors)
        function, tensors = self.pure(self.function, case, names, device)
        tensors = tuple(t.round() if name.endswith("offset") else t for name, t in zip(names, tensors, strict=True))
        for name, tensor in zip(names, tensors, strict=True):
            if name.endswith("offset"):
                tensor.view(-1)[::11] = float("nan")
                tensor.view(-1)[5::11] = float("inf")
                tensor.view(-1)[7::11] = float("-inf")
        for index, direction in enumerate(self.directions(tensors)):
            directions = tuple(direction if i == index else torch.zeros_like(t) for i, t in enumerate(tensors))
            output, tangent = torch.func.jvp(function, tensors, directions)
            cotangent = torch.randn_like(output)
            gradient = torch.func.vjp(function, *tensors)[1](cotangent)[index]
            torch.testing.assert_close((cotangent * tangent).sum(), (gradient * direction).sum())

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
    def test_forward_mode_in_half_types(self, dtype):
        case = self.cases[0]
        tensors = self.tensors(case, dtype=dtype, requires_grad=False)
        directions = [d.to(t.dtype) for t, d in zip(tensors.values(), self.directions(tensors.values()), strict=True)]

        def tangent(function, dtype=None):
            def call(*values):
                return self.run(function, dict(zip(tensors, values, strict=True)), case)

            values, along = ([t.to(dtype or t.dtype) for t in ts] for ts in (tensors.values(), directions))
            return torch.func.jvp(call, tuple(values), tuple(along))[1]

        got, wanted = tangent(self.function), tangent(self.reference, torch.float64)
        assert got.dtype == dtype
        assert (got.double() - wanted).abs().max() < 4 * torch.finfo(dtype).eps * wanted.abs().max()

    @pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # by torch.func.linearize itself
    def test_transforms_of_torch_func(self):
        case = self.cases[0]
        names = tuple(case.tensors)
        (function, tensors), (expected, _) = (self.pure(f, case, names) for f in (self.function, self.reference))
        directions = self.directions(tensors)
        every = tuple(range(len(names)))
        torch.testing.assert_close(
            torch.func.grad(lambda *t: function(*t).square().sum(), every)(*tensors),
            torch.func.grad(lambda *t: expected(*t).square().sum(), every)(*tensors),
        )
        _, linear = torch.func.linearize(function, *tensors)
        torch.testing.assert_close(linear(*directions), torch.func.jvp(expected, tensors, directions)[1])
        (function, tensors), (expected, _) = (self.pure(f, case, names[-1:]) for f in (self.function, self.reference))
        wanted = torch.func.jacrev(expected)(*tensors)
        torch.testing.assert_close(torch.func.jacrev(function)(*tensors), wanted)
        torch.testing.assert_close(torch.func.jacfwd(function)(*tensors), wanted)

    def test_vmap(self):
        # All tensors mapped, along another dimension than the first, and each alone; gradients of every sample.
        case = self.cases[0]
        names = tuple(case.tensors)
        function, tensors = self.pure(self.function, case, names)
        gradient = torch.func.grad(lambda *t: function(*t).square().sum(), tuple(range(len(names))))
        for mapped in (*((name,) for name in names), names):
            values = [torch.stack([t, -t / 3], -1) if n in mapped else t for n, t in zip(names, tensors, strict=True)]
            in_dims = tuple(-1 if name in mapped else None for name in names)
            samples = [[t[..., i] if d else t for t, d in zip(values, in_dims, strict=True)] for i in (0, 1)]
            torch.testing.assert_close(
                torch.vmap(function, in_dims)(*values), torch.stack([function(*sample) for sample in samples])
            )
        per_sample = torch.vmap(gradient, in_dims)(*values)
        for i, sample in enumerate(samples):
            torch.testing.assert_close(tuple(g[i] for g in per_sample), gradient(*sample))
        with pytest.raises(RuntimeError, match=f"{self.name}: vmap over a dimension of size 0 is not supported"):
            torch.vmap(function, (0, *[None] * (len(names) - 1)))(tensors[0][None][:0], *tensors[1:])

    def test_second_derivatives(self, case, device):
        # Gradients of gradients, the derivative of a gradient along a direction, and the gradient of such a derivative.
        names = tuple(case.tensors)
        (function, tensors), (expected, _) = (
            self.pure(f, case, names, device) for f in (self.function, self.reference)
        )
        directions = self.directions(tensors)

        def gradient(function):
            return torch.func.grad(lambda *t: function(*t).square().sum(), tuple(range(len(names))))

        def double_backward(function):
            leaves = [t.clone().requires_grad_() for t in tensors]
            first, *others = leaves  # all others depend on it, as they do in a layer
            output = function(first, *(other * (1 + first.mean()) for other in others))
            cotangent = torch.linspace(-1, 1, output.numel()).to(output).view_as(output).requires_grad_()
            gradients = torch.autograd.grad(output, leaves, cotangent, create_graph=True)
            change = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
            return torch.autograd.grad(change, [*leaves, cotangent], materialize_grads=True)

        def forward_over_reverse(function):
            return torch.func.jvp(gradient(function), tensors, directions)[1]

        def reverse_over_forward(function):
            return gradient(lambda *t: torch.func.jvp(function, t, directions)[1])(*tensors)

        for derivative in (double_backward, forward_over_reverse, reverse_over_forward):
            if self.once and (derivative != reverse_over_forward or "offset" in names):
                with pytest.raises(RuntimeError, match=f"{self.name}: double backward is not supported"):
                    derivative(function)
            else:
                torch.testing.assert_close(derivative(function), derivative(expected), rtol=1e-9, atol=1e-9)

    def test_derivatives_when_compiled(self):
        case = self.cases[0]
        function, tensors = self.pure(self.function, case, tuple(case.tensors))
        directions = self.directions(tensors)

        def both(*tensors):
            gradient = torch.func.grad(lambda *t: function(*t).square().sum())(*tensors)
            return *torch.func.jvp(function, tensors, directions), gradient

        torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(*tensors), both(*tensors))

    def test_derivatives_of_the_compiled_operator(self):
        # An exported program calls it without the function around it.
        case = self.cases[0]
        function, tensors = self.pure(self.function, case, tuple(case.tensors))

        class Module(torch.nn.Module):
            def forward(self, *tensors):
                return function(*tensors)

        directions = self.directions(tensors)
        program = torch.export.export(Module(), tensors, strict=False).module()
        expected = torch.func.jvp(function, tensors, directions)
        torch.testing.assert_close(torch.func.jvp(program, tensors, directions), expected)

    def test_fx_traces_one_node(self):
        case = self.cases[0]
        run, function = self.run, self.function

        class Module(torch.nn.Module):
            def forward(self, tensors):
                return run(function, {name: tensors[name] for name in case.tensors}, case)

        traced = torch.fx.symbolic_trace(Module())
        assert [node.target for node in traced.graph.nodes].count(function) == 1
        tensors = self.tensors(case)
        assert torch.equal(traced(tensors), run(function, tensors, case))

    def test_autocast(self, device):
        case = self.cases[0]
        tensors = self.tensors(case, device, torch.float32)
        with torch.autocast(device, dtype=torch.bfloat16):
            output, gradients = self.gradients(self.function, tensors, case)
        assert output.dtype == torch.bfloat16
        expected = self.run(self.function, tensors, case)
        error = (output - expected).abs().max() / expected.abs().max()
        assert 0 < error < 3 * torch.finfo(torch.bfloat16).eps
        for tensor, gradient in zip(tensors.values(), gradients, strict=True):
            assert gradient.dtype == tensor.dtype == torch.float32

    def test_backward_inside_autocast(self, case, device):
        # Of a forward outside. Autocast must not touch the products inside the operator, whichever gradient is wanted.
        tensors = self.tensors(case, device, torch.float32)
        output, expected = self.gradients(self.function, tensors, case)
        for name, wanted in zip(tensors, expected, strict=True):
            values = {other: t.detach().requires_grad_(other == name) for other, t in tensors.items()}
            output = self.run(self.function, values, case)
            torch.manual_seed(1)
            grad = torch.randn(output.shape, dtype=torch.float64).to(output)
            with torch.autocast(device, dtype=torch.bfloat16):
                (gradient,) = torch.autograd.grad(output, values[name], grad)
            torch.testing.assert_close(gradient, wanted)

    def test_one_thread_equals_many(self, case):
        # The order of sums may differ, no more.
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = self.gradients(self.function, self.tensors(case), case)
            torch.set_num_threads(5)
            many = self.gradients(self.function, self.tensors(case), case)
        finally:
            torch.set_num_threads(threads)
        torch.testing.assert_close(one, many)

    def test_compile_without_graph_break(self):
        case = self.cases[0]
        compiled = torch.compile(self.function, fullgraph=True, dynamic=False)
        output, gradients = self.gradients(compiled, self.tensors(case, dtype=torch.float32), case)
        expected, expected_gradients = self.gradients(self.function, self.tensors(case, dtype=torch.float32), case)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(gradients, expected_gradients)


class ConvolutionSuite(OperatorSuite):
    """Of operators that convolve `input` with `weight`.

    Attributes:
        shared: names of the tensors that all images share.
    """

    data = ("input", "weight", "bias")
    shared: tuple[str, ...] = ("weight", "bias")

    def test_an_image_without_a_batch(self, case, device):
        tensors = self.tensors(case, device, requires_grad=False)
        batched, single = (
            {name: t if name in self.shared else t[index] for name, t in tensors.items()} for index in (slice(1), 0)
        )
        for name in tensors:  # those of the batch are gradients of its only image
            for arguments in (batched, single):
                arguments[name].requires_grad_()
        (output, gradients), (expected, wanted) = (self.gradients(self.function, t, case) for t in (single, batched))
        assert torch.equal(output, expected[0])
        for name, gradient, other in zip(tensors, gradients, wanted, strict=True):
            assert torch.equal(gradient, other.view_as(gradient)), name


class RoIPoolSuite(OperatorSuite):
    """Of operators that pool `rois`, one of a case's options, from `input`."""

    data = ("input",)
    once = True

    def run(self, function, tensors, case):
        options = {**case.options, "rois": case.options["rois"].to(tensors["input"].device)}  # no `|`: as in `pure`
        return function(**tensors, **options)

    def backward_arguments(self, grad, args):
        input, rois, offset, mask, *geometry = args
        wanted = [True, offset is not None, mask is not None]
        return grad, input, rois, offset, mask, *geometry, wanted

    def test_rois_are_no_variables(self, case):
        # No gradient flows to them, so nothing follows them in forward mode either.
        tensors = self.tensors(case, requires_grad=False)
        rois = case.options["rois"]
        _, tangent = torch.func.jvp(
            lambda rois: self.function(**tensors, **case.options | {"rois": rois}), (rois,), (torch.ones_like(rois),)
        )
        assert tangent.count_nonzero() == 0

    def test_fx_sees_rois_in_a_list(self):
        case = self.cases[0]
        tensors = self.tensors(case, requires_grad=False)

        def call(first, second):
            return self.function(**tensors, **case.options | {"rois": [first, second]})

        traced = torch.fx.symbolic_trace(call)
        assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [self.function]
        boxes = case.options["rois"][:2, 1:], case.options["rois"][2:, 1:]
        assert torch.equal(traced(*boxes), call(*boxes))
