"""Which layers a node's signal comes through, on its way from the image, and where each of them looked.

Deformable layers tell by themselves: what `layer.sampling(input)` gives is what the layer passes to its operator. Here
one listens while a network runs. All between them, convolutions and poolings, is read off the graph that autograd
keeps, so that it does not matter whether a network calls modules or functions.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from dk_detection.errors import UserError

# What autograd calls operations that leave every position where it is.
_POINTWISE = {
    f"{name}Backward{number}"
    for name in (
        *("Add", "Sub", "Mul", "Div", "Neg", "Cat", "Clone", "ToCopy", "Alias", "View", "UnsafeView", "ReshapeAlias"),
        *("Relu", "LeakyRelu", "PreluKernel", "Elu", "Gelu", "Silu", "Mish", "Sigmoid", "Tanh", "Softplus", "Clamp"),
        *("Hardswish", "Hardtanh", "Hardsigmoid", "NativeBatchNorm", "CudnnBatchNorm", "NativeGroupNorm", "Expand"),
    )
    for number in (0, 1)
}
_CONVOLUTION = "ConvolutionBackward0"
_POOLINGS = {"MaxPool2DWithIndicesBackward0": "max pooling", "AvgPool2DBackward0": "average pooling"}


@dataclass(eq=False)
class Call:
    """One call of a layer that says where it looks.

    Attributes:
        name: Dotted name of the module in the network.
        module: The layer.
        args: The tensors and numbers that it was called with.
        sampling: What it passed to its operator: "offset", "mask" and "kernel_offset", those that it has, or "shares"
            of a conditional convolution. They are the tensors of the forward pass themselves; a gradient by them can be
            asked for.
        source, result: Where its input and its output stand in autograd's graph; None without gradients.
    """

    name: str
    module: nn.Module
    args: tuple
    sampling: dict[str, Tensor] = field(default_factory=dict)
    source: object = None
    result: object = None


def is_dynamic(module: nn.Module) -> bool:
    """Whether a module says what it makes of its input: by a method, or as torchvision's by its arguments."""
    return _seam(module) is not None or _is_torchvisions(module)


def _seam(module: nn.Module) -> str | None:
    # Convolutions that mix experts by shares inherit a `sampling` that they do not have.
    return next((name for name in ("shares", "sampling") if callable(getattr(module, name, None))), None)


def _is_torchvisions(module: nn.Module) -> bool:
    torchvision = sys.modules.get("torchvision.ops")  # a network that has the layer has imported it
    return torchvision is not None and isinstance(module, torchvision.DeformConv2d)


@contextmanager
def listening(network: nn.Module) -> Iterator[list[Call]]:
    """Within the context, the list grows by each call of a dynamic layer, in the order of their beginning."""
    calls: list[Call] = []
    running: list[Call] = []
    handles, changed = [], []

    def before(name):
        def hook(module, args, kwargs):
            args = (*args, *kwargs.values())
            running.append(Call(name, module, args, source=_node(args[0])))
            calls.append(running[-1])

        return hook

    def at_the_seam(module, seam):
        def method(*args, **kwargs):
            values = getattr(type(module), seam)(module, *args, **kwargs)
            if running and running[-1].module is module:
                running[-1].sampling = {seam: values} if isinstance(values, Tensor) else values
            return values

        return method

    def after(module, args, output):
        call = running.pop()
        if _is_torchvisions(module):
            call.sampling = {
                name: value for name, value in zip(("offset", "mask"), call.args[1:], strict=False) if value is not None
            }
        call.result = _node(output)

    try:
        for name, module in network.named_modules():
            if not is_dynamic(module):
                continue
            handles += [
                module.register_forward_pre_hook(before(name), with_kwargs=True),
                module.register_forward_hook(after),
            ]
            if seam := _seam(module):
                setattr(module, seam, at_the_seam(module, seam))  # in front of the method of its class
                changed.append((module, seam))
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for module, seam in changed:
            delattr(module, seam)


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Within the context a network in training is in evaluation mode; afterwards each of its modules is as before."""
    before = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def offset_norms(calls: list[Call]) -> dict[str, float]:
    """By layer, how far its taps move: the root mean square length of its offsets.

    A data offset is in pixels of the layer's input, that of RoI pooling in shares of the RoI times `gamma`, a kernel
    offset, whose layer gets "/kernel" behind its name, in cells of the scope.
    """
    norms = {}
    for call in calls:
        for kind, suffix in (("offset", ""), ("kernel_offset", "/kernel")):
            if (values := call.sampling.get(kind)) is not None and values.numel():
                # each location has two coordinates
                norms[call.name + suffix] = float((2 * values.detach().double().square().mean()).sqrt())
    return norms


def _node(tensor: Tensor):
    """Where a tensor stands in autograd's graph."""
    return get_gradient_edge(tensor).node if tensor.requires_grad else None


@dataclass(frozen=True, eq=False)
class Step:
    """A layer on the way from a node to the image: output position p sees input positions p * stride - padding + taps.

    Attributes:
        name: Dotted name of a deformable layer; "convolution", "max pooling" or "average pooling" of others.
        kernel_size, stride, padding, dilation: (vertical, horizontal).
        call: Of a deformable layer, what it did.
        node: Of a rigid layer, its place in autograd's graph.
    """

    name: str
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    call: Call | None = None
    node: object = None

    @property
    def is_deformable(self) -> bool:
        """Whether its taps move in the data; those of a deformable kernel do not."""
        return self.call is not None and "offset" in self.call.sampling

    @property
    def is_convolution(self) -> bool:
        return self.name not in _POOLINGS.values()

    @property
    def num_taps(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]

    def rest(self, device=None) -> Tensor:
        """Where the taps lie for output position (0, 0), unmoved, [kH * kW, 2] = (row, column).

        Those of kernel evolution, which differ from channel to channel, where their means lie.
        """
        along = [
            torch.arange(k, dtype=torch.float64, device=device) * d - p
            for k, d, p in zip(self.kernel_size, self.dilation, self.padding, strict=True)
        ]
        taps = torch.cartesian_prod(*along).view(-1, 2)
        if self.call is not None and "location" in self.call.sampling:
            location = self.call.sampling["location"].detach().to(taps).mean(0)
            return taps.mean(0) + location * taps.new_tensor(self.dilation)
        return taps


@dataclass
class Observation:
    """What was seen while a network ran on one image.

    Attributes:
        layer: Name of the module that was looked at.
        image: [1, C, H, W], the leaf of the graph.
        output: [1, C, outH, outW], what the module gave.
        calls: Calls of all deformable layers, in order.
    """

    layer: str
    image: Tensor
    output: Tensor
    calls: list[Call]

    @cached_property
    def path(self) -> list[Step]:
        """The layers from the module back to the image, the module's own first.

        Where ways meet, the one through the most kernels of more than one tap is followed: in a residual block that is
        the main path, as in the papers' figures, and not the shortcut; in a feature pyramid it is the lateral
        connection, as enlarged maps are not followed.

        Raises:
            UserError: No way leads to the image, or each leads through an operation that is not known here.
        """
        return _longest_path(self.output, self.image, self.calls, self.layer)

    def rest_position(self, node) -> tuple[float, float]:
        """The middle of what node (row, column) sees at rest: (x, y) in the image, its first pixel [0, 1] x [0, 1]."""
        position = torch.tensor(node, dtype=torch.float64)
        for step in self.path:
            position = position * torch.tensor(step.stride) + step.rest().mean(0)
        return float(position[1]) + 0.5, float(position[0]) + 0.5

    def node_at(self, point) -> tuple[int, int]:
        """(row, column) of the node whose rest position is nearest to the point (x, y) of the image.

        Raises:
            UserError: The point is not in the image.
        """
        check_point(point, self.image.shape[2:])
        (x0, y0), (x1, y1) = self.rest_position((0, 0)), self.rest_position((1, 1))
        rows, columns = self.output.shape[2:]
        row, column = round((point[1] - y0) / (y1 - y0)), round((point[0] - x0) / (x1 - x0))
        return min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)


def check_point(point, size: tuple[int, int]) -> None:
    """Raises UserError if a point (x, y) is not in an image of a size (height, width)."""
    height, width = size
    if not (0 <= point[0] <= width and 0 <= point[1] <= height):
        raise UserError(f"the point ({point[0]:g}, {point[1]:g}) is outside of the image of {width} x {height} pixels")


def observe(
    network: nn.Module, image: Tensor, layer: str, run: Callable[[Tensor], object] | None = None
) -> Observation:
    """Runs a network on an image and looks at one of its modules.

    Args:
        network: Any network in evaluation mode.
        image: [1, C, H, W], what the network takes.
        layer: Dotted name of the module whose nodes are asked for, such as "layer4.1.conv2".
        run: How to run it; None: `network(image)`. For a detector, what runs its backbone is enough.

    Returns:
        What was seen.

    Raises:
        UserError: The network is in training mode, has no such module, or the module did not run exactly once or gives
            no map.
    """
    module = find_layer(network, layer)
    check_image(image)
    leaf = image.detach().clone().requires_grad_()
    outputs = []
    with torch.enable_grad(), listening(network) as calls:
        handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            (run or network)(leaf)
        finally:
            handle.remove()
    if len(outputs) != 1:
        raise UserError(f"{layer} ran {len(outputs)} times; a module that runs once for an image is needed")
    if not isinstance(outputs[0], Tensor) or outputs[0].dim() != 4:
        raise UserError(f"{layer} gives no map [1, C, H, W], so it has no nodes with a place in the image")
    return Observation(layer, leaf, outputs[0], calls)


def find_layer(network: nn.Module, layer: str) -> nn.Module:
    """The module of a name, in a network that is ready to be looked at.

    Raises:
        UserError: The network is in training mode, or has no such module.
    """
    if network.training:
        raise UserError("the network is in training mode, where it gives other responses: call network.eval() before")
    modules = dict(network.named_modules())
    if layer not in modules:
        near = [name for name in modules if name.rpartition(".")[2] == layer.rpartition(".")[2]]
        raise UserError(f"the network has no module {layer!r}" + (f"; near: {', '.join(near[-3:])}" if near else ""))
    return modules[layer]


def check_image(image: Tensor) -> None:
    """Raises UserError if a tensor is not one image [1, C, H, W] of floating-point numbers."""
    if image.dim() != 4 or len(image) != 1 or not image.is_floating_point():
        raise UserError(f"image must be [1, C, H, W] in floating point, got shape {list(image.shape)}, {image.dtype}")


def default_layer(network: nn.Module, prefix: str = "") -> str:
    """The last convolution of more than one tap, in the order of the modules: what to look at where nothing is named.

    Args:
        network: Any network.
        prefix: Of the names that are meant, such as "backbone.".

    Returns:
        A dotted name.

    Raises:
        UserError: There is none.
    """
    modules = dict(network.named_modules())
    branches = tuple(f"{name}." for name, module in modules.items() if is_dynamic(module))
    convolutions = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
        if name.startswith(prefix) and not name.startswith(branches)
    ]
    if not convolutions:
        raise UserError(f"the network has no convolution of more than one tap under {prefix!r}")
    return convolutions[-1]


def _longest_path(output: Tensor, image: Tensor, calls: list[Call], layer: str) -> list[Step]:
    by_result = {call.result: call for call in calls if call.result is not None}
    end = _node(image)
    unknown: set[str] = set()

    def ways(node):
        """What is before a node of the graph: (step, node) each; the step None if positions stay."""
        if call := by_result.get(node):
            return [(_step_of(call), call.source)]
        if step := _rigid_step(node):
            return [(step, node.next_functions[0][0])]
        if node.name() in _POINTWISE:
            return [(None, other) for other, _ in node.next_functions]
        if node is not end and node.next_functions:
            unknown.add(node.name())
        return []

    # For each node the best way on: ((kernels of more than one tap, layers), step, next node), None if there is none.
    best: dict[object, tuple | None] = {end: ((0, 0), None, None)}
    start = _node(output)
    todo = [start] if start is not None else []
    while todo:
        node = todo[-1]
        before = [] if node in best else ways(node)
        missing = [other for _, other in before if other is not None and other not in best]
        if missing:
            todo += missing
            continue
        todo.pop()
        if node in best:
            continue
        best[node] = None
        for step, other in before:
            if other is None or best[other] is None:
                continue
            kernels, layers = best[other][0]
            length = (kernels + (step is not None and step.num_taps > 1), layers + (step is not None))
            if best[node] is None or length > best[node][0]:
                best[node] = (length, step, other)
    if start is None or best[start] is None:
        reason = f"; the ways lead through {', '.join(sorted(unknown))}, which are not followed" if unknown else ""
        raise UserError(f"{layer} does not depend on the image by convolutions and poolings{reason}")
    path, node = [], start
    while node is not end:
        _, step, node = best[node]
        if step is not None:
            path.append(step)
    return path


def _step_of(call: Call) -> Step:
    module = call.module
    geometry = {name: _pair(getattr(module, name)) for name in ("kernel_size", "stride", "padding", "dilation")}
    return Step(call.name, **geometry, call=call)


def _rigid_step(node) -> Step | None:
    """A rigid layer, if a node of autograd's graph is one. Nodes keep an operator's arguments as `_saved_*`."""
    name = node.name()
    if name == _CONVOLUTION and not node._saved_transposed and len(node._saved_stride) == 2:
        kernel_size, label, dilation = tuple(node._saved_weight.shape[2:]), "convolution", node._saved_dilation
    elif name in _POOLINGS:
        kernel_size, label = node._saved_kernel_size, _POOLINGS[name]
        dilation = getattr(node, "_saved_dilation", (1, 1))
    else:
        return None
    stride = node._saved_stride or kernel_size  # pooling without a stride steps by its kernel
    return Step(label, _pair(kernel_size), _pair(stride), _pair(node._saved_padding), _pair(dilation), node=node)


def _pair(value) -> tuple[int, int]:
    """An int, a pair, or the one number that stands for two."""
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * 2 if len(value) == 1 else value
