"""An argument out of range is refused by name, with what was expected and what came."""

import math

import pytest

from lightning_dni.demos.arguments import (
    check_choice,
    check_count,
    check_fraction,
    check_not_negative,
    check_positive,
)


@pytest.mark.parametrize(("value", "minimum"), [(1, 1), (7, 1), (0, 0)])
def test_count_in_range_passes(value, minimum):
    check_count("x", value, minimum=minimum)


@pytest.mark.parametrize("value", [1, -3, 2.0, True, "2", None])
def test_count_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=f"`x` to be an integer of at least 2, but got {value!r}"):
        check_count("x", value, minimum=2)


@pytest.mark.parametrize("value", [1.0, 1e-9])
def test_positive_number_passes(value):
    check_positive("x", value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_number_that_is_not_positive_is_refused(value):
    with pytest.raises(ValueError, match=f"`x` to be a finite number above 0, but got {value!r}"):
        check_positive("x", value)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_number_from_zero_passes(value):
    check_not_negative("x", value)


@pytest.mark.parametrize("value", [-1e-9, math.inf, math.nan])
def test_negative_number_is_refused(value):
    with pytest.raises(ValueError, match=f"`x` to be a finite number of at least 0, but got {value!r}"):
        check_not_negative("x", value)


@pytest.mark.parametrize("value", [0.0, 0.5, 0.999])
def test_fraction_passes(value):
    check_fraction("x", value)


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_number_that_is_no_fraction_is_refused(value):
    with pytest.raises(ValueError, match=rf"`x` to be a fraction in \[0, 1\), but got {value!r}"):
        check_fraction("x", value)


def test_choice_among_those_listed_passes():
    check_choice("x", "b", ["a", "b"])


def test_other_choice_is_refused():
    with pytest.raises(ValueError, match="`x` to be one of 'a', 'b', but got 'c'"):
        check_choice("x", "c", ["a", "b"])
