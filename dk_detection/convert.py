"""Turns a finished network into a deformable one."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn

from dk_detection.layers import table
from dk_detection.layers._base import RigidAtRest
from dk_detection.layers._scope import WithScope

Select = str | Iterable[str] | Callable[[str, nn.Conv2d], bool]


def to_deformable(module: nn.Module, layer: type[nn.Conv2d] | str, *, select: Select, **layer_options) -> list[str]:
    """Exchanges rigid convolutions of a network, in place, for deformable ones that compute the same for now.

    The new layers keep the weights, device, data type, memory format, `requires_grad` and training flag of what they
    replace, and their offset branches are at rest: the network's output stays the same up to rounding. The branches of
    a frozen convolution, one whose weight requires no gradient, are frozen too. A convolution that sits in several
    places stays one. If anything is wrong, the error comes before the first exchange.

    Call this before you build the optimiser: the parameters are new objects. Checkpoints of the rigid network load into
    the deformable one, and so do those whose offset branches are called as in Detectron2 or MMDetection 1.

    Args:
        module: The network, of any origin. It must not be a convolution itself.
        layer: The class of the new layers or its token in `dk_detection.layers.table`, such as "mdconv".
        select: Which convolutions: a function of (dotted name, convolution), or one or several names or shell patterns
            (`*` passes dots: "layer[34].*.conv2"), each of which has to match something. Layers that are deformable
            already are never selected, nor are their offset branches.
        layer_options: Further arguments of the layer, such as `offset_groups=4`.

    Returns:
        The dotted names at which a layer was exchanged, in the order of `module.named_modules()`.

    Raises:
        ValueError: Nothing is selected; no layer has the token; or a selected convolution cannot be exchanged without
            loss, because it computes something else than nn.Conv2d, has hooks, parametrisations, further or shared
            parameters, or a padding mode or geometry that the layer does not take.
        TypeError: An argument is of the wrong type, or `layer_options` do not fit the layer.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"to_deformable: module must be an nn.Module, got {type(module).__name__}")
    if isinstance(module, nn.Conv2d):
        raise TypeError(
            f"to_deformable: module must hold the convolutions, but is one itself ({type(module).__name__}); "
            "pass the module that holds it, or use the layer's from_rigid(conv)"
        )
    if isinstance(layer, str):
        layer = table.find(layer).layer
    if not (isinstance(layer, type) and issubclass(layer, RigidAtRest)):
        raise TypeError(f"to_deformable: layer must be a convolution layer of dk_detection or its token, got {layer!r}")

    convs = dict(_rigid_convs(module))
    chosen = _choose(convs, select)
    owners = _parameter_owners(module)
    exchanged = {}
    for name in chosen:
        conv = convs[name]
        try:
            _check_exchangeable(conv, owners)
            exchanged[conv] = layer.from_rigid(conv, **layer_options)
        except ValueError as error:
            raise ValueError(f"to_deformable: cannot exchange {name!r} ({type(conv).__name__}): {error}") from error

    if not any(isinstance(child, RigidAtRest) for child in module.modules()):
        translate_names(module)
    names = [name for name, conv in convs.items() if conv in exchanged]
    for name in names:
        parent, _, child = name.rpartition(".")
        module.get_submodule(parent).register_module(child, exchanged[convs[name]])
    return names


def exchanges(exchange: Mapping | Iterable[Mapping]) -> list[dict]:
    """The grammar that says which layer stands where, as arguments of `to_deformable`.

    It is the same in Python, in MMDetection's configs, in LazyConfigs and in YAML:
    `[dict(layer="mdconv", select="layer[234].*.conv2", offset_groups=4), ...]`, carried out one after the other::

        for arguments in exchanges(exchange):
            to_deformable(network, **arguments)

    Args:
        exchange: A mapping of `layer`, `select` and options of the layer, or several of them.

    Returns:
        A dictionary of arguments for each exchange.

    Raises:
        TypeError: It is something else.
        ValueError: A mapping lacks `layer` or `select`.
    """
    several = [exchange] if isinstance(exchange, Mapping) else exchange
    if isinstance(several, str) or not isinstance(several, Iterable):
        raise TypeError(f"exchange must be dict(layer=..., select=...) or several of them, got {exchange!r}")
    several = list(several)
    for arguments in several:
        if not isinstance(arguments, Mapping):
            raise TypeError(f"exchange must hold dict(layer=..., select=...), got {arguments!r}")
        if missing := [key for key in ("layer", "select") if key not in arguments]:
            raise ValueError(f"exchange needs {missing[0]}=... in {dict(arguments)}")
    return [dict(arguments) for arguments in several]


def translate_names(module: nn.Module) -> nn.Module:
    """Makes a network understand checkpoints that keep an offset branch beside its layer, `conv2_offset` by `conv2`.

    Those are Detectron2's and MMDetection 1's. A layer cannot do this by itself: torch shows it its own part of a state
    dict only. `to_deformable` calls this; a network that was built of our layers needs it before it loads such a file,
    and refuses the file until then. May be called again.

    Args:
        module: The network.

    Returns:
        The network.
    """
    module.register_load_state_dict_pre_hook(_translate_names)
    return module


def _translate_names(module: nn.Module, state_dict, prefix, *args) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, RigidAtRest):
            layer.translate_names(state_dict, f"{prefix}{name}.")


def fold_scopes(module: nn.Module) -> nn.Module:
    """Computes the scope of every deformable kernel of a network once and for all, in place.

    For inference and export: the results stay the same, and nothing of the parametrisation is computed any more. A
    layer's `parametrisation` is "paper" afterwards, and its weight in state dicts is `scope_weight`.

    Args:
        module: The network.

    Returns:
        The network.
    """
    for layer in module.modules():
        if isinstance(layer, WithScope):
            layer.fold()
    return module


def _rigid_convs(module: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Every place of every convolution, except our layers and what is inside them."""
    ours = ()
    for name, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, RigidAtRest):
            ours += (f"{name}.",)
        elif isinstance(child, nn.Conv2d) and not name.startswith(ours):
            yield name, child


def _choose(convs: dict[str, nn.Conv2d], select: Select) -> list[str]:
    if callable(select):
        chosen = [name for name, conv in convs.items() if select(name, conv)]
        unmatched = [] if chosen else [getattr(select, "__name__", repr(select))]
    else:
        patterns = list(select) if isinstance(select, Iterable) and not isinstance(select, str) else [select]
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"to_deformable: select must be a function, a pattern or several patterns, got {select!r}")
        matches = {pattern: [name for name in convs if fnmatchcase(name, pattern)] for pattern in patterns}
        chosen = [name for name in convs if any(name in names for names in matches.values())]
        unmatched = [pattern for pattern, names in matches.items() if not names] or ([] if patterns else [select])
    if unmatched:
        examples = list(convs)[:: max(1, len(convs) // 5)]
        there_are = f"there are {len(convs)}, such as {', '.join(examples)}" if convs else "there is none"
        raise ValueError(
            f"to_deformable: select={unmatched[0]!r} matches no rigid nn.Conv2d of the module ({there_are})"
        )
    return chosen


def _parameter_owners(module: nn.Module) -> dict[nn.Parameter, list[str]]:
    owners = {}
    for name, child in module.named_modules():
        for parameter in child.parameters(recurse=False):
            owners.setdefault(parameter, []).append(name)
    return owners


def _check_exchangeable(conv: nn.Conv2d, owners: dict[nn.Parameter, list[str]]) -> None:
    """Raises ValueError unless weight, bias and hyper-parameters are all there is to know about `conv`."""
    for name in ("weight", "bias"):
        value = getattr(conv, name)
        if value is None:
            continue
        # Parametrised, normalised and pruned modules hold a computed tensor here, lazy ones an uninitialised parameter.
        if type(value) is not nn.Parameter:
            raise ValueError(f"its {name} is not a plain nn.Parameter but a {type(value).__name__}")
        if len(owners[value]) > 1:
            raise ValueError(
                f"its {name} is shared by several modules ({', '.join(owners[value])}) and would not stay so"
            )
    if hooks := [name for name, value in vars(conv).items() if name.endswith("_hooks") and value]:
        raise ValueError(f"it has hooks ({', '.join(hooks)}), which would be lost; remove them first")
    held = [name for name, _ in (*conv.named_parameters(), *conv.named_buffers())]
    if extra := [name for name in held if name not in ("weight", "bias")]:
        raise ValueError(f"it holds more than a weight and a bias ({', '.join(extra)}), which would be lost")
    if not _computes_conv2d(conv):
        raise ValueError("its forward does not compute what nn.Conv2d computes with the same weight, bias and geometry")


def _computes_conv2d(conv: nn.Conv2d) -> bool:
    """Whether a convolution's own forward, if it has one, gives nn.Conv2d's results.

    Frameworks subclass nn.Conv2d both to change it (padding by the input's size, standardised weights) and to guard it
    against something (empty inputs, old versions of torch). Names do not tell which, so a copy of the convolution is
    run: on random weights, as the real ones may be zero; in both modes, as noise may be for training only; and on
    inputs of every remainder modulo the stride, as padding may depend on it.
    """
    if "forward" in vars(conv):
        return False
    if type(conv).forward is nn.Conv2d.forward and type(conv)._conv_forward is nn.Conv2d._conv_forward:
        return True
    generator = torch.Generator("cpu").manual_seed(0)
    probe = copy.deepcopy(conv).to_empty(device="cpu").double()
    smallest = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.normal_(generator=generator)
        for training in (False, True):
            probe.train(training)
            for more in range(max(conv.stride) + 1):
                size = [side + more for side in smallest]
                shape = (2, conv.in_channels, *size)
                x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
                expected = nn.Conv2d._conv_forward(probe, x, probe.weight, probe.bias)
                try:
                    output = probe(x)
                except Exception:  # another signature, for example: whatever it is, it is not a plain convolution
                    return False
                if output.shape != expected.shape or not torch.allclose(output, expected, rtol=1e-9, atol=1e-9):
                    return False
    return True
