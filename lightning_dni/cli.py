"""`lightning-dni`: LightningCLI with recipes in mind; nothing else parses arguments."""

import sys
from collections.abc import Sequence

import lightning.pytorch as pl
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import ArgsType, LightningCLI

from lightning_dni.estimators.catalog import print_catalog


def run(args: ArgsType = None, callbacks: Sequence[pl.Callback] = ()) -> LightningCLI:
    """Run `lightning-dni` with `args`, by default those of the command line.

    `${model.init_args.hidden_size}` in a recipe follows what the command line overrides.

    Args:
        args: Subcommand and options, as words or as a dict.
        callbacks: Callbacks beside those of the recipe.

    Returns:
        The finished run: its trainer, model and data module.
    """
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    return LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        trainer_defaults={"devices": 1, "callbacks": list(callbacks)},
        parser_kwargs={"parser_mode": "omegaconf+", "prog": "lightning-dni"},
        args=args,
    )


def main() -> None:
    """The command."""
    if sys.argv[1:2] == ["estimators"]:
        print_catalog()
        return
    run()
