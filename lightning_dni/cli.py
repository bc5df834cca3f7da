"""`lightning-dni`: LightningCLI with recipes in mind, and a few commands beside it."""

import sys
from collections.abc import Callable, Sequence

import lightning.pytorch as pl
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_dni.estimators import catalog
from lightning_dni.study import command as study
from lightning_dni.study import shelf

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "study": lambda words: study.main(words, build),
    "recipes": shelf.main,
    "estimators": catalog.main,
}


class RecipeCLI(LightningCLI):
    """LightningCLI for YAMLs that say in a block `recipe` what they show."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Accept the block; nothing depends on it."""
        parser.add_argument("--recipe", type=dict | None, default=None, help="claim, minutes and tags")


def run(
    args: ArgsType = None, callbacks: Sequence[pl.Callback] = (), *, execute: bool = True
) -> LightningCLI:
    """Run `lightning-dni` with `args`, by default those of the command line.

    `${model.init_args.hidden_size}` in a recipe follows what the command line overrides.

    Args:
        args: Subcommand and options, as words or as a dict.
        callbacks: Callbacks beside those of the recipe.
        execute: Whether there is a subcommand that is run; else model, data and trainer are built, no more,
            and wrong options raise instead of ending the process.

    Returns:
        The finished run: its trainer, model and data module.
    """
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    return RecipeCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        trainer_defaults={"devices": 1, "callbacks": list(callbacks)},
        parser_kwargs={
            "parser_mode": "omegaconf+",
            "prog": "lightning-dni",
            "epilog": f"Beside these, with a --help of their own: {', '.join(COMMANDS)}",
            "exit_on_error": execute,
        },
        args=args,
        run=execute,
    )


def build(words: Sequence[str]) -> LightningCLI:
    """Model, data and trainer of one run of a study."""
    return run(list(words), execute=False)


def main() -> None:
    """The command."""
    command = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if command is None:
        run()
    else:
        sys.exit(command(sys.argv[2:]))
