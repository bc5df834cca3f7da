"""pytorch_lightning has other classes of the same names: who mixes them is told which import to change."""

import re
import subprocess
import sys

MIXED = """
import warnings
import pytorch_lightning as other
import torch
from fits import Net, dni, loader, net, quiet_trainer
from lightning_dni import GradientMonitor

class Old(other.LightningModule):
    def training_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)

silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
for action in (
    lambda: other.Trainer(strategy=dni(), **silent),
    lambda: other.Trainer(callbacks=[GradientMonitor()], **silent).fit(Old(), loader()),
    lambda: quiet_trainer(dni()).fit(Old(), loader()),
):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            action()
        except Exception as error:
            print("error:", error)
    for each in caught:
        if "pytorch_lightning" in str(each.message):
            print("warning:", each.message)
"""


def test_the_import_to_change_is_named(pytestconfig):
    done = subprocess.run(
        [sys.executable, "-c", MIXED],
        cwd=pytestconfig.rootpath / "tests",
        capture_output=True,
        text=True,
        check=True,
    )
    trainer, early, callback, module, late = done.stdout.splitlines()
    assert re.search("error: .*a strategy for Trainers of `import lightning.pytorch as pl`", trainer)
    assert re.search("Expected a Trainer of lightning.pytorch for GradientMonitor.*Replace `import", callback)
    for warning in (early, late):
        assert re.search(r"warning: .*\['Old'\] are of pytorch_lightning.*Replace `import pytorch_", warning)
    assert module.startswith("error: `model` must be a `LightningModule`")  # Lightning's own, comes first
