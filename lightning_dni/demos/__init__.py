"""Tiny models and data modules for recipes, tests and docstrings."""

from lightning_dni.demos.cifar import CIFAR10DataModule
from lightning_dni.demos.clocks import ClocksDataModule, TwoClocksModel
from lightning_dni.demos.copying import CopyCurriculum, CopyDataModule, CopyModel
from lightning_dni.demos.digits import DigitsDataModule
from lightning_dni.demos.gpt import GPT
from lightning_dni.demos.language import GPTLanguageModel
from lightning_dni.demos.mnist import MNISTDataModule
from lightning_dni.demos.models import ConvClassifier, MLPClassifier
from lightning_dni.demos.random_labels import RandomLabelsDataModule
from lightning_dni.demos.reading import CharacterModel, ReadingDataModule
from lightning_dni.demos.resnet import ResNet, ResNetClassifier
from lightning_dni.demos.text import TextDataModule, count_tokens

__all__ = [
    "GPT",
    "CIFAR10DataModule",
    "CharacterModel",
    "ClocksDataModule",
    "ConvClassifier",
    "CopyCurriculum",
    "CopyDataModule",
    "CopyModel",
    "DigitsDataModule",
    "GPTLanguageModel",
    "MLPClassifier",
    "MNISTDataModule",
    "RandomLabelsDataModule",
    "ReadingDataModule",
    "ResNet",
    "ResNetClassifier",
    "TextDataModule",
    "TwoClocksModel",
    "count_tokens",
]
