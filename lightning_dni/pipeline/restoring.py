"""What of a saved state a pipeline can go on with: its boundaries may be others now, and so may its lag."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

BY_BOUNDARY = ("kinds", "estimators", "streams", "skipped")


def restrict(state: Mapping[str, Any], boundaries: Sequence[str]) -> dict[str, Any]:
    """The part of an engine's whole state that belongs to `boundaries`; it passes for a state of those.

    An optimizer that one process had over estimators of which some are gone is left out, with all others.

    Args:
        state: As it was saved, by a pipeline or in one process.
        boundaries: Those that there are now; estimators at new ones have no part in it.
    """
    part = {**state, "boundaries": list(boundaries)}
    part["specs"] = [spec for spec in state["specs"] if spec["name"] in boundaries]
    for key in BY_BOUNDARY:
        part[key] = {name: value for name, value in state[key].items() if name in boundaries}
    if "optimizers" not in state:
        return part
    kept = _optimizers(state, boundaries)
    for key in ("optimizers", "schedules"):
        if kept is None:
            del part[key]
        else:  # one schedule per optimizer, or none at all
            part[key] = [value for k, value in enumerate(state[key]) if k in kept]
    return part


def _optimizers(state: Mapping[str, Any], boundaries: Collection[str]) -> list[int] | None:
    """Which optimizers belong to `boundaries` alone; None where one belongs to others as well."""
    kept: list[int] = []
    for k, optimizer in enumerate(state["optimizers"]):
        names = {name for group in optimizer["param_groups"] for name in group["boundaries"]}
        if names <= set(boundaries):
            kept.append(k)
        elif names & set(boundaries):
            return None
    return kept


def goes_on(
    state: Mapping[str, Any], boundaries: Collection[str], staleness: int | None, copies: int = 1
) -> bool:
    """Whether what was under way when `state` was saved can be learnt from under these settings."""
    moved = state.get("pipeline")
    same = sorted(state["boundaries"]) == sorted(boundaries)
    return moved is not None and same and moved["staleness"] == staleness and copies_in(moved) == copies


def copies_in(moved: Mapping[str, Any]) -> int:
    """How many copies of the pipeline there were; `moved` is what was under way in them."""
    return 1 + len(moved.get("copies", []))


def pending_of(
    state: Mapping[str, Any], boundaries: Collection[str], staleness: int, copy: int, copies: int
) -> Mapping[str, Any]:
    """What was under way in one copy of the pipeline, by boundary; nothing where it is not gone on with.

    Args:
        state: As it was saved, by a pipeline or in one process.
        boundaries: Those that there are now.
        staleness: The lag that there is now.
        copy: Number of the copy.
        copies: How many there are now.
    """
    if not goes_on(state, boundaries, staleness, copies):
        return {}
    moved = state["pipeline"]
    found: Mapping[str, Any] = [moved["pending"], *moved.get("copies", [])][copy]
    return found


def norm_of(
    state: Mapping[str, Any] | None, stage: int, stages: int, staleness: int
) -> Mapping[str, Any] | None:
    """What a stage knew of the norm over all stages; None where it starts afresh.

    Args:
        state: As it was saved.
        stage: Number of the stage.
        stages: How many there are now.
        staleness: The lag that there is now.
    """
    moved = {} if state is None else state.get("pipeline", {})
    norms = moved.get("norms", {})
    same = len(norms) == stages and moved["staleness"] == staleness
    return norms[str(stage)] if same else None


def left_out(
    state: Mapping[str, Any],
    boundaries: Sequence[str],
    staleness: int | None,
    inputs: bool = False,
    copies: int = 1,
) -> list[str]:
    """What of `state` is not gone on with, one clause each.

    Args:
        state: As it was saved, by a pipeline or in one process.
        boundaries: Those that there are now.
        staleness: The lag that there is now; None in one process.
        inputs: Whether there are synthetic inputs now.
        copies: How many copies of the pipeline there are now.
    """
    gone = [name for name in state["estimators"] if name not in boundaries]
    new = [name for name in boundaries if name not in state["boundaries"]]
    clauses = []
    if gone:
        clauses.append(f"the gradient estimators at {gone} are dropped: these are no boundaries any more")
    if new:
        clauses.append(f"the gradient estimators at {new} start afresh: they were no boundaries")
    if "optimizers" in state and _optimizers(state, boundaries) is None:
        clauses.append("the estimators' optimizers start afresh: they were one for all boundaries")
    if inputs != ("inputs" in state):
        what = "start afresh: there were none" if inputs else "are dropped: there are none any more"
        clauses.append(f"the input estimators {what}")
    clauses += _sequences_left(state.get("replicas", []))
    late = sorted({delayed["boundary"] for delayed in state.get("delayed", [])})
    if late and staleness is not None:
        clauses.append(f"delayed gradients under way at {late} are dropped: they are of one process")
    moved = state.get("pipeline", {"pending": {}})
    graphs = {name: number for name, number in moved.get("late", {}).items() if number}
    if graphs:
        where = ", ".join(f"{number} at {name!r}" for name, number in graphs.items())
        clauses.append(
            f"delayed gradients under way ({where}) are dropped: they need graphs, which nobody saves"
        )
    waiting = {name: len(saved) for name, saved in moved["pending"].items() if saved}
    if waiting and not goes_on(state, boundaries, staleness, copies):
        where = ", ".join(f"{number} at {name!r}" for name, number in waiting.items())
        now = "one process" if staleness is None else _lag(staleness, copies)
        clauses.append(
            f"target gradients under way ({where}) are dropped: they were for boundaries "
            f"{list(state['boundaries'])} with {_lag(moved['staleness'], copies_in(moved))}, here it is {now}"
        )
    return clauses


def _lag(staleness: int, copies: int) -> str:
    return f"staleness={staleness}" + (f" in {copies} copies of the pipeline" if copies > 1 else "")


def pick_sequences(state: dict[str, Any], processes: int, own: int) -> None:
    """Bring what the truncated sequences of this process go on from to its place in `state`, in place.

    It is each process's own, and is left aside where another number of them has saved it.

    Args:
        state: As it was saved, in one process or by several.
        processes: Number of processes that train on sequences of their own.
        own: Which of them this is.
    """
    kept = state.pop("replicas", None) or [state.pop("truncations", {})]
    if len(kept) == processes:
        state["truncations"] = kept[own]
    else:
        state["replicas"] = kept


def _sequences_left(replicas: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to say of sequences that are of another number of processes than there are now."""
    names = sorted({name for own in replicas for name, endings in own.items() if endings})
    processes = "one process" if len(replicas) == 1 else f"{len(replicas)} processes"
    return [f"what sequences go on from at {names} is dropped: it is of {processes}"] if names else []
