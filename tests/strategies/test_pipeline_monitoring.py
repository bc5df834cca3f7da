"""GradientMonitor over processes: the figures of one process, a few steps later, and nothing else changes."""

import os
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import wandb
from callbacks.runs import SPEED, csv_rows, read_run, rows_with
from fits import BOUNDARIES, LINEAR, different, dni, fit, loader, net, quiet_trainer, weights
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from processes import on_ranks
from strategies.pipelined import pipeline

from lightning_dni import DNIPipelineStrategy, GradientMonitor
from lightning_dni.callbacks import PipelineTimeline
from lightning_dni.callbacks.timeline import _on_one_clock
from lightning_dni.estimators import CriticEstimator
from lightning_dni.pipeline.clock import Activity

CLASSES = 3
AGAINST_TARGET = ["dni_sg_loss", "dni_target_error", "dni_target_cosine"]
AGAINST_TRUE = [
    "dni_sg_error",
    "dni_true_gradient_cosine",
    "dni_row_cosine",
    "dni_zero_rows",
    "dni_norm_ratio",
    "dni_bootstrap_error",
    "dni_weight_cosine",
    "dni_weight_error",
]
SHARES = ["dni_busy", "dni_wait_in", "dni_wait_out"]


def keys(metrics):
    return [f"{metric}/{name}" for metric in metrics for name in ("net_0", "net_1")]


def shares(stages=3):
    return [f"{what}/stage_{k}" for what in SHARES for k in range(stages)]


class KeptTimeline(PipelineTimeline):
    """Keeps what it would draw."""

    def _gather(self, trainer, engine):
        self.found = super()._gather(trainer, engine)
        return self.found


def critic_below(spec):
    return CriticEstimator(spec, num_classes=CLASSES) if spec.name == "net.0" else LINEAR(spec)


def exact():
    return DNIPipelineStrategy(boundaries=BOUNDARIES, schedule="1f1b", microbatches=2)


CASES = {
    "every step": {"every_n": 1},
    "accumulated": {"every_n": 1, "accumulate_grad_batches": 2},
    "probed": {"every_n": 1, "probe": True},
    "rows": {"every_n": 4, "staleness": 2, "batches": 13, "wandb": True},
    "probed rows": {"every_n": 4, "staleness": 2, "batches": 13, "probe": True, "wandb": True},
    "not watched": {"every_n": None, "staleness": 2, "batches": 13},
    "exact": {"every_n": 4, "batches": 13, "strategy": exact, "wandb": True},
    "heard late": {"every_n": 5, "staleness": 1, "batches": 20, "estimator": critic_below},
}


def monitored_stage(rank, name, every_n, probe=None, wandb_too=False, batches=10, staleness=0, **options):
    """One process of a fit that is watched, or not; what its loggers have written."""
    monitors = [] if every_n is None else [GradientMonitor(every_n, probe, recipe="test")]
    timelines = [KeptTimeline(5, 4)] if wandb_too else []
    csv = CSVLogger(".", name=name)
    loggers = [csv, WandbLogger(project="t", save_dir=Path.cwd(), offline=True)] if wandb_too else [csv]
    module = net(dropout=0.2)
    usual = partial(pipeline, 3, staleness=staleness, estimator=options.pop("estimator", LINEAR))
    strategy = options.pop("strategy", usual)()
    trainer = quiet_trainer(
        strategy,
        devices=3,
        callbacks=[*monitors, *timelines],
        logger=loggers,
        log_every_n_steps=every_n or 1,
        use_distributed_sampler=False,
        **options,
    )
    torch.manual_seed(0)
    trainer.fit(module, loader(8 * batches))
    file = None
    if wandb_too and rank == 0:
        file = str(loggers[1].experiment.settings.sync_file)
        wandb.finish()
    return {
        "rows": csv_rows(csv) if rank == 0 else {},
        "logged": {key for key in trainer.logged_metrics if key.startswith("dni_")},
        "history": [each.state_dict() for each in monitors[0].history] if monitors else [],
        "weights": weights(module),
        "estimators": {n: weights(e) for n, e in strategy.engine.estimators.items()},
        "file": file,
        "timeline": timelines[0].found if timelines else None,
        "pictures": sorted(path.name for path in Path(csv.log_dir).rglob("*.png")) if rank == 0 else [],
    }


def all_cases(rank, folder):
    """Every case in one set of processes, which take long to start."""
    warnings.simplefilter("ignore")
    os.chdir(folder)
    os.environ |= {"PL_GLOBAL_SEED": "0", "WANDB_SILENT": "true", "WANDB_DISABLE_GIT": "true"}
    found = {}
    for name, case in CASES.items():
        options = {"wandb_too" if key == "wandb" else key: value for key, value in case.items()}
        found[name] = monitored_stage(rank, name, **options)
    return found


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """What every rank has to say, rank 0 first, by case."""
    said = on_ranks(all_cases, tmp_path_factory.mktemp("fits"), world_size=3, grouped=False, seconds=240)
    return {name: [each[name] for each in said] for name in CASES}


def in_one_process(batches=10, **options):
    """Rows of every step, and the probes."""
    logger, monitor = CSVLogger(".", name="one"), GradientMonitor(1)
    watching = {"callbacks": [monitor], "logger": logger, "log_every_n_steps": 1}
    fit(net(dropout=0.2), dni(rng="stage"), loader(8 * batches), **watching, **options)
    return csv_rows(logger), monitor.history


@pytest.mark.parametrize(
    ("case", "metrics", "accumulate"),
    [
        ("every step", AGAINST_TARGET, 1),
        ("accumulated", AGAINST_TARGET, 2),
        ("probed", AGAINST_TARGET + AGAINST_TRUE, 1),
    ],
)
def test_without_lag_figures_are_those_of_one_process_a_step_later(fits, case, metrics, accumulate):
    rows = fits[case][0]["rows"]
    expected, history = in_one_process(accumulate_grad_batches=accumulate)
    steps = rows_with(rows, "dni_target_error/net_0")
    assert steps == list(range(1, 10 // accumulate))
    for step in steps:
        found = {key: rows[step][key] for key in keys(metrics)}
        assert found == pytest.approx({key: expected[step - 1][key] for key in found}, rel=1e-6, abs=1e-7)
        assert [rows[step][key] for key in keys(["dni_staleness"])] == [0, 0]
    if case == "probed":
        cosines = [probe["cosine"] for probe in fits[case][0]["history"]]
        assert cosines == [pytest.approx(dict(probe.cosine), abs=1e-6) for probe in history[:-1]]


def test_rows_are_where_the_trainer_writes_them_and_say_how_old_targets_were(fits):
    first, *others = fits["rows"]
    rows = first["rows"]
    for key in [*keys([*AGAINST_TARGET, "dni_staleness"]), *shares()]:
        assert rows_with(rows, key) == [3, 7, 11], key
    assert not any(key in row for row in rows.values() for key in keys(AGAINST_TRUE))
    assert {rows[7][key] for key in keys(["dni_staleness"])} == {2.0}
    assert rows[11]["dni_step_time"] > 0
    assert first["pictures"] == ["dni_timeline.png"]
    for other in others:
        assert (other["logged"], other["history"]) == (set(), [])


@pytest.mark.parametrize("case", ["rows", "exact"])
def test_shares_of_time_are_shares(fits, case):
    rows = fits[case][0]["rows"]
    for step in (3, 7, 11):
        for stage in range(3):
            busy, wait_in, wait_out = (rows[step][f"{what}/stage_{stage}"] for what in SHARES)
            assert busy > 0
            assert wait_in >= 0
            assert wait_out >= 0
            assert busy + wait_in + wait_out <= 1


def test_a_wandb_run_knows_all_stages(fits):
    run = read_run(fits["rows"][0]["file"])
    assert [s for s, row in run.by_step().items() if "dni_target_cosine/net_1" in row] == [3, 7, 11]
    found = run.config["dni"]
    assert found["boundaries"] == BOUNDARIES
    assert found["estimators"] == {"net_0": "LinearEstimator", "net_1": "LinearEstimator"}
    assert found["estimator_parameters"] == {"net_0": 96, "net_1": 96}
    assert found["estimator_optimizer"] == {"name": "Adam", "lr": 1e-3}
    assert (found["staleness"], found["stages"], found["schedule"]) == (2, 3, "dni")
    assert run.summary["dni_target_error/net_0"] > 0
    image = next(row for row in run.rows if "dni_timeline.path" in row)
    assert image["trainer/global_step"] == 12
    files = Path(fits["rows"][0]["file"]).parent / "files"
    assert (files / image["dni_timeline.path"]).read_bytes()[:4] == b"\x89PNG"


def test_under_an_exact_schedule_only_time_is_logged(fits):
    first = fits["exact"][0]
    found = {key for row in first["rows"].values() for key in row if key.startswith("dni_")}
    assert found == {*shares(), *SPEED}
    stages = _on_one_clock(first["timeline"])
    for spans in stages.values():
        forward = {span.step for span in spans if span.activity is Activity.FORWARD}
        assert forward == set(range(10, 18))  # two microbatches in each of the batches 5 to 8
    found = read_run(first["file"]).config["dni"]
    assert (found["schedule"], found["microbatches"], found["stages"]) == ("1f1b", 2, 3)


def test_a_timeline_shows_every_batch_on_every_stage_in_its_turn(fits):
    stages = _on_one_clock(fits["rows"][0]["timeline"])
    assert list(stages) == [0, 1, 2]
    begins = {}
    for stage, spans in stages.items():
        assert all(a.end == b.start for a, b in pairwise(spans))
        forward = [span for span in spans if span.activity is Activity.FORWARD]
        assert sorted({span.step for span in forward}) == [5, 6, 7, 8]
        done = {span.activity for span in spans}
        assert done >= {Activity.FORWARD, Activity.BACKWARD, Activity.OPTIMIZER}
        assert done >= {Activity.WAIT_IN, Activity.WAIT_OUT}
        assert (Activity.ESTIMATOR in done) == (stage < 2)
        begins[stage] = {step: min(s.start for s in forward if s.step == step) for step in range(5, 9)}
    for step in range(5, 9):  # one host, one clock: no activation is used before it was made
        assert begins[0][step] < begins[1][step] < begins[2][step]


def test_probes_are_drawn_by_rank_0_alone(fits):
    first, *others = fits["probed rows"]
    for key in keys(AGAINST_TARGET + AGAINST_TRUE):
        assert rows_with(first["rows"], key) == [3, 7, 11], key
    assert first["pictures"] == ["dni_gradients.png", "dni_timeline.png"]
    assert [probe["step"] for probe in first["history"]] == [3, 7, 11]
    assert all(other["history"] == [] for other in others)
    image = next(row for row in read_run(first["file"]).rows if "dni_gradients.caption" in row)
    assert "on probe steps, for which all stages of the pipeline wait" in image["dni_gradients.caption"]


@pytest.mark.parametrize("case", ["rows", "probed rows"])
def test_a_watched_run_is_the_same_bits(fits, case):
    for one, other in zip(fits["not watched"], fits[case], strict=True):
        assert different(one["weights"], other["weights"]) == []
        assert one["estimators"].keys() == other["estimators"].keys()
        for name, found in one["estimators"].items():
            assert different(found, other["estimators"][name]) == []


def test_figures_of_an_estimator_that_hears_late_come_in_a_later_row(fits):
    rows = fits["heard late"][0]["rows"]
    assert rows_with(rows, "dni_target_error/net_1") == [4, 9, 14, 19]
    assert rows_with(rows, "dni_target_error/net_0") == [9, 14, 19]
    assert {rows[9]["dni_staleness/net_0"], rows[9]["dni_staleness/net_1"]} == {2.0, 1.0}
