"""The README's lines run as they stand, and so does the estimator in the guide."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def test_the_ten_lines_run(tmp_path):
    (block,) = python_blocks("README.md")
    assert len([line for line in block.splitlines() if line]) <= 10
    script = block + "\nassert trainer.callback_metrics['val_accuracy'] > 0.9, trainer.callback_metrics\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert "dni_true_gradient_cosine/net_hidden_0" in metrics.read_text()


def test_the_guides_estimator_trains():
    (block,) = python_blocks("docs/extending.md")
    use = """
from lightning_dni.core import DNIEngine
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
engine, x = DNIEngine(model, ["1"], BiasEstimator), torch.randn(16, 3)
with engine:
    for _ in range(3):
        with engine.training_step((x, None)):
            loss = model(x).square().mean()
        engine.backward(loss)
        engine.update_estimators()
assert engine.estimators["1"].constant.any()
assert model[0].weight.grad.any()
"""
    done = subprocess.run([sys.executable, "-c", block + use], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_relative_link_leads_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
