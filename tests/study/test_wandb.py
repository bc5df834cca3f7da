"""Studies in W&B: offline files read back for group, job type, tags, configuration, results and artifacts."""

from pathlib import Path

import pytest
import wandb
from callbacks.runs import frames, read_run
from study.parts import CALL, FIT, study

LOGGED = "wandb: {project: test, offline: true}\n"


@pytest.fixture(autouse=True)
def _own_run(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    yield
    wandb.finish()


def records(path):
    """The run's own record, and the names of the files in each artifact by the artifact's type."""
    from wandb.proto import wandb_internal_pb2 as pb

    run, artifacts = None, {}
    for frame in frames(path):
        record = pb.Record()
        record.ParseFromString(frame)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
        elif kind == "artifact":
            artifacts[record.artifact.type] = sorted(
                entry.path for entry in record.artifact.manifest.contents
            )
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            found = record.request.log_artifact.artifact
            artifacts[found.type] = sorted(entry.path for entry in found.manifest.contents)
    return run, artifacts


def in_folder(name="toy"):
    files = {path.parents[2]: path for path in Path("runs", name).rglob("run-*.wandb")}
    return {folder.relative_to("runs").as_posix(): path for folder, path in files.items()}


def test_a_study_of_functions():
    text = CALL + LOGGED + "picture: {x: rate, y: final, line: kind}\n"
    text = text.replace('seed: "${run.seed}"', 'seed: "${run.seed}", draws: true')
    text = text.replace("recipe: {", "recipe: {tags: [section 9], ")
    assert study(text, "--grid.rate", "[0.5]", "--seeds", "1", "--only.kind", "b") == 0
    files = in_folder()
    assert sorted(files) == ["toy", "toy/rate=0.5,kind=b,seed=1"]
    logged = read_run(files["toy/rate=0.5,kind=b,seed=1"])
    assert logged.config["rate"] == 0.5
    assert logged.summary["final"] == 1.0625
    assert [row["loss"] for row in logged.by_step().values()] == [1.5, 1.25, 1.125, 1.0625]
    assert any("drawn.path" in row for row in logged.rows)
    run, artifacts = records(files["toy/rate=0.5,kind=b,seed=1"])
    assert (run.run_group, run.job_type, run.display_name) == ("toy", "0.5", "rate=0.5,kind=b,seed=1")
    assert list(run.tags) == ["toy", "section 9"]
    assert artifacts == {"configuration": ["run.yaml"]}
    whole = read_run(files["toy"])
    assert "picture.path" in whole.rows[0]
    run, artifacts = records(files["toy"])
    assert (run.run_group, run.job_type, run.project) == ("toy", "study", "test")
    assert artifacts["study"] == ["results.csv", "runs.csv", "study.yaml"]
    before = set(Path("runs").rglob("*.wandb"))
    assert study(text, "--grid.rate", "[0.5]", "--seeds", "1", "--only.kind", "b") == 0
    assert set(Path("runs").rglob("*.wandb")) == before  # nothing ran, so there is nothing to log


def test_a_study_of_trainings_has_a_run_for_each():
    grid = "grid: {method: {small: 4, large: 8}}\nrecipe: {claim: Size matters}\n"
    words = ["--fit.model.init_args.hidden_size", "${run.method}"]
    assert study(FIT + grid + LOGGED, *words) == 0
    files = in_folder()
    assert sorted(files) == ["toy", "toy/method=large,seed=0", "toy/method=small,seed=0"]
    for method in ("small", "large"):
        file = files[f"toy/method={method},seed=0"]
        logged = read_run(file)
        assert [row["train_loss"] for row in logged.rows if "train_loss" in row]
        assert 0 <= logged.summary["test_accuracy"] <= 1
        run, artifacts = records(file)
        assert (run.run_group, run.job_type) == ("toy", method)
        assert list(run.tags) == ["toy", "Size matters"]
        assert artifacts["configuration"] == ["run.yaml"]
    assert len({read_run(file).id for file in files.values()}) == 3
    assert wandb.run is None
