"""`python -m lightning_dni` is `lightning-dni`."""

from lightning_dni.cli import main

main()
