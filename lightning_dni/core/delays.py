"""Delayed gradients: a stage is updated with what an earlier batch has left for it, some steps ago.

What a boundary delays is the gradient of the parameters below it. It is taken at once, through the graph of
its own forward pass, with the weights of then, and given to the optimizer `age` steps later. That is, to the
bit, what a stage would take later from activations and weights that it has stashed. It costs one set of
gradients per step of age instead of both, and as no graph outlives its step, all can be saved.

Ages add up downwards: a stage that waits for what comes back from a delayed one is as much older as that.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_dni.core.cut import Cut
from lightning_dni.core.stage import add
from lightning_dni.errors import EstimatorError, StageError

Kept = dict[Tensor, Tensor]
"""Gradients by parameter, summed over the forward passes of one optimizer step."""


class Delays:
    """The gradients under way in one engine, by the optimizer step in which they are due and by boundary."""

    def __init__(self) -> None:
        self._due: dict[int, dict[str, Kept]] = {}
        self._step = self._passes = 0

    def swap(self, cuts: Iterable[Cut], parameters: Iterable[nn.Parameter], accumulate: int) -> None:
        """Keep what is to be delayed of a backward pass, and put what is due now in its place.

        What is no parameter of the model is given at once: it belongs to the batch.

        Args:
            cuts: The cuts that count.
            parameters: The model's.
            accumulate: Number of backward passes in an optimizer step.

        Raises:
            StageError: There were more of them since the last `advance`.
        """
        cuts = list(cuts)
        late = [cut for cut in cuts if cut.age]
        if not late and not self._due:
            return
        if self._passes == accumulate:
            raise StageError(
                f"Expected `engine.update_estimators()` after {accumulate} backward passes, but got one "
                "more: delayed gradients are due by the number of optimizer steps. Call it after every "
                "`optimizer.step()`, or `engine.drop_estimator_gradients()` where that is skipped, and pass "
                "`accumulate=` to `training_step` where several passes make a step."
            )
        self._passes += 1
        own = set(parameters)
        for cut in late:
            kept = self._due.setdefault(self._step + cut.age, {}).setdefault(cut.boundary, {})
            for variable, gradient in cut.param_grads:
                if variable in own:
                    kept[variable] = add(kept.get(variable), gradient)
            cut.param_grads = [(v, g) for v, g in cut.param_grads if v not in own]
        due = self._due.get(self._step, {})
        for cut in cuts:
            cut.param_grads += [(v, g) for v, g in due.pop(cut.boundary, {}).items() if v.requires_grad]

    def advance(self) -> None:
        """The optimizer has stepped, or skipped a step; nothing happens where nothing came since the last."""
        if self._passes:
            self._due.pop(self._step, None)
            self._step, self._passes = self._step + 1, 0

    # ---- state

    def state_dict(self, model: nn.Module) -> list[dict[str, Any]]:
        """What is under way, in tensors and primitives; parameters of `model` go by name."""
        names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
        return [
            {
                "steps": due - self._step,
                "boundary": boundary,
                "gradients": {names[v]: g.clone() for v, g in kept.items() if v in names},
            }
            for due, by_boundary in self._due.items()
            for boundary, kept in by_boundary.items()
        ]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]], model: nn.Module) -> None:
        """Go on with what was under way.

        Raises:
            EstimatorError: It is of parameters that `model` does not have.
        """
        parameters = dict(model.named_parameters())
        unknown = sorted({n for saved in state for n in saved["gradients"] if n not in parameters})
        if unknown:
            raise EstimatorError(
                f"Expected delayed gradients of the model's own parameters, but got some of {unknown}. "
                "Resume with the model of the saved run, or start its estimators afresh."
            )
        self._due, self._step, self._passes = {}, 0, 0
        for saved in state:
            kept: Kept = {parameters[n]: g.to(parameters[n].device) for n, g in saved["gradients"].items()}
            self._due.setdefault(saved["steps"], {})[saved["boundary"]] = kept


def refuse_beside_delay(who: str, beside: Mapping[str, bool]) -> None:
    """Refuse what delayed gradients cannot be given beside.

    Args:
        who: The estimator that delays, by kind and place.
        beside: What there may be, in words, and whether it is there.

    Raises:
        EstimatorError: Something is.
    """
    found = [what for what, is_there in beside.items() if is_there]
    if found:
        raise EstimatorError(
            f"Expected delayed gradients in one process, with one loss per step, no gradient scaler and "
            f"update_probability=1, but got {who} and {', '.join(found)}. Leave that out, or pass delay=0."
        )
