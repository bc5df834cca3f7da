"""What older supported versions of torch and Lightning do otherwise, as marks for tests."""

import inspect

import lightning.pytorch as pl
import pytest
import torch
from packaging.version import Version

TORCH, LIGHTNING = Version(torch.__version__), Version(pl.__version__)

newer_torch = pytest.mark.skipif(Version("2.6") > TORCH, reason="older torch exports and compiles otherwise")
newer_lightning = pytest.mark.skipif(
    Version("2.6") > LIGHTNING, reason="older Lightning does not know what is asked here"
)
safe_loading = pytest.mark.skipif(
    "weights_only" not in inspect.signature(pl.Trainer.fit).parameters,
    reason="older Lightning has no `weights_only` to pass",
)
