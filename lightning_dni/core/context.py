"""Find the context of a batch (usually its labels) and check it against what an estimator expects."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dni.errors import EstimatorError

Labels = str | int | Callable[[Any], Tensor | None] | None
"""Where the context is in a batch: `"auto"`, an index, a key, a callable, or None."""

Where = str | int | Callable[[Any], Tensor]
"""Where the network's input is in a batch: `"auto"`, an index, a key, or a callable."""

LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def find_context(batch: Any, labels: Labels = "auto") -> Tensor | None:
    """Take the context out of `batch`.

    `"auto"` finds the second item of a tuple or list, or the first of `labels`, `label`, `targets`,
    `target`, `y` in a mapping, a named tuple or a dataclass.

    Args:
        batch: What the user's training step receives.
        labels: `"auto"`, an index, a key or attribute, a callable of the batch, or None for none.

    Returns:
        The context, or None where `"auto"` finds nothing.

    Raises:
        EstimatorError: What `labels` names is absent or not a tensor.
    """
    if labels is None:
        return None
    if callable(labels):
        found = labels(batch)
    else:
        found = _search(batch, LABEL_KEYS, 1) if labels == "auto" else _take(batch, labels, "labels")
    if found is None:
        return None
    if not isinstance(found, Tensor):
        raise EstimatorError(
            f"Expected `labels={labels!r}` to give a tensor from the batch, but got "
            f"{type(found).__name__}. Pass a callable that returns the label tensor."
        )
    return found.detach() if found.requires_grad else found


INPUT_KEYS = ("x", "input", "inputs", "image", "images", "pixel_values")


def find_input(batch: Any, network_input: Where = "auto") -> Tensor:
    """Take the network's input out of `batch`, for what predicts from it.

    `"auto"` is the batch itself, the first item of a tuple or list, or the first of `x`, `input`, `inputs`,
    `image`, `images`, `pixel_values` in a mapping, a named tuple or a dataclass.

    Args:
        batch: What the user's training step receives.
        network_input: `"auto"`, an index, a key or attribute, or a callable of the batch.

    Raises:
        EstimatorError: There is none, or it is no tensor of numbers to compute with.
    """
    found: Any
    if callable(network_input):
        found = network_input(batch)
    elif network_input != "auto":
        found = _take(batch, network_input, "network_input")
    elif isinstance(batch, Tensor):
        found = batch
    else:
        found = _search(batch, INPUT_KEYS, 0)
    if not isinstance(found, Tensor) or not (found.is_floating_point() or found.dtype == torch.uint8):
        got = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
        raise EstimatorError(
            f"Expected `network_input={network_input!r}` to give a floating-point tensor (or bytes) from the "
            f"batch, but got {got}. Pass an index, a key, or a callable that returns the network's input."
        )
    return found.detach()


def _search(batch: Any, keys: Sequence[str], place: int) -> Tensor | None:
    fields = _fields(batch)
    candidates = [fields[key] for key in keys if key in fields]
    if not fields and isinstance(batch, Sequence) and not isinstance(batch, str):
        candidates = list(batch[place : place + 1])
    return next((c for c in candidates if isinstance(c, Tensor)), None)


def _take(batch: Any, place: Any, argument: str) -> Any:
    fields = _fields(batch)
    if place in fields:
        return fields[place]
    try:
        return batch[place]
    except (KeyError, IndexError, TypeError):
        known = sorted(map(str, fields)) or f"a {type(batch).__name__}"
        raise EstimatorError(
            f"Expected `{argument}={place!r}` to be in the batch, but got {known}. Pass an index, a key, "
            "or a callable that returns the tensor."
        ) from None


def _fields(batch: Any) -> dict[Any, Any]:
    if isinstance(batch, Mapping):
        return dict(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    names = getattr(batch, "_fields", None)  # a named tuple
    return dict(zip(names, batch, strict=True)) if names else {}


def check_context(
    context: Tensor | None,
    num_classes: int | None,
    context_size: int | None,
    ignore_index: int | None,
    rows: int,
    who: str,
    check_values: bool,
) -> Tensor | None:
    """The context that an estimator shall see, or None where it asks for none.

    Args:
        context: What `find_context` gave.
        num_classes: Number of classes it expects labels of, if any.
        context_size: Width of the continuous context it expects, if any.
        ignore_index: The label of padding, in range or not, if there is one.
        rows: Number of rows of the activation.
        who: The estimator, named in errors.
        check_values: Whether to look at the label values, which waits for an accelerator.

    Raises:
        EstimatorError: Context is needed but absent, of the wrong kind or width, or out of range.
    """
    if num_classes is None and context_size is None:
        return None
    if context is None:
        raise EstimatorError(
            f"Expected labels or a context for {who}, but got none from the batch. Pass `labels=` (an "
            "index, a key or a callable), or build the estimator without `num_classes` and "
            "`context_size`."
        )
    if not context.ndim or context.shape[0] != rows:
        raise EstimatorError(
            f"Expected labels or a context of {rows} rows for {who}, but got a tensor of shape "
            f"{tuple(context.shape)}. Pass `labels=` a callable that gives one row per row of the activation."
        )
    if num_classes is not None:
        _check_labels(context, num_classes, who, check_values, ignore_index)
        return context
    if not context.is_floating_point() or context.shape[-1] != context_size:
        raise EstimatorError(
            f"Expected a floating-point context of width {context_size} for {who}, but got "
            f"{context.dtype} of shape {tuple(context.shape)}."
        )
    return context


def _check_labels(
    labels: Tensor, num_classes: int, who: str, check_values: bool, ignore_index: int | None
) -> None:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise EstimatorError(
            f"Expected integer labels for {who}, but got {labels.dtype} of shape "
            f"{tuple(labels.shape)}. For a continuous context build it with `context_size`."
        )
    if check_values and ignore_index is not None:
        labels = labels[~is_padding(labels, ignore_index)]
    if check_values and labels.numel():
        low, high = (int(v) for v in torch.aminmax(labels.long()))  # torch compares no uint16 to uint64
        if low < 0 or high >= num_classes:
            raise EstimatorError(
                f"Expected labels in [0, {num_classes}) for {who}, but got values from {low} to "
                f"{high}. Correct `num_classes` or pass `labels=` a callable that maps them; for a label of "
                "padding linear, MLP and low-rank estimators, critics and local losses take `ignore_index`."
            )


def is_padding(labels: Tensor, ignore_index: int) -> Tensor:
    """Which of the labels are `ignore_index`, in int64: as a byte -100 would be class 156.

    >>> import torch
    >>> is_padding(torch.tensor([156, 255], dtype=torch.uint8), ignore_index=-100)
    tensor([False, False])
    """
    return labels.long() == ignore_index
