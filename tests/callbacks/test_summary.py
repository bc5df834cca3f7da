"""What the monitor prints when a fit has ended."""

import ast
import inspect
import math
import re
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from callbacks.test_monitor import monitored
from fits import BOUNDARIES, dni

from lightning_dni import DNIStrategy
from lightning_dni.callbacks import GradientMonitor
from lightning_dni.callbacks.engine import key_of
from lightning_dni.callbacks.summary import _of_small_error, advise
from lightning_dni.demos import DigitsDataModule, MLPClassifier
from lightning_dni.estimators import CriticEstimator, LinearEstimator, LocalLossEstimator, ZeroEstimator

GOOD = {
    "dni_true_gradient_cosine": 0.8,
    "dni_sg_error": 0.6,
    "dni_norm_ratio": 0.9,
    "dni_target_error": 0.6,
    "dni_bootstrap_error": 0.0,
    "dni_weight_error": 0.7,
}


def printed(capsys):
    """The cells of each boundary's row, and what is advised there."""
    out = capsys.readouterr().out
    assert "Synthetic gradients at the end of fit" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    advice = dict(line.split(": ", 1) for line in out.splitlines() if line.startswith("net."))
    return [(*row, advice.get(row[0], "")) for row in rows]


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


def test_the_figures_are_the_means_of_the_last_probes(capsys):
    rows, _, _ = monitored(1, max_epochs=2)
    table = printed(capsys)
    assert [row[0] for row in table] == BOUNDARIES
    last = sorted(rows)[-10:]
    for name, kind, cosine, error, _, _, certain, _ in table:
        assert kind == "Linear"
        for key, shown in (("dni_true_gradient_cosine", cosine), ("dni_sg_error", error)):
            values = [rows[step][key_of(key, name)] for step in last]
            assert float(shown) == pytest.approx(sum(values) / 10, rel=5e-3)
        errors = [rows[step][key_of("dni_weight_error", name)] for step in last]
        assert certain == f"{sum(e < 1 for e in errors)} of 10"


def test_zero_is_told_what_it_does_and_a_local_loss_is_not_blamed(capsys):
    monitored(
        2, strategy=dni(estimator={"net.0": ZeroEstimator, "net.1": lambda s: LocalLossEstimator(s, 3)})
    )
    (_, zero, *_, nothing), (_, local, *_, silent) = printed(capsys)
    assert (zero, nothing) == ("Zero", "no gradient: nothing below learns")
    assert (local, silent) == ("LocalLoss", "")


@pytest.mark.parametrize("estimator", [LinearEstimator, CriticEstimator])
def test_errors_that_add_up_in_the_weights_are_told_of(capsys, estimator):
    """Of digits, in a net without batch norm: not those of the critic that the line names."""
    torch.manual_seed(0)
    module = MLPClassifier(hidden_size=64, num_hidden=1, batch_norm=False, learning_rate=3e-3)
    strategy = DNIStrategy(
        boundaries=["net.hidden_0"],
        estimator=partial(estimator, num_classes=10),
        estimator_optimizer=partial(torch.optim.Adam, lr=3e-3),
    )
    digits = DigitsDataModule()
    digits.setup("fit")
    rows, _, _ = monitored(10, module, strategy, train=digits.train_dataloader(), max_epochs=15)
    last = sorted(step for step in rows if "dni_weight_error/net_hidden_0" in rows[step])[-10:]
    of_weights, of_rows = (
        sum(rows[step][f"{key}/net_hidden_0"] for step in last) / 10
        for key in ("dni_weight_error", "dni_sg_error")
    )
    assert of_rows < 0.9
    ((*_, line),) = printed(capsys)
    assert bool(line) == (of_weights >= 1) == (estimator is LinearEstimator)
    assert line.startswith("errors of rows add up in the weights: a critic, " if line else "")


def test_exact_gradients_need_no_advice(capsys):
    monitored(2, strategy=dni(bp_lambda=1.0))
    assert [row[-2:] for row in printed(capsys)] == [("5 of 5", "")] * 2


def test_without_probes_the_target_is_all_there_is(capsys):
    monitored(2, monitor=GradientMonitor(2, probe=False))
    for _, _, cosine, error, ratio, target, certain, _ in printed(capsys):
        assert [cosine, error, ratio, certain] == ["-"] * 4
        assert float(target) > 0


@pytest.mark.parametrize("options", [{"summary": False}, {"every_n_train_steps": 1000}], ids=str)
def test_nothing_is_printed_where_nothing_is_asked_or_measured(capsys, options):
    monitored(2, monitor=GradientMonitor(**{"every_n_train_steps": 2, **options}))
    assert "end of fit" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("figures", "start"),
    [
        ({}, ""),
        ({"dni_sg_error": 0.95, "dni_bootstrap_error": 0.95}, "its target is wrong itself"),
        ({"dni_sg_error": 2.5, "dni_norm_ratio": 2.0}, "too large"),
        ({"dni_sg_error": 0.95, "dni_norm_ratio": 0.1}, "too small"),
        ({"dni_sg_error": 1.1, "dni_true_gradient_cosine": -0.1}, "another direction"),
        ({"dni_sg_error": 0.95, "dni_true_gradient_cosine": 0.4}, "a larger estimator"),
        ({"dni_weight_error": 1.2}, "errors of rows add up"),
        ({"dni_weight_error": None}, ""),
        ({"dni_weight_error": 1.2, "dni_sg_error": 0.0}, ""),
        ({"dni_sg_error": None, "dni_target_error": 1.2}, "worse than no gradient"),
        ({"dni_sg_error": None, "dni_target_error": 0.7}, ""),
        (dict.fromkeys(GOOD, float("nan")), "too large: a lower rate"),
        ({"dni_sg_error": None, "dni_target_error": float("nan")}, "worse than no gradient"),
    ],
)
def test_advice(figures, start):
    said = advise({**GOOD, **figures})
    assert said.startswith(start)
    assert bool(said) == bool(start)


GUIDE = (Path(__file__).parents[2] / "docs/choosing.md").read_text()
ROWS = re.findall(r"^\| (.+?) \| (.+?) \| .+ \|$", GUIDE.partition("| the line |")[2], re.MULTILINE)
SEEN = {line.split(":")[0]: seen for line, seen in ROWS}
NO_PROBE = {"dni_sg_error": None, "dni_norm_ratio": None}
FAR = {**GOOD, "dni_sg_error": 1.0}
# the line, what the guide says of it, the figure meant, whether the line is for more of it, and for equality
THRESHOLDS = [
    ("too large", r"more than ([\d.]+) times", "dni_norm_ratio", True, False, {}),
    ("too small", r"less than ([\d.]+) of", "dni_norm_ratio", False, False, {}),
    ("its target is wrong itself", r"off by ([\d.]+) or more", "dni_bootstrap_error", True, True, {}),
    ("another direction", r"at most ([\d.]+)", "dni_true_gradient_cosine", False, True, {}),
    (
        "errors of rows add up in the weights",
        r"of ([\d.]+) or more, though",
        "dni_weight_error",
        True,
        True,
        {"dni_sg_error": 0.5},
    ),
    (
        "worse than no gradient, against the target",
        r"is ([\d.]+) or",
        "dni_target_error",
        True,
        True,
        NO_PROBE,
    ),
]


def test_the_guide_has_every_line_that_is_printed_and_no_other():
    values = [0.0, 0.05, 0.2, 1.0, 2.0]
    measured = (dict(zip(GOOD, each, strict=True)) for each in product(values, repeat=len(GOOD)))
    probed = {advise(figures) for figures in measured}
    said = probed | {advise({**GOOD, **NO_PROBE, "dni_target_error": value}) for value in values}
    assert {line for line, _ in ROWS} == said - {""}
    returned = [
        node.value
        for function in (advise, _of_small_error)
        for node in ast.walk(ast.parse(inspect.getsource(function)))
        if isinstance(node, ast.Return)
    ]
    written = {node.value for value in returned for node in ast.walk(value) if isinstance(node, ast.Constant)}
    assert said == written


@pytest.mark.parametrize(
    ("line", "words", "figure", "more", "equal", "others"), THRESHOLDS, ids=lambda x: str(x)[:20]
)
def test_the_guide_has_the_thresholds(line, words, figure, more, equal, others):
    (at,) = map(float, re.findall(words, SEEN[line]))
    away = math.nextafter(at, math.inf if more else -math.inf)
    inside, outside = (at, math.nextafter(at, -math.inf if more else math.inf)) if equal else (away, at)
    assert advise({**FAR, **others, figure: inside}).startswith(line)
    assert not advise({**FAR, **others, figure: outside}).startswith(line)


def test_no_threshold_of_the_guide_is_left_out_and_small_errors_get_no_line():
    used = [words for _, words, *_ in THRESHOLDS]
    assert re.findall(r"[\d.]*\d", " ".join(SEEN.values())) == [
        number for words in used for seen in SEEN.values() for number in re.findall(words, seen)
    ]
    (least,) = map(float, re.findall(r"errors of at least ([\d.]+\d)", GUIDE))
    for ratio in (0.0, 0.2, 1.0, 2.0):
        figures = {**GOOD, "dni_norm_ratio": ratio}
        assert advise({**figures, "dni_sg_error": least})
        assert not advise({**figures, "dni_sg_error": math.nextafter(least, 0)})
