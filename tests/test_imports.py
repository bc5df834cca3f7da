"""Who may import whom, and which names are promised."""

import importlib
import re
import shutil
import subprocess
import sys
from types import FunctionType

import pytest

NAMES = {
    "lightning_dni.analysis": [
        "ArtificialData",
        "Conservation",
        "DeepRun",
        "GradientField",
        "InjectedErrorEstimator",
        "LinearMap",
        "LinearProbe",
        "LossSurfaces",
        "RegressionRun",
        "Stationarity",
        "Surface",
        "TrackingCondition",
        "TrackingInstrument",
        "Trajectory",
        "artificial_data",
        "class_block_distances",
        "conservation",
        "conservation_of",
        "deep_linear",
        "descend",
        "dissimilarity",
        "fit_linear_map",
        "fit_probe",
        "implicit_loss",
        "largest_singular_value",
        "layer_outputs",
        "log_loss_map",
        "loss_surface",
        "loss_surfaces",
        "one_hot",
        "order_by_class",
        "output_gradient",
        "plane",
        "quadratic_loss",
        "regress",
        "representation_error",
        "row_losses",
        "softmax_map",
        "squared_error_map",
        "squared_error_map_below",
        "stationarity",
        "tracking_condition",
        "train_deep_linear",
        "weight_norm_profile",
        "weight_norm_slope",
    ],
    "lightning_dni.core": [
        "BoundaryReport",
        "BoundarySpec",
        "DNIEngine",
        "Denominator",
        "EstimatorFactory",
        "Exchange",
        "Feedback",
        "Gradient",
        "GradientEstimator",
        "HasEngine",
        "InputEstimator",
        "Instrument",
        "LeafSpec",
        "Lock",
        "Observable",
        "Observation",
        "OptimizerFactory",
        "Record",
        "Signal",
        "SplitOptimizer",
        "StepReport",
        "Updater",
        "mix_gradients",
        "sg_loss",
    ],
    "lightning_dni.estimators": [
        "BackpropEstimator",
        "ControlVariateEstimator",
        "ConvEstimator",
        "CriticCascade",
        "CriticEstimator",
        "DelayedGradientEstimator",
        "DirectFeedbackAlignmentEstimator",
        "FeedbackAlignmentEstimator",
        "KickbackEstimator",
        "LinearEstimator",
        "LocalLossEstimator",
        "LowRankEstimator",
        "MLPEstimator",
        "ProbeEstimator",
        "RecurrentEstimator",
        "SobolevEstimator",
        "ZeroEstimator",
    ],
    "lightning_dni.metrics": [
        "GradientCosineSimilarity",
        "GradientNormRatio",
        "GradientRelativeError",
        "GradientSignAgreement",
        "gradient_cosine",
        "gradient_norm_ratio",
        "gradient_relative_error",
        "gradient_row_cosine",
        "gradient_sign_agreement",
    ],
    "lightning_dni.strategies": [
        "DNIDDPStrategy",
        "DNIPipelineStrategy",
        "DNIStrategy",
        "consolidate",
    ],
}

WITHOUT_THE_PACKAGE = """
import sys, types
package = types.ModuleType("lightning_dni")  # in place of __init__, which imports Lightning on purpose
package.__path__ = [sys.argv[1]]
sys.modules["lightning_dni"] = package
for name in sys.argv[2:]:
    __import__(name)
    print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def python(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )


def imported_by(package, *names):
    """Top-level modules that are loaded after each of `names` in turn."""
    done = python("-c", WITHOUT_THE_PACKAGE, package, *names, cwd=package)
    assert done.returncode == 0, done.stderr
    return [set(line.split()) for line in done.stdout.splitlines()]


@pytest.fixture
def package(pytestconfig):
    return pytestconfig.rootpath / "lightning_dni"


@pytest.fixture
def copied(pytestconfig, tmp_path):
    """The package and its configuration where a test may spoil them."""
    shutil.copytree(pytestconfig.rootpath / "lightning_dni", tmp_path / "lightning_dni")
    shutil.copy(pytestconfig.rootpath / "pyproject.toml", tmp_path)
    return tmp_path


def lint(folder):
    pytest.importorskip("importlinter", reason="no import-linter in the environments of `make test-matrix`")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return python("-c", code, "--no-cache", cwd=folder)


# ---- the engine is torch-only


def test_engine_estimators_and_metrics_load_no_lightning(package):
    layers = ["lightning_dni.core", "lightning_dni.estimators", "lightning_dni.metrics"]
    core, estimators, metrics = imported_by(package, *layers)
    torch_only = {"lightning", "pytorch_lightning", "torchmetrics", "wandb", "jsonargparse"}
    assert "torch" in core
    assert core.isdisjoint(torch_only)
    assert estimators.isdisjoint(torch_only)
    assert "torchmetrics" in metrics
    assert metrics.isdisjoint({"lightning", "pytorch_lightning", "wandb"})


def test_a_module_that_is_loaded_is_seen(copied):
    (copied / "lightning_dni" / "errors.py").write_text("import wave\n")
    assert "wave" in imported_by(copied / "lightning_dni", "lightning_dni.errors")[0]


# ---- imports point down


def test_the_import_contracts_are_kept(copied):
    done = lint(copied)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("path", "line", "contract"),
    [
        ("core/cut.py", "import lightning.pytorch", "the engine is torch-only"),
        ("core/cut.py", "from lightning_dni.estimators import zero", "imports point down"),
        ("metrics/functional.py", "import lightning", "metrics do not know Lightning"),
        ("analysis/data.py", "import lightning", "metrics do not know Lightning"),
        ("analysis/data.py", "from lightning_dni.callbacks import pictures", "imports point down"),
        ("strategies/options.py", "import wandb", "one file owns wandb"),
    ],
    ids=["engine", "upwards", "metrics", "analysis", "analysis upwards", "wandb"],
)
def test_a_broken_contract_is_caught(copied, path, line, contract):
    file = copied / "lightning_dni" / path
    file.write_text(f"{file.read_text()}\n{line}\n")
    done = lint(copied)
    assert done.returncode != 0
    assert any(contract in row and "BROKEN" in row for row in done.stdout.splitlines()), done.stdout


# ---- names


@pytest.mark.parametrize("package_name", NAMES)
def test_the_public_names_are_these(package_name):
    package = importlib.import_module(package_name)
    assert sorted(package.__all__) == sorted(NAMES[package_name])
    for name in package.__all__:
        assert getattr(package, name) is not None


@pytest.mark.parametrize("package_name", NAMES)
def test_public_classes_and_functions_are_documented(package_name):
    package = importlib.import_module(package_name)
    public = {name: getattr(package, name) for name in package.__all__}
    silent = [n for n, it in public.items() if isinstance(it, (type, FunctionType)) and not it.__doc__]
    assert silent == []


IMPORTED_TWICE = """
import threading, torch
before, threads = torch.get_rng_state(), threading.active_count()
import lightning_dni
import importlib
importlib.reload(lightning_dni.strategies)
from lightning.pytorch.strategies import StrategyRegistry
assert torch.equal(before, torch.get_rng_state()), "the import drew random numbers"
assert threading.active_count() == threads, "the import started a thread"
print(*StrategyRegistry.available_strategies())
"""


def test_importing_the_package_registers_its_strategies_and_does_nothing_else(package):
    done = python("-c", IMPORTED_TWICE, cwd=package.parent)
    assert done.returncode == 0, done.stderr
    assert {"dni", "dni_ddp", "ddp"} <= set(done.stdout.split())


def test_shapes_are_checked_wherever_they_are_annotated(pytestconfig):
    """The option names modules; one whose shapes nobody checks would not be noticed."""
    checked = tuple(pytestconfig.getoption("jaxtyping_packages").split(","))
    root = pytestconfig.rootpath
    annotated = {
        ".".join(path.relative_to(root).with_suffix("").parts)
        for path in (root / "lightning_dni").rglob("*.py")
        if re.search(r"^from jaxtyping import", path.read_text(), re.MULTILINE)
    }
    assert annotated
    assert {
        name for name in annotated if not f"{name}.".startswith(tuple(f"{each}." for each in checked))
    } == set()
