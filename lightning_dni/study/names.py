"""Names with numbers in them, in the order in which a reader counts."""

import re
from collections.abc import Iterable

from matplotlib.mathtext import MathTextParser


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Sorted, numbers in them by size.

    >>> in_natural_order(["hidden_10", "hidden_9", "output"])
    ['hidden_9', 'hidden_10', 'output']
    """
    return sorted(names, key=lambda name: [_rank(part) for part in re.split(r"(\d+)", name)])


def _rank(part: str) -> tuple[bool, int, str]:
    number = part.isdecimal()
    return not number, int(part) if number else 0, part


def drawable(text: str) -> str:
    r"""`text` for a picture, its dollar signs as they are where what lies between them is no formula.

    >>> drawable("$x^2$"), drawable("$^$")
    ('$x^2$', '\\$^\\$')
    """
    try:
        MathTextParser("agg").parse(text)
    except ValueError:
        return text.replace("$", r"\$")
    return text


def layers_of(metric: str, names: Iterable[str]) -> dict[str, str]:
    """The metrics `METRIC/LAYER` of one metric, by layer.

    >>> layers_of("error", ["error/net_1", "loss", "errors/net_2"])
    {'net_1': 'error/net_1'}
    """
    return {name.removeprefix(f"{metric}/"): name for name in names if name.startswith(f"{metric}/")}
