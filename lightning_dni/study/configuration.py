"""What a study's YAML says: axes, seeds, and what each run trains or calls."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lightning_dni.errors import StudyError
from lightning_dni.study.checks import (
    check_axis,
    check_keys,
    check_mapping,
    check_name,
    check_names,
    check_run_name,
    check_seeds,
    check_text,
)

KEYS = (
    *("recipe", "variables", "grid", "seeds", "skip", "only", "fit", "call", "arguments"),
    *("table", "picture", "wandb", "quick"),
)
PICTURE_KEYS = ("x", "y", "line", "panel", "x_scale", "y_scale", "title", "cuts", "images")
LONGEST_TAG = 64
NO_AXES = ("step", "layer")
TAKEN = ("seed", "name", "seeds", "status", "failed", "failure", "seconds")
ESTIMATOR_AXES = ("estimator", "method", "module")
GIVEN_BY_STUDY = {
    "seed_everything": "the study sets it to each of `seeds`",
    "trainer.logger": "the study adds a CSVLogger, and W&B as `wandb` says",
}
Cell = dict[str, str]
"""The name of the value on each axis."""


@dataclass(frozen=True)
class Picture:
    """What is drawn; `x` is an axis, "step" or "layer", `y` are metrics, a panel each.

    `words` are written beside metrics, `cuts` are layers behind which a line is drawn, `images` is a file in
    the folders of runs.
    """

    x: str
    y: tuple[str, ...]
    line: str | None = None
    panel: tuple[str, ...] = ()
    x_scale: str = "linear"
    y_scale: str | Mapping[str, str] = "linear"
    title: str | None = None
    cuts: tuple[str, ...] = ()
    images: str | None = None
    words: Mapping[str, str] = field(default_factory=dict)

    def y_scale_of(self, metric: str) -> str:
        """That of all metrics, or of this one; linear where nothing is said of it."""
        return self.y_scale if isinstance(self.y_scale, str) else self.y_scale.get(metric, "linear")


@dataclass(frozen=True)
class Run:
    """One point of the grid with one seed; `configuration` is resolved."""

    cell: Cell
    seed: int
    configuration: dict[str, Any]

    @property
    def name(self) -> str:
        """Its folder's name."""
        return run_name(self.cell, self.seed)


@dataclass(frozen=True)
class Study:
    """A study as read, with all its runs in order."""

    name: str
    recipe: dict[str, Any]
    axes: dict[str, list[str]]
    runs: list[Run]
    table: tuple[str, ...]
    picture: Picture | None
    wandb: dict[str, Any] | None
    source: DictConfig = field(repr=False)

    @property
    def tags(self) -> list[str]:
        """For W&B, which takes 64 characters: the recipe's name and its tags, or else its claim."""
        claim = str(self.recipe.get("claim", ""))[:LONGEST_TAG]
        tags = [str(tag) for tag in self.recipe.get("tags") or ([claim] if claim else [])]
        return [self.name, *tags]

    @property
    def over_layers(self) -> bool:
        """Whether the picture's x is the layers of metrics `METRIC/LAYER`, and no axis that is called so."""
        return self.picture is not None and self.picture.x == "layer" and "layer" not in self.axes

    def job_type(self, run: Run) -> str:
        """The estimator of a run: its name on the axis that `recipe.job_type` names, or what that says."""
        first = next(iter(self.axes), "run")
        said = self.recipe.get("job_type") or next(filter(self.axes.__contains__, ESTIMATOR_AXES), first)
        return run.cell.get(said, said)


def run_name(cell: Mapping[str, str], seed: int) -> str:
    """`method=cDNI,depth=3,seed=0`."""
    return ",".join(f"{axis}={name}" for axis, name in {**cell, "seed": str(seed)}.items())


def is_study(configuration: Mapping[Any, Any]) -> bool:
    """Whether a YAML is that of a study, not of a single fit."""
    return "fit" in configuration or "call" in configuration


def read_study(file: str | Path, overrides: Sequence[tuple[str, str]] = (), *, quick: bool = False) -> Study:
    """Read a study's YAML.

    Args:
        file: The YAML.
        overrides: Dotted keys and what to put there, as YAML.
        quick: Whether to put in what `quick` says.

    Raises:
        StudyError: The file cannot be read, or says what it should not; the message names the key.
    """
    file = Path(file)
    source = _load(file)
    if quick:
        for key, value in check_mapping("quick", source.get("quick")).items():
            OmegaConf.update(source, str(key), value, merge=False, force_add=True)
    for key, text in overrides:
        _override(source, key, text)
    if not is_study(source) and {"model", "trainer"} & set(source):
        raise StudyError(
            f"Expected {str(file)!r} to hold `fit` or `call`, but it configures a single training. Run it by "
            f"`lightning-dni fit --config {file}`."
        )
    check_keys("the study", list(source), KEYS)
    axes = _axes(source)
    table = check_names("table", source.get("table"))
    return Study(
        name=file.stem,
        recipe=_recipe(source),
        axes={axis: list(values) for axis, values in axes.items()},
        runs=list(_runs(source, axes)),
        table=table,
        picture=_picture(source.get("picture"), axes, table),
        wandb=None if source.get("wandb") is None else _plain(check_mapping("wandb", source.wandb)),
        source=source,
    )


def _load(file: Path) -> DictConfig:
    if not file.is_file():
        raise StudyError(f"Expected `--config` to name a YAML file, but there is no {str(file)!r}.")
    try:
        source = OmegaConf.load(file)
    except (YAMLError, OmegaConfBaseException) as error:
        raise StudyError(f"Expected {str(file)!r} to be YAML, but it cannot be read: {error}") from error
    if not isinstance(source, DictConfig):
        raise StudyError(f"Expected {str(file)!r} to hold the keys {', '.join(KEYS)}, but got a list.")
    return source


def _override(source: DictConfig, key: str, text: str) -> None:
    try:
        value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[call-overload, index]
        OmegaConf.update(source, key, value, merge=False, force_add=True)
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise StudyError(
            f"Expected --{key} to name a key of the study and {text!r} to be YAML, but got: {error}"
        ) from error


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node) if OmegaConf.is_config(node) else node


def _recipe(source: DictConfig) -> dict[str, Any]:
    recipe: dict[str, Any] = check_mapping("recipe", _plain(source.get("recipe")))
    job_type = recipe.get("job_type", "estimator")
    if not isinstance(job_type, str) or not job_type:
        raise StudyError(
            f"Expected `recipe.job_type` to be the name of an axis or a text, but got {job_type!r}. Write "
            "`job_type: method`, or leave it out."
        )
    tags = recipe.get("tags") or []
    if not isinstance(tags, list) or not all(0 < len(str(tag)) <= LONGEST_TAG for tag in tags):
        raise StudyError(
            f"Expected `recipe.tags` to be a list of texts of 1 to {LONGEST_TAG} characters, as in W&B, "
            f"but got {tags!r}. Write `tags: [section 6, digits]`."
        )
    return recipe


def _axes(source: DictConfig) -> dict[str, dict[str, Any]]:
    """The values on each axis by their names: those of a mapping, or the values themselves."""
    axes: dict[str, dict[str, Any]] = {}
    for axis, values in check_mapping("grid", _plain(source.get("grid"))).items():
        check_axis(axis, TAKEN)
        if not isinstance(values, (list, dict)) or not values:
            raise StudyError(
                f"Expected `grid.{axis}` to be a list of values or a mapping of names to values, but got "
                f"{values!r}. Leave the axis out if it has nothing to vary."
            )
        pairs = values.items() if isinstance(values, dict) else zip(values, values, strict=True)
        axes[str(axis)] = {check_name(f"grid.{axis}", name): value for name, value in pairs}
    return axes


def _runs(source: DictConfig, axes: Mapping[str, Mapping[str, Any]]) -> Iterator[Run]:
    fits = "fit" in source
    if fits == ("call" in source):
        raise StudyError(
            f"Expected either `fit` (a LightningCLI configuration) or `call` (a function), but got "
            f"{'both' if fits else 'neither'}. Name one of them."
        )
    if fits and "arguments" in source:
        raise StudyError("Expected `arguments` beside `call`, but got them beside `fit`. Leave them out.")
    seeds = check_seeds(_plain(source.get("seeds", [0])))
    skipped = _selections(source, "skip", axes)
    only = _selections(source, "only", axes)
    here = OmegaConf.create(_plain(source))  # once: OmegaConf parses every ${...} when it is put in
    for names in product(*axes.values()):
        cell = dict(zip(axes, names, strict=True))
        if any(_matches(cell, each) for each in skipped) or not all(_matches(cell, each) for each in only):
            continue
        values = {axis: axes[axis][name] for axis, name in cell.items()}
        for seed in seeds:
            here["run"] = {**values, "seed": seed, "name": check_run_name(run_name(cell, seed))}
            OmegaConf.clear_cache(here)  # what a resolver gave for the run before
            yield Run(cell, seed, _configuration(here, seed))


def _selections(
    source: DictConfig, key: str, axes: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, list[str]]]:
    """Entries of `skip` or `only`: names per axis."""
    entries = _plain(source.get(key)) or []
    found = []
    for entry in entries if isinstance(entries, list) else [entries]:
        names = {
            str(axis): [str(each) for each in (value if isinstance(value, list) else [value])]
            for axis, value in check_mapping(key, entry).items()
        }
        check_keys(key, list(names), list(axes))
        for axis, chosen in names.items():
            check_keys(f"{key}.{axis}", chosen, list(axes[axis]))
        found.append(names)
    return found


def _matches(cell: Cell, selection: Mapping[str, Sequence[str]]) -> bool:
    return all(cell[axis] in names for axis, names in selection.items())


def _configuration(here: DictConfig, seed: int) -> dict[str, Any]:
    """What one run trains or calls, with every `${...}` resolved; `here` is the study with its `run`."""
    key = "fit" if "fit" in here else "call"
    try:
        parts = {name: here[name] for name in ("fit", "call", "arguments") if name in here}
        resolved = {
            name: OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
            for name, part in parts.items()
        }
    except OmegaConfBaseException as error:
        known = ", ".join(f"${{run.{name}}}" for name in here.run)
        raise StudyError(
            f"Expected every ${{...}} in `{error.full_key or key}` to name a key of the study, but: "
            f"{str(error.msg or error).splitlines()[0]}. Name a key that is there; of the run these are "
            f"{known}."
        ) from error
    if key == "call":
        return {
            "call": check_text("call", resolved["call"]),
            "arguments": check_mapping("arguments", resolved.get("arguments")),
        }
    fit = check_mapping("fit", resolved["fit"])
    for name, reason in GIVEN_BY_STUDY.items():
        if _holds(fit, name):
            raise StudyError(f"Expected no `fit.{name}`: {reason}. Leave it out.")
    return {"seed_everything": seed, **fit}


def _holds(fit: Any, dotted: str) -> bool:
    for part in dotted.split("."):
        if not isinstance(fit, dict) or part not in fit:
            return False
        fit = fit[part]
    return True


def _picture(node: Any, axes: Mapping[str, Any], table: Sequence[str]) -> Picture | None:
    if node is None:
        return None
    given = check_mapping("picture", _plain(node))
    check_keys("picture", list(given), PICTURE_KEYS)
    if "x" not in given or not (given.get("y") or table):
        raise StudyError(
            f"Expected `picture` to name `x` (an axis, step or layer) and `y` (metrics), but got {given!r}. "
            "Add them."
        )
    said = given.get("y") or list(table)
    y = check_names("picture.y", list(said) if isinstance(said, dict) else said)
    words = {name: str(text) for name, text in said.items()} if isinstance(said, dict) else {}
    panel = check_names("picture.panel", given.get("panel"), "axes")
    check_keys("picture.panel", panel, list(axes))
    for key in ("x", "line"):
        if given.get(key) is not None:
            check_keys(f"picture.{key}", [given[key]], [*axes, *(NO_AXES if key == "x" else [])])
    for key in ("x_scale", "y_scale"):
        scales = [given.get(key, "linear")]
        if key == "y_scale" and isinstance(scales[0], dict):
            check_keys("picture.y_scale", list(scales[0]), y)
            scales = list(scales[0].values())
        check_keys(f"picture.{key}", scales, ["linear", "log"])
    cuts = check_names("picture.cuts", given.get("cuts"), "layers")
    return Picture(**{**given, "y": y, "panel": panel, "cuts": cuts, "words": words})
