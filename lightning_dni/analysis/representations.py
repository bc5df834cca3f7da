"""What each layer makes of samples, and how large its weights are (Czarnecki et al. 2017, section 5)."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor, nn

from lightning_dni.errors import StageError


def layer_outputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Shaped[Tensor, " samples *dims"],
    batch_size: int = 256,
    forward: Callable[[Tensor], object] | None = None,
) -> dict[str, Float[Tensor, " samples features"]]:
    """What every layer gives for `inputs`, as rows on the CPU, in evaluation mode.

    The model is left as it was: training flags, buffers and the generators of the CPU and of the inputs'
    device.

    Args:
        model: The network.
        layers: Submodules by the names that the outputs shall have. Of one that runs several times the last
            output counts.
        inputs: What goes in, on the model's device.
        batch_size: Samples that go in at a time.
        forward: How a batch goes in; None: `model(batch)`.

    Raises:
        StageError: A layer has not run, or its output is no tensor with one row per sample.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    found: dict[str, object] = {}
    hooks = [module.register_forward_hook(_keep(found, name)) for name, module in layers.items()]
    try:
        with left_alone(model, inputs.device), torch.no_grad():
            model.eval()
            for batch in torch.split(inputs, batch_size):
                found.clear()
                (forward or model)(batch)
                for name in layers:
                    # a copy: the next layer may work in place
                    kept[name].append(_rows(name, found, len(batch)))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(rows) for name, rows in kept.items()}


def _keep(found: dict[str, object], name: str) -> Callable[[nn.Module, Any, object], None]:
    def hook(module: nn.Module, args: Any, output: object) -> None:
        found[name] = output.detach().to("cpu", copy=True) if isinstance(output, Tensor) else output

    return hook


def _rows(name: str, found: Mapping[str, object], size: int) -> Tensor:
    if name not in found:
        raise StageError(
            f"Expected layer {name!r} to run when the model does, but it did not. Name only layers through "
            "which the samples go, and no submodule of one that is compiled."
        )
    output = found[name]
    if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != size:
        what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise StageError(
            f"Expected layer {name!r} to give a tensor with one row for each of {size} samples, but got "
            f"{what}. Leave the layer out."
        )
    return output.flatten(1).float() if output.ndim > 1 else output.unsqueeze(1).float()


@contextmanager
def left_alone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back training flags, buffers and the states of torch's generators when the block is left."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in flags:
            module.training = training
        for module, name, buffer, before in buffers:
            setattr(module, name, buffer)
            if not torch.equal(buffer, before):
                buffer.detach().copy_(before)


def order_by_class(labels: Int64[Tensor, " samples"]) -> Int64[Tensor, " samples"]:
    """The order in which samples of one class lie side by side, otherwise as they came.

    >>> order_by_class(torch.tensor([1, 0, 1, 0])).tolist()
    [1, 3, 0, 2]
    """
    return torch.sort(labels, stable=True).indices


def dissimilarity(
    rows: Float[Tensor, " samples features"],
) -> Float64[Tensor, " samples samples"]:
    r"""One minus the correlation of what a layer gives for each two samples, over its features.

    .. math:: D_{ij} = 1 - \mathrm{corr}(h_i, h_j)

    Args:
        rows: What the layer gives, one row per sample.

    Returns:
        Values in [0, 2], zero on the diagonal. A row whose features are all the same correlates with
        nothing: it is at 1 from every other.

    Example:
        >>> dissimilarity(torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 2.0, 0.0, 2.0], [1.0, 0.0, 1.0, 0.0]]))
        tensor([[0., 0., 2.],
                [0., 0., 2.],
                [2., 2., 0.]], dtype=torch.float64)
    """
    rows = rows.double()
    centered = rows - rows.mean(1, keepdim=True)
    norms = centered.norm(dim=1, keepdim=True)
    # what centering leaves of equal features is rounding
    flat = norms <= 1e-12 * rows.norm(dim=1, keepdim=True)
    unit = torch.where(flat, 0.0, centered / torch.where(flat, 1.0, norms))
    return (1 - unit @ unit.T).clamp(0, 2).fill_diagonal_(0)


def class_block_distances(
    matrices: Sequence[Float[Tensor, " samples samples"]], labels: Int64[Tensor, " samples"]
) -> Float64[Tensor, " layers"]:
    """How far the within-class blocks of each dissimilarity matrix are from those of the last one.

    It is the L2 distance over all pairs of two samples of one class, over the root of their number.

    Args:
        matrices: One per layer, the last layer's at the end; samples in any order.
        labels: Classes of the samples.

    Returns:
        One distance per layer; that of the last one is 0.

    Raises:
        ValueError: There is no matrix, or no two samples share a class.
    """
    if not matrices:
        raise ValueError("Expected `matrices` to hold one matrix per layer, but got none. Name a layer.")
    pairs = _pairs_within(labels)
    last = matrices[-1].double()[pairs]
    squares = [(matrix.double()[pairs] - last).square().mean() for matrix in matrices]
    return torch.stack(squares).sqrt()


def _pairs_within(labels: Tensor) -> Bool[Tensor, " samples samples"]:
    pairs = (labels.unsqueeze(0) == labels.unsqueeze(1)).fill_diagonal_(False)
    if not pairs.any():
        raise ValueError(
            f"Expected `labels` to have two samples of one class, but got {len(labels)} samples, no two of "
            "one class. Take more samples."
        )
    return pairs


def weight_norm_profile(layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """The squared norm of the weights of every layer that has some, as a share of their sum over the layers.

    Weights are parameters of two dimensions or more: matrices and kernels, without biases and the factors
    of a normalization.

    Args:
        layers: Submodules by name.

    Returns:
        A share by name; all together are 1. Without any weight but zero all are 0.
    """
    squares = {
        name: sum(float(weight.square().sum()) for weight in weights)
        for name, weights in _weights(layers).items()
    }
    whole = sum(squares.values())
    return {name: square / whole if whole else 0.0 for name, square in squares.items()}


def weight_norm_slope(layers: Mapping[str, nn.Module]) -> float | None:
    """By how much the share of `weight_norm_profile` changes from one layer to the next, by least squares.

    Only layers of the most frequent number of weights count, since others have another norm to begin with; so
    the first layer of a perceptron mostly does not.

    Args:
        layers: Submodules by name, in forward order.

    Returns:
        The slope per layer; None where fewer than two layers count.
    """
    sizes = {name: sum(map(Tensor.numel, weights)) for name, weights in _weights(layers).items()}
    profile = weight_norm_profile(layers)
    usual = Counter(sizes.values()).most_common(1)
    shares = [profile[name] for name, size in sizes.items() if size == usual[0][0]]
    if len(shares) < 2:
        return None
    middle = (len(shares) - 1) / 2
    along = sum((k - middle) * share for k, share in enumerate(shares))
    return along / sum((k - middle) ** 2 for k in range(len(shares)))


def _weights(layers: Mapping[str, nn.Module]) -> dict[str, list[Tensor]]:
    """Matrices and kernels of the layers that have some."""
    found = {
        name: [p.detach().double() for p in layer.parameters() if p.ndim > 1]
        for name, layer in layers.items()
    }
    return {name: weights for name, weights in found.items() if weights}
