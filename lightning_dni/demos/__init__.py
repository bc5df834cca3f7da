"""Tiny models and data modules for recipes, tests and docstrings."""

from lightning_dni.demos.digits import DigitsDataModule
from lightning_dni.demos.mnist import MNISTDataModule
from lightning_dni.demos.models import ConvClassifier, MLPClassifier

__all__ = ["ConvClassifier", "DigitsDataModule", "MLPClassifier", "MNISTDataModule"]
