"""Estimators that ignore labels of padding."""

from functools import partial

from lightning_dni.estimators import (
    CriticCascade,
    CriticEstimator,
    LinearEstimator,
    LocalLossEstimator,
    LowRankEstimator,
    MLPEstimator,
    ProbeEstimator,
    SobolevEstimator,
)

PADDING = -100
REGRESSORS = {
    "linear": LinearEstimator,
    "mlp": partial(MLPEstimator, hidden_sizes=(7,), batch_norm=False),
    "low_rank": partial(LowRankEstimator, rank=3),
}
HEADS = {
    "local_loss": partial(LocalLossEstimator, hidden_sizes=(7,)),
    "probe": ProbeEstimator,
    "critic": partial(CriticEstimator, hidden_sizes=(7,)),
    "critic-share": partial(CriticEstimator, label_share=0.4),
    "sobolev": SobolevEstimator,
    "sobolev-share": partial(SobolevEstimator, hidden_sizes=(7,), derivative_weight=3.0, label_share=0.4),
    "cascade": partial(CriticCascade, hidden_sizes=(7,)),
}
MAKES = REGRESSORS | HEADS
BY_ROW = MAKES | {"similarity": partial(LocalLossEstimator, similarity=0.7)}
"""With one label for each row."""
