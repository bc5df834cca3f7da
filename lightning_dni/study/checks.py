"""Checks of what a study's YAML says: each names the key, what was expected, what came, what to do."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from lightning_dni.errors import StudyError

LARGEST_SEED = 2**32 - 1
"""That numpy's generator takes."""

LONGEST_NAME = 255
"""Bytes of a folder's name that file systems take."""


def check_mapping(key: str, value: Any) -> dict[str, Any]:
    """A mapping as a dict; nothing is an empty one.

    Raises:
        StudyError: `value` is something else.
    """
    if value is None:
        return {}
    if not hasattr(value, "items"):
        raise StudyError(
            f"Expected `{key}` to be a mapping, but got {value!r}. Write `{key}: {{name: value}}`."
        )
    return dict(value.items())


def check_keys(key: str, given: Sequence[Any], known: Sequence[str]) -> None:
    """Whether all names are known.

    Raises:
        StudyError: One is not; the message proposes the nearest.
    """
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            raise StudyError(
                f"Expected `{key}` to be among {', '.join(map(str, known)) or 'nothing'}, but got {name!r}. "
                + (f"Write {near[0]!r}." if near else "Take it out, or correct it.")
            )


def check_name(key: str, name: Any) -> str:
    """A value's name as text; it becomes part of a folder's name.

    Raises:
        StudyError: It cannot.
    """
    if isinstance(name, (dict, list)) or not re.fullmatch(r"[^/\\,=\0]+", str(name)):
        raise StudyError(
            f"Expected every value in `{key}` to have a name without / \\ , and =, but got {name!r}. Give it "
            f"one: `{key}: {{name: value}}`."
        )
    return str(name)


def check_axis(axis: Any, taken: Sequence[str]) -> str:
    """An axis's name as text; it becomes part of folders' names, of references, and a column of the table.

    Raises:
        StudyError: It cannot.
    """
    if str(axis) in taken:
        raise StudyError(f"Expected another name for `grid.{axis}`: {', '.join(taken)} are taken. Rename it.")
    if not re.fullmatch(r"[^/\\,=.\0]+", str(axis)):
        raise StudyError(
            f"Expected axes of `grid` to have names without / \\ , . =, but got {axis!r}. Rename it."
        )
    return str(axis)


def check_run_name(name: str) -> str:
    """The name of a run's folder.

    Raises:
        StudyError: It is too long.
    """
    if len(name.encode()) > LONGEST_NAME:
        raise StudyError(
            f"Expected names of runs of at most {LONGEST_NAME} bytes, but got {name!r}. Give values in `grid`"
            " short names: `axis: {name: value}`."
        )
    return name


def check_names(key: str, value: Any, of: str = "metrics") -> tuple[str, ...]:
    """A name or a list of names.

    Raises:
        StudyError: It is something else.
    """
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise StudyError(
            f"Expected `{key}` to be a list of {of}' names, but got {value!r}. Write `{key}: [name, name]`."
        )
    return tuple(names)


def check_text(key: str, value: Any) -> str:
    """A text.

    Raises:
        StudyError: It is something else.
    """
    if not isinstance(value, str) or "." not in value:
        raise StudyError(
            f"Expected `{key}` to be the dotted path of a function, but got {value!r}. Write "
            "`package.module.function`."
        )
    return value


def check_seeds(value: Any) -> list[int]:
    """Different seeds, also as `0,1,2`.

    Raises:
        StudyError: They are not, or none is left.
    """
    found = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        seeds = [int(str(each)) for each in found]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or max(seeds) > LARGEST_SEED or len(set(seeds)) < len(seeds):
        raise StudyError(
            f"Expected `seeds` to be different integers from 0 to {LARGEST_SEED}, but got {value!r}. Write "
            "`seeds: [0, 1, 2]`."
        )
    return seeds
