"""What a study's YAML says: the grid, references, overrides, and errors that name the key."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightning_dni.errors import StudyError
from lightning_dni.study.configuration import is_study, read_study

YAML = """
recipe: {claim: It works, tags: [section 6, 17]}
variables: {width: 4, dni: {class_path: Strategy, init_args: {estimator: "${run.method.estimator}"}}}
seeds: [3, 5]
grid:
  depth: [1, 10]
  method:
    plain: {strategy: auto}
    zero: {strategy: "${variables.dni}", estimator: Zero}
    linear: {strategy: "${variables.dni}", estimator: Linear}
skip: [{depth: 10, method: [zero, plain]}]
fit:
  model: {hidden: "${run.depth}", width: "${variables.width}", twice: "${fit.model.width}"}
  trainer: {strategy: "${run.method.strategy}"}
"""


def read(text=YAML, *overrides, **options):
    Path("toy.yaml").write_text(text)
    return read_study("toy.yaml", overrides, **options)


def test_every_cell_that_is_not_skipped_is_run_with_every_seed():
    study = read()
    assert [(run.cell["depth"], run.cell["method"], run.seed) for run in study.runs] == [
        (depth, method, seed)
        for depth, method in [("1", "plain"), ("1", "zero"), ("1", "linear"), ("10", "linear")]
        for seed in (3, 5)
    ]
    assert study.runs[-1].name == "depth=10,method=linear,seed=5"
    assert len({run.name for run in study.runs}) == 8


def test_references_follow_the_run():
    runs = {run.name: run.configuration for run in read().runs}
    assert runs["depth=1,method=zero,seed=5"] == {
        "seed_everything": 5,
        "model": {"hidden": 1, "width": 4, "twice": 4},
        "trainer": {"strategy": {"class_path": "Strategy", "init_args": {"estimator": "Zero"}}},
    }
    assert runs["depth=1,method=plain,seed=3"]["trainer"] == {"strategy": "auto"}
    assert runs["depth=10,method=linear,seed=3"]["model"]["hidden"] == 10


@pytest.mark.filterwarnings("ignore:register_new_resolver")
def test_what_a_resolver_keeps_is_of_one_run():
    OmegaConf.register_new_resolver("kept", lambda value: f"kept {value}", use_cache=True)
    try:
        study = read("call: a.b\ngrid: {n: [1, 2]}\narguments: {n: '${kept:${run.n}}'}")
    finally:
        OmegaConf.clear_resolver("kept")
    assert [run.configuration["arguments"]["n"] for run in study.runs] == ["kept 1", "kept 2"]


def test_overrides_reach_what_refers_to_them():
    study = read(
        YAML, ("fit.model.width", "7"), ("seeds", "1,2"), ("only.method", "zero"), ("wandb.offline", "true")
    )
    assert [run.seed for run in study.runs] == [1, 2]
    assert study.runs[0].configuration["model"] == {"hidden": 1, "width": 7, "twice": 7}
    assert study.wandb == {"offline": True}
    assert read(YAML, ("grid.depth", "[2]"), ("skip", "null")).axes["depth"] == ["2"]
    assert read(YAML + "quick: {fit.model.width: 1, seeds: [0]}", quick=True).runs[0].configuration[
        "model"
    ] == {
        "hidden": 1,
        "width": 1,
        "twice": 1,
    }


def test_job_type_and_tags():
    study = read()
    assert [study.job_type(run) for run in study.runs[::2]] == ["plain", "zero", "linear", "linear"]
    assert study.tags == ["toy", "section 6", "17"]
    claimed = read("recipe: {claim: '" + "x" * 70 + "'}\ncall: a.b\ngrid: {first: [u], second: [v]}")
    assert claimed.tags == ["toy", "x" * 64]
    assert claimed.job_type(claimed.runs[0]) == "u"
    axes = "call: a.b\ngrid: {size: [2], module: [m], data: [d]}\n"
    for recipe, job_type in {
        "": "m",
        "recipe: {job_type: data}": "d",
        "recipe: {job_type: zero}": "zero",
    }.items():
        said = read(axes + recipe)
        assert said.job_type(said.runs[0]) == job_type
    alone = read("call: a.b")
    assert (alone.job_type(alone.runs[0]), alone.runs[0].name) == ("run", "seed=0")


@pytest.mark.parametrize("job_type", ["2", "[method]", "''", "null"])
def test_a_job_type_is_a_text(job_type):
    message = r"Expected `recipe.job_type` to be the name of an axis or a text, but got .* leave it out"
    with pytest.raises(StudyError, match=message):
        read(f"call: a.b\nrecipe: {{job_type: {job_type}}}")


def test_a_fit_is_no_study():
    assert is_study({"fit": {}})
    assert is_study({"call": "a.b"})
    assert not is_study({"model": {}, "trainer": {}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "Expected 'toy.yaml' to hold the keys recipe, .* but got a list"),
        ("a: [", "Expected 'toy.yaml' to be YAML, but it cannot be read"),
        ("call: a.b\ngird: {}", "Expected `the study` to be among .* but got 'gird'. Write 'grid'"),
        ("seeds: [0]", "Expected either `fit` .* or `call` .* but got neither"),
        ("fit: {}\ncall: a.b", "Expected either `fit` .* but got both"),
        ("fit: {}\narguments: {}", "Expected `arguments` beside `call`, but got them beside `fit`"),
        ("fit: 3", "Expected `fit` to be a mapping, but got 3"),
        ("call: f", "Expected `call` to be the dotted path of a function, but got 'f'"),
        ("call: a.b\narguments: 3", "Expected `arguments` to be a mapping, but got 3"),
        ("call: a.b\nseeds: [0, 0]", r"Expected `seeds` to be different integers .* but got \[0, 0\]"),
        ("call: a.b\nseeds: [-1]", r"Expected `seeds` .* but got \[-1\]. Write `seeds: \[0, 1, 2\]`"),
        ("call: a.b\nseeds: []", r"Expected `seeds` .* but got \[\]"),
        ("call: a.b\nseeds: [x]", r"Expected `seeds` .* but got \['x'\]"),
        ("call: a.b\ngrid: {n: 3}", "Expected `grid.n` to be a list of values or a mapping .* but got 3"),
        ("call: a.b\ngrid: {n: []}", r"Expected `grid.n` to be a list .* but got \[\]. Leave the axis out"),
        ("call: a.b\ngrid: {n: [{a: 1}]}", "Expected every value in `grid.n` to have a name"),
        ("call: a.b\ngrid: {n: [a/b]}", "Expected every value in `grid.n` to have a name .* but got 'a/b'"),
        ("call: a.b\ngrid: {seed: [1]}", "Expected another name for `grid.seed`"),
        ("call: a.b\ngrid: {n: [1]}\nskip: {m: 1}", "Expected `skip` to be among n, but got 'm'"),
        ("call: a.b\ngrid: {n: [1]}\nskip: {n: 2}", "Expected `skip.n` to be among 1, but got '2'"),
        ("call: a.b\ngrid: {n: [1]}\nonly: {n: 2}", "Expected `only.n` to be among 1, but got '2'"),
        ("call: a.b\nseeds: [4294967296]", "Expected `seeds` .* from 0 to 4294967295, but got"),
        ("call: a.b\ngrid: {status: [1]}", "Expected another name for `grid.status`"),
        ("call: a.b\ngrid: {a/b: [1]}", "Expected axes of `grid` to have names without .* but got 'a/b'"),
        ("call: a.b\ngrid: {a.b: [1]}", "Expected axes of `grid` to have names without .* but got 'a.b'"),
        (
            f"call: a.b\ngrid: {{n: [{'x' * 255}]}}",
            "Expected names of runs of at most 255 bytes, but got 'n=xx",
        ),
        ("model: {}\ntrainer: {}", "a single training. Run it by `lightning-dni fit --config toy.yaml`"),
        ("call: a.b\nrecipe: {tags: digits}", "Expected `recipe.tags` to be a list .* but got 'digits'"),
        (f"call: a.b\nrecipe: {{tags: [{'x' * 65}]}}", "Expected `recipe.tags` .* of 1 to 64 characters"),
        ("call: a.b\nskip: 3", "Expected `skip` to be a mapping, but got 3"),
        ("call: a.b\ntable: 3", "Expected `table` to be a list of metrics' names, but got 3. Write"),
        ("call: a.b\npicture: {x: step, y: 3}", "Expected `picture.y` to be a list .* but got 3"),
        ("call: a.b\nskip: [3]", "Expected `skip` to be a mapping, but got 3"),
        ("call: a.b\ntable: [{a: 1}]", "Expected `table` to be a list of metrics' names, but got"),
        ("call: a.b\npicture: {y: loss}", "Expected `picture` to name `x`"),
        ("call: a.b\npicture: {x: step}", "Expected `picture` to name .* and `y`"),
        ("call: a.b\npicture: {x: n, y: loss}", "Expected `picture.x` to be among step, layer, but got 'n'"),
        ("call: a.b\npicture: {x: step, y: a, lines: n}", "Expected `picture` .* 'lines'. Write 'line'"),
        (
            "call: a.b\npicture: {x: step, y: a, y_scale: {b: log}}",
            "Expected `picture.y_scale` to be among a",
        ),
        (
            "call: a.b\npicture: {x: step, y: a, y_scale: {a: lg}}",
            "Expected `picture.y_scale` .* but got 'lg'",
        ),
        ("call: a.b\npicture: {x: step, y: a, y_scale: lg}", "Expected `picture.y_scale` to be among linear"),
        ("fit: {seed_everything: 1}", "Expected no `fit.seed_everything`: the study sets it"),
        ("fit: {trainer: {logger: false}}", "Expected no `fit.trainer.logger`: the study adds"),
        (
            "fit: {a: {b: '${run.dept}'}}\ngrid: {depth: [1]}",
            r"in `fit.a.b` to name a key .*'run.dept' not found.* \$\{run.depth\}",
        ),
        ("fit: {a: '${model.b}'}", r"Expected every \$\{...\} in `fit.a` to name a key of the study"),
    ],
)
def test_an_error_names_the_key_and_what_to_do(text, message):
    with pytest.raises(StudyError, match=message):
        read(text)


def test_a_missing_file_and_an_override_that_is_no_yaml_are_named():
    with pytest.raises(StudyError, match=r"`--config` to name a YAML file, but there is no 'none.yaml'"):
        read_study("none.yaml")
    with pytest.raises(StudyError, match=r"Expected --fit.a to name a key .* and '\[1' to be YAML"):
        read(YAML, ("fit.a", "[1"))
