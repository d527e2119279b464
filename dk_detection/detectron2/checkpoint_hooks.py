"""Lets checkpoints of rigid networks, and of Detectron2's own deformable ones, into exchanged layers.

Detectron2's checkpointer drops a tensor whose shape is not that of the parameter of the same name before the network
sees it, and so would drop a rigid weight on its way into a larger one. Therefore a layer that lifts its weight is saved
with it as `lifted_weight`: then `weight` is always the rigid one, gets past the checkpointer, and the layer lifts it.
"""

from collections.abc import Iterator

from torch import nn

from dk_detection.checkpoint_names import LIFTED_WEIGHT
from dk_detection.layers._base import RigidAtRest
from dk_detection.layers._lifted import LiftedAtRest


def accept_rigid_checkpoints(network: nn.Module) -> None:
    """Lets weights of the rigid network into its exchanged layers, by the rigid network's names. May be called again.

    What is understood besides this network's own names: rigid weights, also those whose names lack a prefix, as in the
    files of pretrained backbones; and the offset branches of Detectron2's own deformable blocks, `conv2_offset`.

    Args:
        network: A network with layers of dk_detection at any depth, best the whole detector.
    """
    for _, layer in _layers(network):
        if isinstance(layer, LiftedAtRest):
            layer.register_state_dict_post_hook(_rename_when_saving)
            layer.register_load_state_dict_pre_hook(_rename_when_loading)
    network.register_load_state_dict_pre_hook(_translate)


def _layers(network: nn.Module) -> Iterator[tuple[str, RigidAtRest]]:
    return ((name, layer) for name, layer in network.named_modules() if isinstance(layer, RigidAtRest))


def _rename_when_saving(layer, state_dict, prefix, local_metadata) -> None:
    if prefix + "weight" in state_dict:
        state_dict[prefix + LIFTED_WEIGHT] = state_dict.pop(prefix + "weight")


def _rename_when_loading(layer, state_dict, prefix, *args) -> None:
    if prefix + LIFTED_WEIGHT in state_dict:
        state_dict[prefix + "weight"] = state_dict.pop(prefix + LIFTED_WEIGHT)


def _translate(network, state_dict, prefix, *args) -> None:
    """Gives what is meant for an exchanged layer the name by which the layer looks for it."""
    for name, layer in _layers(network):
        known = {"weight": layer.rigid_shape} if isinstance(layer, LiftedAtRest) else {}
        if isinstance(offset := getattr(layer, "conv_offset", None), nn.Conv2d):
            known |= {f"conv_offset.{key}": tensor.shape for key, tensor in offset.named_parameters()}
        for key, shape in known.items():
            target = f"{prefix}{name}.{key}"
            if target in state_dict or (key == "weight" and f"{prefix}{name}.{LIFTED_WEIGHT}" in state_dict):
                continue
            source = target.replace(".conv_offset.", "_offset.")
            # Names that the checkpointer could not match, such as this one's without a prefix, pass as they are.
            parts = source.split(".")
            for candidate in (".".join(parts[start:]) for start in range(len(parts) - 1)):
                if candidate in state_dict and state_dict[candidate].shape == shape:
                    state_dict[target] = state_dict.pop(candidate)
                    break
