"""`lightning-dni recipes`: the YAMLs that ship with the package."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import lightning_dni
from lightning_dni.errors import StudyError
from lightning_dni.study.configuration import is_study

USAGE = """usage: lightning-dni recipes
       lightning-dni recipes copy NAME [DEST]

Lists the recipes that ship, or writes one out (to NAME.yaml in this folder, unless DEST is given).
"""


def recipe_files() -> dict[str, Path]:
    """The recipes by name: those in the installed package, or beside it in a checkout."""
    package = Path(lightning_dni.__file__).parent
    inside, beside = package / "recipes", package.parent / "recipes"
    return {file.stem: file for file in sorted((inside if inside.is_dir() else beside).glob("*.yaml"))}


def main(words: Sequence[str]) -> int:
    """Run `lightning-dni recipes` with the `words` that follow; returns the exit code."""
    try:
        if not words:
            Console().print(_table())
        elif words[0] == "copy" and len(words) in (2, 3):
            sys.stdout.write(f"{copy_recipe(*words[1:])}\n")
        else:
            sys.stdout.write(USAGE)
            return 0 if words[0] in ("-h", "--help") else 2
    except StudyError as error:
        sys.stderr.write(f"lightning-dni recipes: {error}\n")
        return 2
    return 0


def copy_recipe(name: str, destination: str | None = None) -> Path:
    """Write a recipe out.

    Args:
        name: Of the recipe.
        destination: A folder, which ends in / where it is not there yet, or a file that is not there yet;
            this folder where it is None.

    Raises:
        StudyError: There is no such recipe, or the file exists.
    """
    files = recipe_files()
    if name not in files:
        raise StudyError(
            f"Expected NAME to be one of {', '.join(files)}, but got {name!r}. Name one of these."
        )
    target = Path(destination or ".")
    folder = target.is_dir() or str(destination).endswith("/")
    target = target / f"{name}.yaml" if folder else target
    if target.exists():
        raise StudyError(f"Expected DEST to be free, but {str(target)!r} exists. Name another, or delete it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(files[name], target)
    return target


def _table() -> Table:
    table = Table(
        title="Run one by `lightning-dni COMMAND --config FILE`; FILE comes from `recipes copy NAME`"
    )
    for heading in ("recipe", "command", "claim"):
        table.add_column(heading, overflow="fold")
    table.add_column("minutes", justify="right")
    for name, file in recipe_files().items():
        configuration: Any = OmegaConf.load(file)
        recipe = configuration.get("recipe") or {}
        command = "study" if is_study(configuration) else "fit"
        shown = (name, command, str(recipe.get("claim", "")), str(recipe.get("minutes", "")))
        table.add_row(*map(escape, shown))
    return table
