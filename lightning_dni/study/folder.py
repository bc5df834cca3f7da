"""The folder of a run: its resolved YAML, and its result once it has ended."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_dni.errors import StudyError

CONFIGURATION, RESULT, TRACEBACK = "run.yaml", "result.json", "error.txt"


@dataclass(frozen=True)
class Result:
    """How a run ended; `error` is the exception of one that failed."""

    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


class RunFolder:
    """What is kept of one run.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def configuration_file(self) -> Path:
        """The resolved YAML: of a training, `lightning-dni fit --config` runs it alone."""
        return self.path / CONFIGURATION

    @property
    def result(self) -> Result | None:
        """None where the run has not ended: not yet started, under way, or interrupted."""
        file = self.path / RESULT
        return Result(**json.loads(file.read_text())) if file.exists() else None

    @property
    def finished(self) -> bool:
        """Whether the run ended well, and so need not be repeated."""
        result = self.result
        return result is not None and result.error is None

    def check_unchanged(self, configuration: dict[str, Any]) -> None:
        """Whether what has finished here was configured as it is now.

        Raises:
            StudyError: It was not: results of different configurations belong into different folders.
        """
        kept = OmegaConf.to_container(OmegaConf.load(self.configuration_file))
        difference = next(_differences("", kept, configuration), None)
        if difference is not None:
            key, before, now = difference
            raise StudyError(
                f"Expected the finished run {str(self.path)!r} to be configured as it is now, but "
                f"`{key}` was {before} and is {now}. Pass another `--out`, or delete the folder to "
                "run it anew."
            )

    def start(self, configuration: dict[str, Any]) -> None:
        """Clear away what an interrupted or failed run has left, and write the YAML."""
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(configuration), self.configuration_file)

    def end(self, result: Result, traceback: str | None = None) -> None:
        """Write the result, whole or not at all."""
        if traceback is not None:
            (self.path / TRACEBACK).write_text(traceback)
        unfinished = self.path / f"{RESULT}.part"
        unfinished.write_text(json.dumps(asdict(result), indent=1))
        os.replace(unfinished, self.path / RESULT)


def _differences(key: str, kept: Any, now: Any) -> Iterator[tuple[str, str, str]]:
    """Dotted keys with what was there and what is."""
    if isinstance(kept, dict) and isinstance(now, dict):
        for name in {**kept, **now}:
            inner = f"{key}.{name}" if key else str(name)
            if name not in kept or name not in now:
                before, after = ("left out" if name not in each else repr(each[name]) for each in (kept, now))
                yield inner, before, after
            else:
                yield from _differences(inner, kept[name], now[name])
    elif kept != now and repr(kept) != repr(now):  # nan is not itself
        yield key, repr(kept), repr(now)
