"""What docs/recurrent.md shows runs, and trains the estimator that it names."""

import re
import warnings

import torch


def test_the_guides_example_trains_on_synthetic_gradients(pytestconfig):
    (code,) = re.findall(
        r"```python\n(.*?)```", (pytestconfig.rootpath / "docs/recurrent.md").read_text(), re.S
    )
    found = {}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, found)
    assert found["trainer"].global_step == 20
    (estimator,) = found["strategy"].engine.estimators.values()
    assert estimator.map.weight.shape == (64, 64)
    assert estimator.map.weight.any()
