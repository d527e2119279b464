"""What a network looks at: sampling locations, receptive fields, saliency, dilation and dynamics of any nn.Module.

Nothing here needs a detection framework or the compiled library, and nothing that trains imports it. `observe` runs a
network and sees what its deformable layers pass to their operators (`layer.sampling`) and, in autograd's graph, which
layers lie between them and the image; the other functions read what was seen. Pictures, `pictures`, need matplotlib,
t-SNE scikit-learn.
"""

from dk_detection.visualization.dilation import DilationTable, effective_dilation
from dk_detection.visualization.dynamics import embed, nearest_neighbour_figures, object_dynamics
from dk_detection.visualization.figures import SamplingFigures
from dk_detection.visualization.locations import (
    Locations,
    bin_locations,
    kernel_locations,
    learned_taps,
    sampling_locations,
)
from dk_detection.visualization.paths import (
    Observation,
    default_layer,
    evaluation_mode,
    is_dynamic,
    listening,
    observe,
    offset_norms,
)
from dk_detection.visualization.support import Region, effective_receptive_field, node_response, saliency_region

__all__ = [
    "DilationTable",
    "Locations",
    "Observation",
    "Region",
    "SamplingFigures",
    "bin_locations",
    "default_layer",
    "effective_dilation",
    "effective_receptive_field",
    "embed",
    "evaluation_mode",
    "is_dynamic",
    "kernel_locations",
    "learned_taps",
    "listening",
    "nearest_neighbour_figures",
    "node_response",
    "object_dynamics",
    "observe",
    "offset_norms",
    "saliency_region",
    "sampling_locations",
]
