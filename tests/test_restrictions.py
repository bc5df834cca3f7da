"""The README's list of restrictions and the errors in the source are one list."""

import re

import pytest
from errors_said import errors_in

RESTRICTIONS = {
    "several devices or nodes under `DNIStrategy`": ["Expected one device for", "Expected one node for"],
    "an optimizer that evaluates its closure several times": [
        "Expected an optimizer that evaluates its closure"
    ],
    "precision other than": ["Expected a precision of"],
    "in manual optimization, a second backward pass": [
        "Expected one backward pass through each forward pass",
        "to be differentiated by `manual_backward`",
        "Expected the loss to come back to boundary",
    ],
    "a loss, activation, synthetic or target gradient that is not finite": [
        "Expected a finite loss",
        "to give finite gradients, but got some that are not in …: its parameters",
        "to give finite gradients, but got some that are not in …: the activation there",
        "to give finite gradients, but got some that are not in …, from finite parameters",
        "Expected a finite target gradient",
        "Expected finite losses and gradients in every process",
    ],
    "a boundary name or pattern that names no submodule": [
        "Expected `boundaries` to name submodules",
        "Expected `boundaries` to name distinct modules",
    ],
    "a boundary that did not run": ["Expected every boundary to run"],
    "a path around a boundary": [
        "(a skip connection past the boundary, an auxiliary head",
        "Expected a graph of this step",
    ],
    "a boundary's output that goes both into the next stage and past it": ["goes into it and past it"],
    "a boundary's output that is changed in place": ["not to be changed in place"],
    "re-entrant activation checkpointing": ["with use_reentrant=False below"],
    "a boundary's output of a type that cannot be opened": ["which cannot be opened"],
    "complex activations, activations without a batch dimension": [
        "Expected real activations",
        "to have a batch dimension",
    ],
    "an estimator whose gradient has the wrong shape": [
        "to give one gradient per activation",
        "Expected labels or a context for",
        "Expected the network's output for …, but the output module",
        "Expected the network's output to be seen before",
        "to need only …, but it needs",
    ],
    "an estimator for activations of another kind": [
        "Expected one tensor at boundary",
        "Expected activations with features on the last dimension",
        "Expected feature maps [batch, channels, ...]",
        "Expected vectors, sequences or two-dimensional feature maps",
        "to be class scores of shape",
    ],
    "labels outside [0, `num_classes`)": [
        "Expected labels in [0, …)",
        "Expected integer labels",
        "Expected labels or a context of … rows",
        "Expected a floating-point context of width",
        "Expected a label or context for each row or position",
    ],
    "estimator state of other boundaries": [
        "Expected the state of boundaries",
        "Expected the state of a … at boundary …, but got that of a",
        "Expected the state of a … at boundary …, but got one that does not fit",
        "Expected the state of an estimator for rows of shapes",
        "Expected the state of the estimators' …",
        "Expected optimizer states for the estimators at",
        "states of estimator optimizers",
        "Expected schedules of estimator optimizers",
        "Expected `estimator` to make a new estimator for boundary",
    ],
    "a boundary inside a region that torch.compile had compiled": [
        "Expected every boundary",
        "fullgraph=True",
    ],
    "on probe steps, operations that cannot be differentiated twice": [
        "to be differentiable twice on a probe step, but got: …",
        "but torch.compile has made a graph that reuses its memory",
    ],
    "processes of `DNIDDPStrategy` that do not have the same parameters": ["to be the same in every process"],
}
"""What each line of the README begins with, and what the errors say that it stands for."""

WRONG_ARGUMENT = re.compile(
    r"Expected (the patterns in |a pattern in )?`[a-z_…]+(=…)?`|Expected ….configure_dni\(\)"
)
"""An error that refuses one argument for its value, and names it: no restriction."""

MISUSE = [
    "Expected a strategy with synthetic gradients",
    "Expected a Trainer of lightning.pytorch",
    "Expected a model without hooks of an engine",
    "Expected the engine to be attached",
    "Expected a training step before backward",
    "Expected a module to describe",
    "Expected boundaries for …, but got none",
]
"""Something was called at the wrong time, or on the wrong thing."""


@pytest.fixture(scope="module")
def said(pytestconfig):
    return errors_in(pytestconfig.rootpath / "lightning_dni")


@pytest.fixture(scope="module")
def listed(pytestconfig):
    section = (
        (pytestconfig.rootpath / "README.md").read_text().split("## Restrictions")[1].split("\nSeen ")[0]
    )
    return [line.removeprefix("- ") for line in section.splitlines() if line.startswith("- ")]


def test_every_line_of_the_readme_stands_for_errors(listed, said):
    for line in listed:
        (fragments,) = [found for start, found in RESTRICTIONS.items() if line.startswith(start)]
        for fragment in fragments:
            assert any(fragment in sentence for sentence in said), fragment


def test_every_restriction_is_in_the_readme(listed):
    assert [start for start in RESTRICTIONS if not any(line.startswith(start) for line in listed)] == []
    assert len(listed) == len(RESTRICTIONS)


def test_every_error_is_a_restriction_or_a_mistake_that_it_names(said):
    known = [fragment for fragments in RESTRICTIONS.values() for fragment in fragments] + MISUSE
    unlisted = [
        sentence
        for sentence in said
        if not WRONG_ARGUMENT.match(sentence) and not any(fragment in sentence for fragment in known)
    ]
    assert unlisted == []


def test_an_error_that_is_not_listed_would_be_seen(tmp_path):
    (tmp_path / "new.py").write_text('raise StageError(f"Expected {1} moon, but got two.")')
    (sentence,) = errors_in(tmp_path)
    assert sentence == "Expected … moon, but got two."
    with pytest.raises(AssertionError):
        test_every_error_is_a_restriction_or_a_mistake_that_it_names([sentence])
