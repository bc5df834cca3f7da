"""Refuse an argument by its name, what was expected and what came."""

import math
from collections.abc import Collection


def check_count(name: str, value: object, *, minimum: int = 1) -> None:
    """Raise unless `value` is a whole number of at least `minimum`.

    Args:
        name: the argument's name, for the message.
        value: what was passed.
        minimum: the smallest number allowed.

    Raises:
        ValueError: `value` is no integer, or too small.

    Example:
        >>> check_count("batch_size", 0)
        Traceback (most recent call last):
        ...
        ValueError: Expected `batch_size` to be an integer of at least 1, but got 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"Expected `{name}` to be an integer of at least {minimum}, but got {value!r}.")


def check_positive(name: str, value: float) -> None:
    """Raise unless `value` is a finite number above zero.

    Args:
        name: the argument's name, for the message.
        value: what was passed.

    Raises:
        ValueError: `value` is zero, negative, infinite or not a number.
    """
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"Expected `{name}` to be a finite number above 0, but got {value!r}.")


def check_not_negative(name: str, value: float) -> None:
    """Raise unless `value` is a finite number of at least zero.

    Args:
        name: the argument's name, for the message.
        value: what was passed.

    Raises:
        ValueError: `value` is negative, infinite or not a number.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"Expected `{name}` to be a finite number of at least 0, but got {value!r}.")


def check_fraction(name: str, value: float) -> None:
    """Raise unless `value` lies in [0, 1).

    Args:
        name: the argument's name, for the message.
        value: what was passed.

    Raises:
        ValueError: `value` is out of range or not a number.
    """
    if not 0 <= value < 1:
        raise ValueError(f"Expected `{name}` to be a fraction in [0, 1), but got {value!r}.")


def check_held_out(val_fraction: float, test_fraction: float) -> None:
    """Raise unless both are fractions that leave something to train on.

    Args:
        val_fraction: share that validates.
        test_fraction: share that tests.

    Raises:
        ValueError: one is out of range, or they sum to 1 or more.
    """
    check_fraction("val_fraction", val_fraction)
    check_fraction("test_fraction", test_fraction)
    if val_fraction + test_fraction >= 1:
        raise ValueError(
            "Expected `val_fraction` and `test_fraction` to sum to less than 1, "
            f"but got {val_fraction!r} and {test_fraction!r}."
        )


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise unless `value` is one of `choices`.

    Args:
        name: the argument's name, for the message.
        value: what was passed.
        choices: what is allowed, in the order to list it.

    Raises:
        ValueError: `value` is none of them.
    """
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"Expected `{name}` to be one of {listed}, but got {value!r}.")
