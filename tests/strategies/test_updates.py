"""Immediate and sparse updates under a Trainer, by the user's own optimizer."""

import re
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from core.nets import Told, mlp
from ddp_fits import ddp, fit_on_rank, state_of, trainers
from fits import BOUNDARIES, LINEAR, AtBatchEnd, Net, different, dni, fit, net, weights
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from strategies.resuming import Annealed

from lightning_dni import GradientMonitor
from lightning_dni.core.boundary import LAST_STAGE
from lightning_dni.core.sparse import draw_asleep
from lightning_dni.errors import EstimatorError, StageError
from lightning_dni.estimators import DirectFeedbackAlignmentEstimator
from lightning_dni.pipeline.engine import StageEngine
from lightning_dni.strategies._compat import MisconfigurationException
from lightning_dni.strategies.options import DNIOptions
from lightning_dni.strategies.updates import refuse_updates_apart

STAGE_OF = {"0": "net.0", "1": "net.1", "2": LAST_STAGE}


class Grouped(Annealed):
    """Weights and biases at rates of their own, with momentum and decay, under a schedule."""

    def configure_optimizers(self):
        kinds = [[p for p in self.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False)]
        groups = [{"params": kinds[0], "lr": 0.1, "weight_decay": 0.1}, {"params": kinds[1]}]
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Gradients(pl.Callback):
    """Which stages have a gradient when the optimizer is about to step, and what its state is in the end."""

    def __init__(self):
        self.left, self.state = [], None

    def on_before_optimizer_step(self, trainer, module, optimizer):
        held = {n.split(".")[1] for n, p in module.named_parameters() if p.grad is not None}
        self.left.append("".join(sorted(held)))

    def on_train_end(self, trainer, module):
        self.state = trainer.optimizers[0].state_dict()


def trained(strategy, kind=Net, module=None, **options):
    """Weights, the optimizer's state, and which stages were left for its own step."""
    torch.manual_seed(0)
    module, seen = kind(**(module or {})), Gradients()
    callbacks = [seen, *options.pop("callbacks", [])]
    fit(module, strategy, callbacks=callbacks, **{"max_epochs": 2, **options})
    return state_of(module, strategy), seen


def assert_same_run(one, other):
    (ours, seen), (theirs, plain) = one, other
    assert different(ours, theirs) == []
    assert seen.state["param_groups"] == plain.state["param_groups"]
    assert seen.state["state"].keys() == plain.state["state"].keys()
    for key, values in seen.state["state"].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(plain.state["state"][key][name]))


# ---- immediate updates


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(Net, {}, id="momentum"),
        pytest.param(
            Annealed, {"module": {"optimizer": "adam", "dropout": 0.3, "batch_norm": True}}, id="adam"
        ),
        pytest.param(Grouped, {}, id="groups and a schedule"),
        pytest.param(Net, {"accumulate_grad_batches": 3}, id="accumulated"),
        pytest.param(Net, {"gradient_clip_val": 1e-2, "gradient_clip_algorithm": "value"}, id="clipped"),
        pytest.param(Annealed, {"precision": "bf16-mixed", "module": {"optimizer": "adam"}}, id="bf16-mixed"),
        pytest.param(Net, {"precision": "64-true"}, id="64-true"),
    ],
)
def test_it_is_one_update_at_the_end_to_the_bit(kind, options):
    runs = [trained(dni(update=update), kind, **options) for update in ("immediate", "step")]
    assert_same_run(*runs)
    assert set(runs[0][1].left) == {"2"}
    assert set(runs[1][1].left) == {"012"}


def test_clipping_by_value_does_clip():
    clipped, free = (
        trained(dni(update="immediate"), **options)[0]
        for options in ({"gradient_clip_val": 1e-2, "gradient_clip_algorithm": "value"}, {})
    )
    assert "net.0.0.weight" in different(clipped, free)


def test_probes_defer_their_step_and_change_no_number():
    monitor = partial(GradientMonitor, every_n_train_steps=4)
    run, free = (trained(dni(update="immediate"), callbacks=callbacks) for callbacks in ([monitor()], []))
    assert_same_run(run, free)
    assert run[1].left == (3 * ["2"] + ["012"]) * 5


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"bp_lambda": {"net.1": 0.5, "net.0": 0.0}}, "012"),
        ({"bp_lambda": {"net.0": 0.5, "net.1": 0.0}}, "02"),
        ({"estimator": {"net.1": DirectFeedbackAlignmentEstimator, "net.0": LINEAR}}, "12"),
    ],
    ids=["lambda above", "lambda below", "told first"],
)
def test_stages_that_wait_step_at_the_end(options, left):
    runs = [trained(dni(update=update, **options), max_epochs=1) for update in ("immediate", "step")]
    assert_same_run(*runs)
    assert set(runs[0][1].left) == {left}


class Zeroing(Net):
    """Fills gradients with zeros, which are then there for the next forward pass."""

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)

    def on_before_zero_grad(self, optimizer):
        pass


def test_a_module_with_its_own_zero_grad_trains_alike():
    """A probe leaves gradients behind, and the next update is one of a single batch, which adds to them."""
    options = {"accumulate_grad_batches": 3, "callbacks": [GradientMonitor(every_n_train_steps=3)]}
    (own, seen), (plain, _) = (trained(dni(update="immediate"), kind, **options) for kind in (Zeroing, Net))
    assert different(own, plain) == []
    assert seen.left[2:4] == ["012", "2"]


class Skips(Net):
    """Has no loss in every other batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 2 else loss


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_batch_without_a_loss_has_updated_the_stages_all_the_same():
    moved = []
    last = {}

    def look(trainer, module, batch_idx):
        now = weights(module)
        moved.append({n.split(".")[1] for n in now if last and not torch.equal(now[n], last[n])})
        last.update(now)

    estimator = Told
    fit(Skips(), dni(update="immediate", estimator=estimator), callbacks=[AtBatchEnd(look)])
    assert moved[2:6] == [{"0", "1", "2"}, {"0", "1"}, {"0", "1", "2"}, {"0", "1"}]


def test_nothing_stays_on_the_optimizer():
    module, strategy = net(), dni(update="immediate")
    trainer = fit(module, strategy)
    (optimizer,) = trainer.optimizers
    assert [p for g in optimizer.param_groups for p in g["params"]] == list(module.parameters())
    assert not optimizer._optimizer_step_post_hooks
    assert strategy.engine.updater is None


# ---- sparse updates


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("update", ["step", "immediate"])
def test_every_stage_updates_in_the_steps_that_are_drawn_for_it(update, accumulate):
    moved, last = [], {}

    def look(trainer, module, batch_idx):
        now = weights(module)
        if last and trainer.global_step > len(moved):
            moved.append({n.split(".")[1] for n in now if not torch.equal(now[n], last[n])})
        last.update(now)

    strategy = dni(update=update, update_probability=0.5, estimator=partial(LINEAR))
    module = net()
    last.update(weights(module))
    fit(module, strategy, callbacks=[AtBatchEnd(look)], max_epochs=2, accumulate_grad_batches=accumulate)
    drawn = []
    firsts = [s + epoch for epoch in (0, 10) for s in range(0, 10, accumulate)]
    for first in firsts:
        asleep = draw_asleep(strategy.engine.update_probability, 0, first)
        drawn.append({k for k, name in STAGE_OF.items() if name not in asleep})
    # an estimator that has learnt nothing yet says zero, which moves nothing
    assert len(moved) == len(drawn)
    assert all(m <= d for m, d in zip(moved, drawn, strict=True))
    assert moved[len(moved) // 2 :] == drawn[len(moved) // 2 :]


def test_sparse_updates_are_the_same_run_immediately_and_at_the_end():
    runs = [trained(dni(update=update, update_probability=0.5)) for update in ("immediate", "step")]
    assert_same_run(*runs)


@pytest.mark.parametrize("update", ["step", "immediate"])
def test_a_step_without_a_gradient_is_not_clipped(update):
    """torch clips no empty list by value: the first step that all stages sat out was an error."""
    clipped = {"gradient_clip_val": 1e-2, "gradient_clip_algorithm": "value"}
    run = trained(dni(update=update, update_probability=0.3), **clipped)
    assert "" in run[1].left
    assert "net.2.weight" in different(run[0], trained(dni(update_probability=0.3))[0])
    loose = {"gradient_clip_val": 1e6, "gradient_clip_algorithm": "value"}
    assert_same_run(trained(dni(update_probability=0.3), **loose), trained(dni(update_probability=0.3)))


def test_nothing_stays_on_the_precision_plugin():
    trainer = fit(net(), dni(), gradient_clip_val=1.0, gradient_clip_algorithm="value")
    assert "clip_grad_by_value" not in vars(trainer.precision_plugin)


def test_the_global_generator_is_not_drawn_from():
    states = []
    for probability in (0.5, 1.0):
        fit(net(), dni(update_probability=probability))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_monitor_sees_what_was_measured_and_changes_nothing():
    monitor = GradientMonitor(every_n_train_steps=2)
    run = trained(dni(update_probability=0.3), callbacks=[monitor])
    assert_same_run(run, trained(dni(update_probability=0.3)))
    assert len(monitor.history) == 10


def test_what_is_said_about_the_run():
    strategy = dni(update_probability={"net.0": 0.2, "*": 1.0}, update="immediate")
    fit(net(), strategy, fast_dev_run=True)
    facts = strategy.engine.describe()
    assert facts["update"] == "immediate"
    assert facts["update_probability"] == {"net.0": 0.2, "net.1": 1.0, "last stage": 1.0}


def sparse(rank):
    strategy = (dni if rank is None else ddp)(update_probability=0.5)
    module, _ = fit_on_rank(
        rank, strategy, devices=1 if rank is None else 2, precision="64-true", max_epochs=3
    )
    return state_of(module, strategy)


def test_two_processes_sit_out_the_same_and_do_what_one_does_on_the_joint_batch():
    first, second = trainers(sparse)
    assert different(first, second) == []
    alone = sparse(None)
    assert all((first[n] - alone[n]).abs().max() < 1e-10 for n in alone)


# ---- refused


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class OwnClipping(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        pass


class Wrapper:
    """What Lightning takes for an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, {}

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)


class Wrapped(Net):
    def configure_optimizers(self):
        return Wrapper(super().configure_optimizers())


class Tied(Net):
    def __init__(self):
        super().__init__(width=6)
        self.net[1][0].weight = self.net[0][0].weight


class Penalized(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.net[0][0].weight.square().sum()


HALF = {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))}
REFUSED = {
    "manual": (Manual, {}, "Expected automatic optimization with update='immediate', but Manual"),
    "16-mixed": (Net, HALF, "gradient scaler with update='immediate', but got '16-mixed'.*bf16-mixed"),
    "norm": (Net, {"gradient_clip_val": 1.0}, "norm of all gradients.*gradient_clip_val=1.0.*='value'"),
    "own clipping": (OwnClipping, {}, "own `configure_gradient_clipping`.*OwnClipping has another"),
    "averaging": (
        Net,
        {"callbacks": [StochasticWeightAveraging(swa_lrs=0.1)]},
        "Expected no StochasticWeightAveraging with update='immediate'",
    ),
    "wrapper": (Wrapped, {}, r"Expected a torch optimizer with update='immediate', but got \['Wrapper'\]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_with_immediate_updates_is_refused(what):
    kind, options, expected = REFUSED[what]
    with pytest.raises(MisconfigurationException, match=expected):
        fit(kind(), dni(update="immediate"), **options)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Tied, r"net\.1\.0\.weight' is also 'net\.0\.0\.weight'"),
        (Penalized, r"the loss comes to \['net\.0\.0\.weight'\]"),
    ],
)
def test_shared_weights_are_refused_by_name(kind, expected):
    with pytest.raises(StageError, match=expected):
        fit(kind(), dni(update="immediate"))


def test_a_gradient_scaler_with_sparse_updates_is_refused():
    with pytest.raises(MisconfigurationException, match="`update_probability` below 1, but got '16-mixed'"):
        fit(net(), dni(update_probability={"net.0": 0.5, "*": 1.0}), **HALF)


def replicas(rank):
    try:
        fit_on_rank(rank, ddp(update="immediate"))
    except MisconfigurationException as error:
        return str(error)
    return "nothing"


def test_immediate_updates_of_several_processes_are_refused():
    for said in trainers(replicas):
        assert re.search(r"Expected update='step' with 2 processes, but got 'immediate'", said)


def alone(rank):
    runs = [trained(ddp(update=update), devices=1, max_epochs=1) for update in ("immediate", "step")]
    assert_same_run(*runs)
    return set(runs[0][1].left)


def test_one_process_under_ddp_updates_immediately():
    assert trainers(alone, world_size=1) == [{"2"}]


@pytest.mark.parametrize(
    ("options", "name"),
    [({"update": "immediate"}, "update"), ({"update_probability": {"*": 0.5}}, "update_probability")],
)
def test_a_pipeline_takes_neither(options, name):
    with pytest.raises(
        MisconfigurationException, match=f"Expected no `{name}` under strategy='dni_pipeline'"
    ):
        refuse_updates_apart(DNIOptions(BOUNDARIES, LINEAR, **options), "dni_pipeline")
    with pytest.raises(
        EstimatorError, match="Expected no `update` and no `update_probability` in a pipeline"
    ):
        StageEngine(mlp(), ["0"], LINEAR, **options)
