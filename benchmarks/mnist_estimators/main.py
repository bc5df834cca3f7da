"""Test error of every estimator on MNIST: a smoke test of everything, nothing in it is tuned.

python benchmarks/mnist_estimators/main.py [--data-dir data/mnist] [--seeds 3] [--steps 1500]

A fully connected net of 256 units with batch norm, cut after every hidden layer, batch 256, Adam 1e-3 for
the net and for the estimators. Finished runs are in results.csv beside this file and are not repeated.
"""

import argparse
import csv
import logging
import statistics
import warnings
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table

from lightning_dni import DNIStrategy
from lightning_dni.demos import MLPClassifier, MNISTDataModule
from lightning_dni.estimators import CriticEstimator, LinearEstimator, LocalLossEstimator, ZeroEstimator

RESULTS = Path(__file__).with_name("results.csv")
FIELDS = ("hidden", "method", "seed", "steps", "test_error")
DEPTHS = (3, 6)
METHODS = {
    "backprop": None,
    "local loss": partial(LocalLossEstimator, num_classes=10),
    "critic": partial(CriticEstimator, num_classes=10),
    "linear, labels": partial(LinearEstimator, num_classes=10),
    "linear": LinearEstimator,
    "zero": ZeroEstimator,
}


def train(hidden: int, method: str, seed: int, steps: int, data: MNISTDataModule) -> float:
    """Train one net; returns its test error in percent."""
    pl.seed_everything(seed, verbose=False)
    model = MLPClassifier(input_size=784, hidden_size=256, num_hidden=hidden, learning_rate=1e-3)
    factory = METHODS[method]
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        strategy="auto" if factory is None else DNIStrategy(["net.hidden_*"], factory),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, data)
    return float(trainer.test(model, data, verbose=False)[0]["test_error"])


def read() -> list[dict[str, str]]:
    """The runs finished so far."""
    if not RESULTS.exists():
        return []
    with RESULTS.open() as file:
        return list(csv.DictReader(file))


def show(rows: list[dict[str, str]]) -> None:
    """Print mean and spread over seeds."""
    table = Table(title="MNIST test error in %, mean ± standard deviation over seeds")
    for heading in ("method", "learns from the network above", *(f"{d} hidden layers" for d in DEPTHS)):
        table.add_column(heading)
    for method, factory in METHODS.items():
        made = getattr(factory, "func", factory)
        above = "(is the network)" if made is None else "yes" if made.needs else "no"
        cells = []
        for hidden in DEPTHS:
            errors = [
                float(r["test_error"]) for r in rows if (r["method"], r["hidden"]) == (method, str(hidden))
            ]
            spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
            cells.append(f"{statistics.mean(errors):.2f}{spread} ({len(errors)})" if errors else "-")
        table.add_row(method, above, *cells)
    Console().print(table)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", default="data/mnist")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = MNISTDataModule(data_dir=args.data_dir, batch_size=256, val_size=0)
    for seed in range(args.seeds):
        for hidden in DEPTHS:
            for method in METHODS:
                key = {"hidden": str(hidden), "method": method, "seed": str(seed), "steps": str(args.steps)}
                if any(key.items() <= row.items() for row in read()):
                    continue
                error = train(hidden, method, seed, args.steps, data)
                fresh = not RESULTS.exists()
                with RESULTS.open("a", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS)
                    if fresh:
                        writer.writeheader()
                    writer.writerow({**key, "test_error": f"{error:.2f}"})
                print(f"{hidden} hidden, {method}, seed {seed}: {error:.2f} %", flush=True)
    show(read())


if __name__ == "__main__":
    main()
