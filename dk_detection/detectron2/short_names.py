"""Lets files of pretrained backbones into exchanged layers.

The names in such a file lack the prefix that the backbone has in a detector. Detectron2's checkpointer finds the whole
name of a parameter that the network has under the same end of a name. It finds none for what has another name in an
exchanged layer: the rigid weight of a layer that lifts it, and the offset branches of Detectron2's own blocks.
"""

from torch import nn

from dk_detection.layers._base import RigidAtRest


def accept_short_names(network: nn.Module) -> None:
    """Completes names that are the end of an exchanged layer's, when a state dict is loaded. May be called again.

    Args:
        network: A network with layers of dk_detection at any depth, best the whole detector.
    """
    network.register_load_state_dict_pre_hook(_complete)


def _complete(network, state_dict, prefix, *args) -> None:
    for name, layer in network.named_modules():
        if not isinstance(layer, RigidAtRest):
            continue
        parts = f"{prefix}{name}".split(".")
        for short in (".".join(parts[start:]) for start in range(1, len(parts) - 1)):
            for key in [key for key in state_dict if key.startswith((f"{short}.", f"{short}_offset."))]:
                state_dict[f"{prefix}{name}{key.removeprefix(short)}"] = state_dict.pop(key)
