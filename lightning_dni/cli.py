"""`lightning-dni`: LightningCLI with recipes in mind; nothing else parses arguments."""

import lightning.pytorch as pl
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override


class DNICLI(LightningCLI):
    """LightningCLI for any module and data module, with OmegaConf interpolation in its YAML."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"trainer.devices": 1})


def run(args: ArgsType = None) -> DNICLI:
    """Run `lightning-dni` with `args`, by default those of the command line.

    `${model.init_args.hidden_size}` in a recipe follows what the command line overrides.

    Returns:
        The finished run: its trainer, model and data module.
    """
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    return DNICLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_kwargs={"parser_mode": "omegaconf+", "prog": "lightning-dni"},
        args=args,
    )


def main() -> None:
    """The command."""
    run()
