"""The paper's instruments: what a network trained on synthetic gradients has become."""

from lightning_dni.analysis.probes import LinearProbe, fit_probe
from lightning_dni.analysis.representations import (
    class_block_distances,
    dissimilarity,
    layer_outputs,
    order_by_class,
    weight_norm_profile,
)

__all__ = [
    "LinearProbe",
    "class_block_distances",
    "dissimilarity",
    "fit_probe",
    "layer_outputs",
    "order_by_class",
    "weight_norm_profile",
]
