"""The tables of the README, made from the heads of the YAMLs and their block `recipe`; nothing is trained.

python recipes/report.py [--write]

With `--write` they take the place of those in README.md.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from lightning_dni.study.configuration import is_study

RECIPES = Path(__file__).parent
README = RECIPES / "README.md"
HEADING = ("recipe", "claim", "command", "expected", "measured", "minutes on 2 cores", "picture")


class Head(NamedTuple):
    """What the comment at the top of a YAML says."""

    command: str
    expected: str
    measured: str


def head(text: str) -> Head:
    """Read the comment before `recipe:`; a part that it lacks is "-"."""
    comment, _, _ = text.partition("\nrecipe:")
    lines = [line.removeprefix("#").removeprefix(" ") for line in comment.splitlines()]
    command = next((line.strip() for line in lines if line.startswith("  lightning-dni ")), "-")
    said = " ".join(filter(None, map(_sentence, lines)))
    expected = re.search(r"Expected: (.*?)(?= Measured on |$)", said)
    measured = re.search(r"Measured on (.*)", said)
    return Head(command, *(found[1] if found else "-" for found in (expected, measured)))


def _sentence(line: str) -> str:
    """A line as part of a text: nothing of a command, and a table's row with semicolons."""
    if not line.startswith("  "):
        return line.strip()
    words = line.strip()
    return "" if words.startswith(("lightning-dni ", "--")) else re.sub(r"\s{2,}", "; ", words) + "."


def row(file: Path) -> list[str]:
    """The cells of a recipe."""
    recipe: Any = OmegaConf.load(file).recipe
    tags = ", ".join(map(str, recipe.get("tags", [])))
    picture = f"../docs/{file.stem}.png"
    command, expected, measured = head(file.read_text())
    return [
        f"`{file.stem}`",
        f"{recipe.claim} ({tags})" if tags else str(recipe.claim),
        f"`{command}`",
        expected,
        measured,
        str(recipe.minutes),
        f"[picture]({picture})" if (RECIPES / picture).exists() else "-",
    ]


def tables() -> list[str]:
    """Those of the README, in their order: single trainings, studies."""
    files = sorted(RECIPES.glob("*.yaml"))
    studies = {file for file in files if is_study(OmegaConf.load(file))}  # type: ignore[arg-type]
    return [_table([row(file) for file in files if (file in studies) == wanted]) for wanted in (False, True)]


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in rows]
    return "\n".join(["| " + " | ".join(HEADING) + " |", "|" + len(HEADING) * "---|", *lines, ""])


def main() -> None:
    """Print the tables, or put them in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them in the place of those in README.md")
    args = parser.parse_args()
    texts = tables()
    if not args.write:
        sys.stdout.write("\n".join(texts))
        return
    page = README.read_text()
    old = re.findall(r"^(?:\|.*\n)+", page, re.MULTILINE)
    if len(old) != len(texts):
        raise SystemExit(f"Expected {len(texts)} tables in {README}, but found {len(old)}.")
    for before, after in zip(old, texts, strict=True):
        page = page.replace(before, after)
    README.write_text(page)


if __name__ == "__main__":
    main()
