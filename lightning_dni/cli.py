"""`lightning-dni`: LightningCLI with recipes in mind, and a few commands beside it."""

import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import lightning.pytorch as pl
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from typing_extensions import override

from lightning_dni.estimators import catalog
from lightning_dni.study import command as study
from lightning_dni.study import shelf

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "study": lambda words: study.main(words, build),
    "recipes": shelf.main,
    "estimators": catalog.main,
}


SAVED = "# lightning.pytorch=="
"""How a configuration begins that LightningCLI has saved."""


class SavedConfiguration(SaveConfigCallback):
    """Saves a run's whole configuration, as `config_1.yaml` where `config.yaml` is a file of the user's."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose a name and save."""
        folder = trainer.log_dir  # on every rank: it is told to all
        if folder is not None and not self.already_saved:
            read = {Path(str(file)).resolve() for file in self.config.get("config") or ()}
            names = ("config.yaml" if not k else f"config_{k}.yaml" for k in count())
            self.config_filename = next(name for name in names if _may_be_written(Path(folder, name), read))
        super().setup(trainer, pl_module, stage)


def _may_be_written(file: Path, read: set[Path]) -> bool:
    """Whether nothing is lost: there is none, or an earlier run saved it and this one does not read it."""
    if not file.exists():
        return True
    if file.resolve() in read or not file.is_file():
        return False
    with file.open(errors="replace") as opened:
        return opened.read(len(SAVED)) == SAVED


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
        save_config_callback=SavedConfiguration,
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
