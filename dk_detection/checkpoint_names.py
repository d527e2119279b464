"""How the two frameworks call the parameters of the same detector."""

# The weight of a layer that lifts it (see dk_detection.layers._base) in checkpoints of Detectron2, so that `weight` is
# always the rigid one there.
LIFTED_WEIGHT = "lifted_weight"
