"""How far a synthetic gradient is from the true one."""

from lightning_dni.metrics.functional import (
    gradient_cosine,
    gradient_norm_ratio,
    gradient_relative_error,
    gradient_row_cosine,
    gradient_sign_agreement,
)
from lightning_dni.metrics.gradient import (
    GradientCosineSimilarity,
    GradientNormRatio,
    GradientRelativeError,
    GradientSignAgreement,
)

__all__ = [
    "GradientCosineSimilarity",
    "GradientNormRatio",
    "GradientRelativeError",
    "GradientSignAgreement",
    "gradient_cosine",
    "gradient_norm_ratio",
    "gradient_relative_error",
    "gradient_row_cosine",
    "gradient_sign_agreement",
]
