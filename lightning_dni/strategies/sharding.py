"""A checkpoint as a folder in which every stage writes its own tensors, and how it becomes a whole again."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils import _pytree as pytree

from lightning_dni.strategies._compat import MisconfigurationException, load_shards
from lightning_dni.strategies.gathering import join_engine_states, join_optimizer_states

CHECKPOINT_KEY = "lightning_dni"
"""Where a checkpoint holds what is ours."""
OUTLINE = "outline.ckpt"
"""The file that holds the checkpoint without its tensors."""

STAGE, TEXT = "stage ", "text "
"""How the name of a tensor begins, and what is put before a text that begins like either."""


def split_off(state: Any, stage: int, copy: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """Part what every stage writes by itself from what one of them writes for all.

    Args:
        state: Tensors and primitives, nested.
        stage: Whose they are; the names of tensors tell stages apart.
        copy: Number of the copy of the pipeline to which it belongs; they are told apart, too.

    Returns:
        The state with names in the place of tensors, and the tensors by name. Scalars stay.
    """
    tensors: dict[str, Tensor] = {}
    whose = f"{STAGE}{stage}" + (f" copy {copy}" if copy else "")

    def name(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, str):
            return f"{TEXT}{leaf}" if leaf.startswith((STAGE, TEXT)) else leaf
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.numel() == 0:
            return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf
        key = f"{whose}: {pytree.keystr(path)}"
        tensors[key] = leaf.detach()
        return key

    return pytree.tree_map_with_path(name, state), tensors


def refuse_remote(path: Any) -> Path:
    """The path as one of this machine's file system.

    Raises:
        MisconfigurationException: It is of another.
    """
    if "://" in str(path):
        raise MisconfigurationException(
            f"Expected a folder that all stages can write with save_sharded=True, but got {str(path)!r}, "
            "which is no path of a file system. Mount it, or leave `save_sharded` out."
        )
    return Path(path)


def write_shards(
    tensors: dict[str, Tensor],
    outline: Mapping[str, Any] | None,
    path: Path,
    together: Callable[[Callable[[], Any], str], Any],
    barrier: Callable[[], None],
) -> None:
    """Write a checkpoint, to which every process comes; one that is there gives way once this is whole.

    Args:
        tensors: What this process writes, by name.
        outline: The rest, on the process that writes it; None elsewhere.
        path: The folder.
        together: Calls what every process has to come to, and is told what for.
        barrier: Waits for every process.
    """
    part, old = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.old")
    if outline is not None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True, exist_ok=True)
    barrier()  # every process makes the folder, and none may while what was there is removed
    together(lambda: save(tensors, checkpoint_id=part), "saving a checkpoint")
    if outline is None:
        return
    torch.save(dict(outline), part / OUTLINE)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    else:
        path.unlink(missing_ok=True)
    part.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def is_sharded(path: Any) -> bool:
    """Whether a checkpoint is a folder of shards."""
    return (Path(path) / OUTLINE).is_file()


def consolidate(path: Any, weights_only: bool | None = None) -> dict[str, Any]:
    """A sharded checkpoint as one whole, in the form that one process writes: `torch.save` makes it a file.

    Args:
        path: The folder that a pipeline with `save_sharded=True` has written.
        weights_only: As in `torch.load`, for what is not tensors.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        MisconfigurationException: There is no such folder.
    """
    if not is_sharded(path):
        raise MisconfigurationException(
            f"Expected `path` to be a folder that a pipeline with save_sharded=True has written, but "
            f"{str(path)!r} holds no {OUTLINE!r}. Pass the checkpoint's own folder; a checkpoint that is one "
            "file needs no consolidation."
        )
    tensors = load_shards(Path(path))
    outline = torch.load(Path(path) / OUTLINE, map_location="cpu", weights_only=weights_only)

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, str):
            return leaf
        return tensors[leaf] if leaf.startswith(STAGE) else leaf.removeprefix(TEXT)

    whole: dict[str, Any] = pytree.tree_map(fill, outline)
    return whole


def join_outlines(
    outlines: list[Mapping[str, Any]], names: list[str], others: Sequence[list[Mapping[str, Any]]] = ()
) -> dict[str, Any]:
    """What every stage would write, as one checkpoint.

    Args:
        outlines: Each stage's, the last stage's first.
        names: Of the whole module's state, in its order.
        others: What there is of further copies of the pipeline, the last stage's first.
    """
    whole = dict(outlines[0])
    upwards = reversed(outlines)
    held = {name: value for outline in upwards for name, value in outline["state_dict"].items()}
    order = dict.fromkeys([*(name for name in names if name in held), *held])  # a user may have renamed some
    whole["state_dict"] = {name: held[name] for name in order}
    if "optimizer_states" in whole:
        states = zip(*(outline["optimizer_states"] for outline in outlines), strict=True)
        whole["optimizer_states"] = [join_optimizer_states(each) for each in states]
    if CHECKPOINT_KEY in whole:
        own, *further = ([outline[CHECKPOINT_KEY] for outline in copy] for copy in (outlines, *others))
        whole[CHECKPOINT_KEY] = join_engine_states(own, further)
    return whole
