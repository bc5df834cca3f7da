"""The instruments of Czarnecki et al. 2017, for recipes, callbacks and tests; torch alone.

Critical points (section 3): `stationarity`, `representation_error`, and the counter-example of supplement A,
`descend` on `loss_surface`. Learning dynamics (section 4): `regress`, `train_deep_linear`,
`TrackingInstrument` and `InjectedErrorEstimator`, on `artificial_data`. The implicit loss (section 5):
`implicit_loss`, `conservation_of` and `loss_surfaces`. Representations (section 5): `dissimilarity`,
`class_block_distances`, `fit_probe`, `weight_norm_profile` and its slope, on `layer_outputs`.
"""

from lightning_dni.analysis.counter_example import Surface, Trajectory, descend, loss_surface
from lightning_dni.analysis.critical import Stationarity, representation_error, stationarity
from lightning_dni.analysis.data import ArtificialData, artificial_data, one_hot
from lightning_dni.analysis.deep import DeepRun, deep_linear, train_deep_linear
from lightning_dni.analysis.field import Conservation, GradientField, conservation, conservation_of
from lightning_dni.analysis.implicit import LossSurfaces, implicit_loss, loss_surfaces, plane, quadratic_loss
from lightning_dni.analysis.injection import InjectedErrorEstimator
from lightning_dni.analysis.linear import (
    LinearMap,
    fit_linear_map,
    log_loss_map,
    softmax_map,
    squared_error_map,
    squared_error_map_below,
)
from lightning_dni.analysis.probes import LinearProbe, fit_probe
from lightning_dni.analysis.regression import RegressionRun, output_gradient, regress, row_losses
from lightning_dni.analysis.representations import (
    class_block_distances,
    dissimilarity,
    layer_outputs,
    order_by_class,
    weight_norm_profile,
    weight_norm_slope,
)
from lightning_dni.analysis.tracking import (
    TrackingCondition,
    TrackingInstrument,
    largest_singular_value,
    tracking_condition,
)

__all__ = [
    "ArtificialData",
    "Conservation",
    "DeepRun",
    "GradientField",
    "InjectedErrorEstimator",
    "LinearMap",
    "LinearProbe",
    "LossSurfaces",
    "RegressionRun",
    "Stationarity",
    "Surface",
    "TrackingCondition",
    "TrackingInstrument",
    "Trajectory",
    "artificial_data",
    "class_block_distances",
    "conservation",
    "conservation_of",
    "deep_linear",
    "descend",
    "dissimilarity",
    "fit_linear_map",
    "fit_probe",
    "implicit_loss",
    "largest_singular_value",
    "layer_outputs",
    "log_loss_map",
    "loss_surface",
    "loss_surfaces",
    "one_hot",
    "order_by_class",
    "output_gradient",
    "plane",
    "quadratic_loss",
    "regress",
    "representation_error",
    "row_losses",
    "softmax_map",
    "squared_error_map",
    "squared_error_map_below",
    "stationarity",
    "tracking_condition",
    "train_deep_linear",
    "weight_norm_profile",
    "weight_norm_slope",
]
