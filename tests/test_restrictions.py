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
    "a loss, activation, synthetic input, synthetic or target gradient that is not finite": [
        "Expected a finite loss",
        "to give finite gradients, but got some that are not in …: its parameters",
        "to give finite gradients, but got some that are not in …: the activation there",
        "to give finite gradients, but got some that are not in …, from finite parameters",
        "Expected a finite target gradient",
        "Expected finite losses and gradients in every process",
        "Expected finite activations and synthetic inputs",
    ],
    "with `synthetic_inputs`, `bp_lambda` above 0": [
        "Expected a stage that waits for nothing below a synthetic input",
        "Expected no probe of true gradients with synthetic inputs",
        "Expected one loss per training step with synthetic inputs",
        "Expected no replicas with synthetic inputs",
        "to run once in a step with synthetic inputs",
        "to predict tensors of shapes",
        "of the network's input for the MLPInputEstimator",
        "Expected `network_input=",
    ],
    "`synthetic_inputs`: a stage goes on": ["Expected no `synthetic_inputs` in a pipeline"],
    "a boundary name or pattern that names no submodule": [
        "Expected `…` to name submodules",
        "Expected `…` to name distinct modules",
        "Expected `…` to name modules that take hooks",
    ],
    "a boundary that did not run": ["Expected every boundary to run"],
    "a path around a boundary": [
        "(a skip connection past the boundary, an auxiliary head",
        "Expected a graph of this step",
    ],
    "a boundary's output that goes both into the next stage and past it": ["goes into it and past it"],
    "a boundary's output that is changed in place": ["not to be changed in place"],
    "the network's output, where it is changed in place": ["to stay as the output module gave it"],
    "re-entrant activation checkpointing": [
        "with use_reentrant=False below",
        "Expected no more than one stage in an activation checkpoint",
    ],
    "a boundary's output of a type that cannot be opened": ["which cannot be opened"],
    "complex activations, activations without a batch dimension": [
        "Expected real activations",
        "to have a batch dimension",
    ],
    "an estimator whose gradient has the wrong shape": [
        "to give one gradient per activation",
        "Expected labels or a context for",
        "Expected the network's output for …, but the output module",
        "Expected the gradient at the network's output for …, but the loss did not come back",
        "Expected one gradient at the network's output for …, but the loss came back through several calls",
        "Expected the network's output for the estimators of the stages below",
        "Expected one gradient at the network's output for the estimators of the stages below",
        "Expected the network's output to be seen before",
        "to need only …, but it needs",
        "to depend on its parameters, but got one without a graph",
    ],
    "an estimator for activations of another kind": [
        "Expected one tensor at boundary",
        "Expected activations with features on the last dimension",
        "Expected a linear layer or convolution to read the output of boundary",
        "Expected feature maps [batch, channels, ...]",
        "Expected vectors, sequences or two-dimensional feature maps",
        "to be class scores of shape",
    ],
    'with `loss_denominator="elements"`, an output whose elements': [
        "elements per row with loss_denominator="
    ],
    "labels outside [0, `num_classes`)": [
        "Expected labels in [0, …)",
        "Expected integer labels",
        "Expected labels or a context of … rows",
        "Expected a floating-point context of width",
        "Expected a label or context for each row or position",
    ],
    "with `DelayedGradientEstimator`, manual optimization": [
        "Expected delayed gradients in one process",
        "Expected `engine.update_estimators()` after",
    ],
    "`bp_lambda` above 0 at a boundary with": ["Expected bp_lambda=0 for"],
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
        "Expected the state of a DelayedGradientEstimator with",
        "Expected delayed gradients of the model's own parameters",
        "for the inputs at boundary",
        "Expected no input estimator at boundary",
    ],
    "a boundary inside a region that torch.compile had compiled": [
        "Expected every boundary",
        "fullgraph=True",
    ],
    "on probe steps, operations that cannot be differentiated twice": [
        "to be differentiable twice on a probe step, but got: …",
        "but torch.compile has made a graph that reuses its memory",
        "to have second derivatives",
    ],
    "processes of `DNIDDPStrategy` that do not have the same parameters": ["to be the same in every process"],
    "with `update_probability` below 1, `16-mixed`": [
        "Expected a precision without a gradient scaler with `update_probability` below 1",
    ],
    'with `update="immediate"`, manual optimization': [
        "Expected automatic optimization with update='immediate'",
        "Expected a precision without a gradient scaler with update='immediate'",
        "Expected no clipping by the norm of all gradients",
        "Expected Lightning's own `configure_gradient_clipping`",
        "Expected no StochasticWeightAveraging",
        "Expected a torch optimizer with update='immediate'",
        "Expected every parameter in one stage with update='immediate', but … comes to",
        "Expected every parameter in one stage with update='immediate', but … is also",
        "Expected one loss per training step with update='immediate'",
        "Expected no replicas with update='immediate'",
        "Expected update='step' with … processes",
        "Expected an optimizer that keeps its state by parameter",
    ],
    "with `truncations`, boundaries in or above": [
        "Expected no `…` with `truncations`",
        "to lie below truncation",
    ],
    "a truncation that does not return (output, state)": [
        "to return (output, state)",
        "to be called as module(input, state)",
        "Expected a recurrent module that reads forward",
        "whose batch dimension is known",
        "to have the same number of rows in dimension",
        "Expected every truncation to run",
        "Expected the states of truncations to need a gradient",
        "Expected no truncation inside another",
    ],
    "with `truncations` alone, callbacks": ["but got truncations alone"],
    "at a truncation, an estimator": [
        "Expected an estimator that learns from the target gradient alone",
        "Expected a truncation for",
    ],
    "a state with the graph of an earlier step": [
        "Expected the state that comes into truncation",
        "Expected one backward pass through each chunk",
    ],
    "`update` and `update_probability`": [
        "Expected no `update` and no `update_probability` in a pipeline",
        "Expected no `…` under strategy=…",
        "Expected no `truncations` in a pipeline",
    ],
    "a number of processes that is no multiple of the stages": [
        "processes or a multiple of it",
        "Expected a number of processes that `stages` divides",
        "Expected at least 2 stages with boundaries='auto'",
        "Expected a cluster for num_nodes",
    ],
    "manual optimization, `16-mixed`, weight averaging, `sync_batchnorm` and steps": [
        "Expected automatic optimization under strategy='dni_pipeline'",
        "Expected steps that are given a batch under strategy='dni_pipeline'",
        "Expected a precision without a gradient scaler under strategy='dni_pipeline'",
        "Expected no weight averaging under strategy='dni_pipeline'",
        "Expected sync_batchnorm=False",
    ],
    "a parameter, or a buffer that changes, that is used in two stages": [
        "Expected every parameter and buffer to be used in one stage",
        "to use its own parameters only",
        "to differentiate its own parameters",
    ],
    "a skip connection past a boundary that takes a gradient": [
        "to need nothing from below boundary",
        "to take no gradient, as when the model was traced, but it does now",
        "to return, before the boundary of stage",
        "Keep boundaries out of what an activation checkpoint runs again",
    ],
    "what travels past a boundary and is returned otherwise": [
        "to be built as when the model was traced, …",
        "to return one and the same tensor",
        "reads not to be changed in place",
    ],
    "a boundary that does not run once in every step": [
        "Expected a differentiable tensor to cross boundary",
        "Expected tensors to cross boundary",
        "to be built as when it was traced",
        "Expected the step to run boundary … on stage",
        "Expected the step to run boundary …, but it ended without",
    ],
    "a module that runs in another stage than on the first batch": [
        "it did otherwise, or not at all, when the model was traced",
        "but the step caught what ends it",
        "Expected the chained stages to compute what the whole model does",
        "Expected the last stage to return what the whole model's step does",
        "Expected no submodule to be compiled while the model is split",
    ],
    "`bp_lambda` above 0, or an estimator that is told first, with a `staleness` other than 0": [
        "Expected a stage that does not wait",
        "Expected boundaries that wait for nothing",
    ],
    "feedback alignment that a function makes": [
        "Expected to know beforehand which layers of another stage to swap",
        "Expected nothing to be trained in",
    ],
    "`DelayedGradientEstimator` at some boundaries only": [
        "Expected DelayedGradientEstimator at every boundary of a pipeline or at none",
        "Expected to know beforehand that gradients are delayed",
        "Expected one batch per update, one copy of the pipeline and no probes",
        "Expected what a stage's backward pass needs to stay as it is",
    ],
    "stages with other data or another module": [
        "Expected all stages to read the same first batch",
        "to read the same batch, but … batch …",
        "to be at the batch at which … is",
        "from the stage above, but got that of batch",
        "Expected every process to find the same stages",
        "Expected stage … to wait for the same as stage",
        "Expected stage … to wait for all stages as stage",
        "but that stage has sent its last message",
    ],
    "a stage that has failed": [
        "Lost the connection while",
        "that stage has failed",
        "Expected a process that waits for nobody",
    ],
    'with `boundaries="auto"`': [
        "but boundaries='auto' are only chosen when `fit` begins",
        "Expected boundaries='auto' to find … places",
        "where boundaries='auto' are chosen",
        "of which one batch can be taken beforehand with boundaries='auto'",
    ],
    "under an exact schedule, a module with its own `backward`": [
        "Expected Lightning's own `backward`",
        "Expected one loss per microbatch",
    ],
    "under an exact schedule, batches that cannot be split by rows": [
        "rows in every batch, one per microbatch",
        "Expected tensors to split into microbatches",
        "to have the same number of rows",
        "Expected a batch of tensors and plain values",
    ],
    "callbacks and options of synthetic gradients with an exact schedule": [
        "Expected synthetic gradients for",
        "Expected no arguments about synthetic gradients",
        "Expected no `clip_norm` with an exact schedule",
    ],
    "activations that are sparse or nested, or of more dimensions": [
        "A message takes",
        "tensors to go past boundary",
        "Expected dense tensors at boundary",
    ],
    "monitors that need the stages' graphs": [
        "Expected a model in one process for",
        "Expected a probe of the gradients alone in a pipeline",
        "Expected a process that holds the whole model for RepresentationMonitor",
    ],
    "with `save_sharded=True`, a `checkpoint_io`": [
        "Expected no `checkpoint_io` with save_sharded=True",
        "Expected a folder that all stages can write",
    ],
}
"""What each line of the README begins with, and what the errors say that it stands for."""

WRONG_ARGUMENT = re.compile(
    r"Expected (the patterns in |a pattern in )?`[a-z_…]+(=…)?`|Expected ….configure_dni\(\)"
)
"""An error that refuses one argument for its value, and names it: no restriction."""

MISUSE = [
    "to be a folder that a pipeline with save_sharded=True has written",
    "Expected a strategy with synthetic gradients",
    "Expected a Trainer of lightning.pytorch",
    "Expected a model without hooks of an engine",
    "Expected the engine to be attached",
    "Expected a training step before backward",
    "Expected `engine.updater` to be set",
    "Expected a module to describe",
    "Expected boundaries for …, but got none",
    "Expected a model that is not split",
    "stages in one process take turns",
    "Expected an open way for",
    "Expected one run of stage",
    "to be attached, but got a run before",
    "Expected the engine to know its part in",
    "Pass on what `pack` gave",
    "ranks: expected rank",
    "Use the same version of lightning_dni in every process",
    "Expected no estimator at … under an exact schedule",
    "to predict a loss for each label, but it predicts",
    "Expected layer … to run when the model does",
    "Expected layer … to give a tensor with one row for each",
    "Expected an estimator that learns the gradient itself",
    "Expected an estimator whose gradient of a row depends on that row alone",
    "Expected one tensor at the boundary, but … gives",
    "Expected one tensor to cross each boundary once for a plane of inputs",
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
