"""What torch has to know about a compiled operator, registered in one place: shapes, derivatives, batching, FLOPs."""

import inspect
from collections.abc import Callable, Mapping, Sequence

import torch

# `torch.library.register_autograd` knows neither forward mode, where it gives a silent zero, nor torch.func. These are
# the parts of which torch makes both: torch/_library/autograd.py and torch/_functorch/autograd_function.py.
from torch._C import _AutoDispatchBelowAutograd
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from dk_detection import _extension
from dk_detection.ops import _onnx, flops

OPERATORS: "list[Operator]" = []
_LIBRARY = torch.library.Library("dk_detection", "IMPL")


class Operator:
    """A compiled operator and its backward; called with the operator's arguments in order it checks them and runs.

    The backward, `<name>_backward(grad_output, ..., output_mask)`, takes all arguments but the one called `bias`, which
    is added to the channels of the output, and returns the gradients of the differentiable ones, empty where
    `output_mask` is false.

    All other derivatives follow from one formula, that of the output along a direction, `J d`. Forward mode is this
    formula; and as the backward is `J^T u`, the gradient of `<u, J d>`, its own derivatives are those of this formula.

    Args:
        name: Without the namespace.
        output_shape: From the operator's arguments, under their names and in their order, to the shape of its output.
            Checks them, and raises TypeError and ValueError.
        multiply_adds: See `flops.register`.
        differentiable: Names of the differentiable arguments, in the order of the backward's results. The first is the
            map whose data type and memory format the output has.
        slopes: For each differentiable argument in which the operator is not linear a function from this operator, the
            values of its arguments by name, in float32 or wider, and a direction of that argument to the derivative of
            the output along it; or None, and the operator refuses what needs it.
        standard: From the operator and its arguments, in order, to its output in operators that ONNX knows; None: it is
            not exported.
        once: Whether the operator refuses derivatives of its gradients: where `slopes` call the backward, they would go
            round in circles.
    """

    def __init__(
        self,
        name: str,
        output_shape: Callable[..., Sequence[int]],
        multiply_adds: Callable[[Sequence, Sequence], int],
        *,
        differentiable: Sequence[str],
        slopes: Mapping[str, Callable | None],
        standard: Callable[..., torch.Tensor] | None = None,
        once: bool = False,
    ) -> None:
        OPERATORS.append(self)
        self.name = name
        self.output_shape = output_shape
        self.arguments = tuple(inspect.signature(output_shape).parameters)
        self.differentiable = tuple(differentiable)
        self.slopes = slopes
        self.standard = standard
        self.once = once
        self.forward, self.backward = _extension.find(name, self.arguments) or (None, None)
        flops.register(name, multiply_adds, compiled=self.forward is not None)
        if self.forward is None:
            return
        of_backward = "grad_output", *(name for name in self.arguments if name != "bias"), "output_mask"
        _register(self.forward, self.arguments, self._fake, self._gradients, self._tangents)
        _register(self.backward, of_backward, self._fake_backward, self._gradients_again, self._tangents_of_gradients)

    def __call__(self, *args):
        if self.forward is None:
            raise _extension.missing(self.name)
        self.output_shape(*args)
        return self.in_onnx(*args) if _onnx.is_exporting() else self.forward(*args)

    def in_onnx(self, *args):
        """The output in operators that ONNX knows, for its exporter."""
        if self.standard is None:
            raise RuntimeError(f"{self.name}: there is no translation of this operator to ONNX")
        return self.standard(self, *args)

    def _fake(self, **values):
        return _empty_like(values[self.differentiable[0]], self.output_shape(**values))

    def _fake_backward(self, grad_output, output_mask, **values):
        def gradient(name):
            if name == "bias":
                return grad_output.new_empty(grad_output.shape[1])
            if name == self.differentiable[0]:
                return _empty_like(values[name], values[name].shape)
            return values[name].new_empty(values[name].shape)

        return tuple(
            gradient(name) if wanted else grad_output.new_empty(0)
            for name, wanted in zip(self.differentiable, output_mask, strict=True)
        )

    def _gradients(self, values, wanted, grad_output):
        """`J^T u`: the gradients of the arguments called `wanted`, by name."""
        output_mask = [name in wanted for name in self.differentiable]
        values = {name: value for name, value in values.items() if name != "bias"}
        gradients = self.backward(grad_output=grad_output, output_mask=output_mask, **values)
        return dict(zip(self.differentiable, gradients, strict=True))

    def _tangents(self, values, directions):
        directions = {name: directions[name] for name in self.differentiable if name in directions}
        return (self._along(values, directions) if directions else None,)  # None: along RoIs

    def _along(self, values, directions):
        """`J d`: the derivative of the output along directions of differentiable arguments, by name."""
        dtype = values[self.differentiable[0]].dtype
        # Differences of what half types have rounded would tell little.
        wide = torch.promote_types(dtype, torch.float32)
        values = {name: value.to(wide) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        terms = [self._term(values, name, direction.to(wide)) for name, direction in directions.items()]
        return sum(terms).expand(self.output_shape(**values)).to(dtype)

    def _term(self, values, name, direction):
        if name == "bias":
            return direction.view(-1, 1, 1)
        if name not in self.slopes:
            return self.forward(**values | {name: direction})
        if self.slopes[name] is None:
            raise RuntimeError(
                f"{self.name}: neither forward-mode differentiation nor double backward is supported by {name}"
            )
        return self.slopes[name](self, values, direction)

    def _gradients_again(self, values, wanted, *directions):
        """The gradients of `<d, J^T u>`, by u and by the arguments called `wanted`."""
        asked = zip(self.differentiable, directions, values["output_mask"], strict=True)
        directions = {name: direction for name, direction, is_asked in asked if is_asked and direction is not None}
        if not directions:
            return {}
        tangent, gradients = self._second_order(values, wanted, directions)
        return gradients | {"grad_output": tangent}

    def _tangents_of_gradients(self, values, directions):
        """The derivative of `J^T u` along directions of u and of arguments: of all gradients, in order."""
        wanted = [n for n, asked in zip(self.differentiable, values["output_mask"], strict=True) if asked]
        tangents = dict.fromkeys(self.differentiable)
        if "grad_output" in directions:
            gradients = self.backward(**values | {"grad_output": directions["grad_output"]})
            tangents.update(zip(self.differentiable, gradients, strict=True))
        directions = {name: directions[name] for name in self.differentiable if name in directions}
        if directions:
            for name, tangent in self._second_order(values, wanted, directions)[1].items():
                tangents[name] = tangent if tangents[name] is None else tangents[name] + tangent
        return tuple(tangents.values())

    def _second_order(self, values, wanted, directions):
        """`J d`, and the gradients of `<u, J d>` by the arguments called `wanted`; u is `grad_output`."""
        if self.once:
            raise RuntimeError(
                f"{self.name}: double backward is not supported: its gradients are not differentiable themselves "
                "(create_graph=True, gradient penalties and Hessians do not work through this operator)"
            )
        again = torch.is_grad_enabled()
        arguments = {name: values.get(name) for name in self.arguments}
        with torch.enable_grad():
            # Views, lest the gradients of one argument include what flows to it through another.
            views = {n: v.view_as(v) for n, v in arguments.items() if n in wanted and n != "bias"}
            for view in views.values():
                if not view.requires_grad:
                    view.requires_grad = True
            tangent = self._along(arguments | views, directions)
            if not (views and tangent.requires_grad):
                return tangent, {}
            gradients = torch.autograd.grad(
                tangent, list(views.values()), values["grad_output"], create_graph=again, allow_unused=True
            )
        return tangent, {n: g for n, g in zip(views, gradients, strict=True) if g is not None}


def _register(operator, names, fake, vjp, jvp):
    """Registers a fake kernel, derivatives and vmap of an operator with arguments called `names`.

    Args:
        fake: From the arguments, by name.
        vjp: From the arguments by name, but for `bias`, the names of those whose gradients are wanted, and the
            gradients of all outputs to gradients by name, of these arguments or more.
        jvp: From the arguments by name, and those tangents that there are by name, to the tangents of all outputs, None
            for zero.
    """

    class Rules(_SingleLevelFunction):
        @staticmethod
        def forward(*args):
            # What is above autograd has been dealt with; whoever is below, such as an outer transform of torch.func,
            # differentiates on its own account, in either mode.
            with _AutoDispatchBelowAutograd(), torch.enable_grad(), _set_fwd_grad_enabled(True):
                return operator(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            values = dict(zip(names, inputs, strict=True))
            if "bias" in values:
                values["bias"] = None  # takes part in no derivative
            tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
            ctx.values = values | dict.fromkeys(tensors)
            ctx.tensors = tuple(tensors)
            ctx.save_for_backward(*tensors.values())
            ctx.save_for_forward(*tensors.values())
            ctx.set_materialize_grads(False)
            outputs = (output,) if isinstance(output, torch.Tensor) else output
            ctx.outputs = [(tensor.shape, tensor.dtype) for tensor in outputs]

        @staticmethod
        def backward(ctx, *grads):
            if all(grad is None for grad in grads):
                return (None,) * len(names)
            wanted = [name for name, needed in zip(names, ctx.needs_input_grad, strict=True) if needed]
            gradients = vjp(_values(ctx), wanted, *grads)
            return tuple(gradients[name] if name in wanted and name in gradients else None for name in names)

        @staticmethod
        def jvp(ctx, *tangents):
            values = _values(ctx)
            results = jvp(values, {n: t for n, t in zip(names, tangents, strict=True) if t is not None})
            results = tuple(
                values[names[0]].new_zeros(shape, dtype=dtype) if result is None else result
                for result, (shape, dtype) in zip(results, ctx.outputs, strict=True)
            )
            return results if len(results) > 1 else results[0]

    Function = type(operator._opname, (Rules,), {})  # the name that grad_fn shows

    def autograd(*args):
        with enable_single_level_autograd_function():
            return Function.apply(*args)

    def vmap(info, in_dims, *args):
        if info.batch_size == 0:
            raise RuntimeError(f"{operator._opname}: vmap over a dimension of size 0 is not supported")
        outputs = [
            operator(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(outputs[0], torch.Tensor):
            return torch.stack(outputs), 0
        return tuple(map(torch.stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])

    torch.library.register_fake(operator, lambda *args: fake(**dict(zip(names, args, strict=True))))
    torch.library.register_vmap(operator, vmap)
    _LIBRARY.impl(operator._opname, autograd, "Autograd")


def _values(ctx):
    return ctx.values | dict(zip(ctx.tensors, ctx.saved_tensors, strict=True))


def _empty_like(input, shape):
    """An empty tensor in the memory format of `input`, as the kernels return their output."""
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


def memory_format(input: torch.Tensor) -> torch.memory_format:
    """What at::Tensor::suggest_memory_format takes [N, C, H, W] for; where both fit, it is contiguous."""
    least = 0
    for dim in (1, 3, 2, 0):
        stride = input.stride(dim)
        if stride == 0 or stride < least or (dim == 0 and least == input.stride(1)):
            return torch.contiguous_format
        least = stride * input.shape[dim] if input.shape[dim] > 1 else stride
    return torch.channels_last
