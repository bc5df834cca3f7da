"""Compare the chained stages with the whole model before anything is trained on them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_dni.core.boundary import device_of, named_submodules
from lightning_dni.errors import StageError
from lightning_dni.pipeline.calls import Calls, is_compiled, plain_call, usual_call
from lightning_dni.pipeline.keeping import Attributes, RandomState, undisturbed
from lightning_dni.pipeline.plan import StagePlan, named_tensors
from lightning_dni.pipeline.splitting import StageRunner

REMEDY = (
    "Something passes between the stages that is not part of what crosses the boundaries (an attribute, a "
    "random number drawn below and used above): keep it inside one stage, or return it from the boundary's "
    "module."
)


def check_split(model: nn.Module, plan: StagePlan, run: Callable[[], Any]) -> None:
    """Run the whole model and then its stages one by one, forward and backward, and compare all numbers.

    Every stage sees no values of other stages' parameters nor attributes that they have set, and takes up the
    random numbers where the whole run was at its lower boundary. On the CPU, without torch.compile, all must
    agree bit for bit. Gradients, buffers, attributes and random numbers are afterwards as before.

    Args:
        model: The model that was traced, or a copy.
        plan: What was seen.
        run: Calls the model as a training step does; returns the loss, or a dict with the entry "loss".

    Raises:
        StageError: The stages compute something else, or one cannot be run alone.
        BoundaryError: The same, because of what passes a boundary.
    """
    exact = device_of(model).type == "cpu" and not any(map(is_compiled, model.modules()))
    grads = [(p, p.grad) for p in model.parameters()]
    try:
        _clear(model)
        whole = _Whole(model, plan, run)
        _clear(model)
        with undisturbed(model):
            _Chain(model, plan, run, whole, exact).check()
    finally:
        for parameter, grad in grads:
            parameter.grad = grad


def _clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in named_tensors(model).items() if p.is_leaf and p.grad is not None}


def _loss(value: Any) -> Tensor | None:
    loss = value.get("loss") if isinstance(value, Mapping) else value
    return loss if isinstance(loss, Tensor) and loss.requires_grad else None


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]


class _Whole:
    """What one run of the whole model gave."""

    def __init__(self, model: nn.Module, plan: StagePlan, run: Callable[[], Any]) -> None:
        self.activations: dict[str, tuple[Tensor, ...]] = {}
        self.random: dict[str, RandomState] = {}
        with undisturbed(model):
            with self._seen(model, plan):
                value = run()
            self.value = [x.detach().clone() for x in _tensors(value)]
            loss = _loss(value)
            if loss is not None:
                loss.backward()  # type: ignore[no-untyped-call]
            self.gradients = _gradients(model)
            self.buffers = {n: b.detach().clone() for n, b in named_tensors(model).items() if _is_buffer(b)}

    @contextmanager
    def _seen(self, model: nn.Module, plan: StagePlan) -> Iterator[None]:
        calls, modules = Calls(), named_submodules(model)
        try:
            for name, module in modules.items():
                if len(plan.modules.get(name, ())) > 1 and is_compiled(module):
                    calls.place(module, plain_call(module))  # as on a stage
            for name in plan.boundaries:
                module = modules[name]
                calls.place(module, partial(self._see, plan, name, usual_call(module), device_of(model)))
            yield
        finally:
            calls.remove()

    def _see(
        self,
        plan: StagePlan,
        name: str,
        usual: Callable[..., Any],
        device: torch.device,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        output = usual(*args, **kwargs)
        self.activations[name] = tuple(x.detach().clone() for x in plan.crossing[name].pack(output))
        self.random[name] = RandomState(device)
        return output


def _is_buffer(tensor: Tensor) -> bool:
    return not isinstance(tensor, nn.Parameter)


class _Chain:
    """The stages of one model, run one after another."""

    def __init__(
        self, model: nn.Module, plan: StagePlan, run: Callable[[], Any], whole: _Whole, exact: bool
    ) -> None:
        self._model, self._plan, self._run, self._whole, self._exact = model, plan, run, whole, exact
        self._before, self._after = Attributes(model), list[Attributes]()
        self._received: list[tuple[Tensor, ...]] = []
        self._given: list[tuple[Tensor, ...]] = []

    def check(self) -> None:
        """Run all stages and compare.

        Raises:
            StageError: Something differs.
        """
        value, start = None, RandomState(device_of(self._model))
        for stage in range(self._plan.stages):
            start.restore()
            value = self._forward(stage)
        results = _tensors(value)
        if len(results) != len(self._whole.value):
            raise StageError(
                "Expected the last stage to return what the whole model's step does, "
                f"{len(self._whole.value)} tensors, but got {len(results)}. {REMEDY}"
            )
        for expected, result in zip(self._whole.value, results, strict=True):
            self._compare("what the step returns", expected, result)
        self._backward(_loss(value))

    def _forward(self, stage: int) -> Any:
        boundaries, last = self._plan.boundaries, self._plan.stages - 1
        model, plan = self._model, self._plan
        self._before.restore(afresh=True)
        with (
            StageRunner(model, plan, stage) as runner,
            _without_others(model, plan, stage),
        ):
            crossed, arrived = self._pass_on(boundaries[stage - 1]) if stage else ([], [])
            value = runner.run(
                self._run,
                partial(self._receive, boundaries[stage - 1], crossed) if stage else None,
                partial(self._give, boundaries[stage], runner) if stage < last else None,
                crossed,
                arrived,
            )
            for name, tensor in named_tensors(model).items():
                if _is_buffer(tensor) and plan.tensors[name] == stage:
                    self._compare(f"buffer {name!r}", self._whole.buffers[name], tensor)
        self._after.append(Attributes(model))
        return value

    def _pass_on(self, boundary: str) -> tuple[list[Tensor], list[Tensor]]:
        """What comes from below: the tensors of the boundary's own output, and those beside them."""
        leaves = self._plan.crossing[boundary].leaves
        received = [x.detach().requires_grad_(x.requires_grad) for x in self._given[-1]]
        self._received.append(tuple(received))
        return received[: len(leaves)], received[len(leaves) :]

    def _receive(self, boundary: str, crossed: list[Tensor]) -> Any:
        self._whole.random[boundary].restore()
        return self._plan.crossing[boundary].unpack(crossed)

    def _give(self, boundary: str, runner: StageRunner, output: Any) -> None:
        given = self._plan.crossing[boundary].pack(output)
        for expected, tensor in zip(self._whole.activations[boundary], given, strict=True):
            self._compare(f"the activation at boundary {boundary!r}", expected, tensor)
        self._given.append((*given, *runner.onward()))

    def _backward(self, loss: Tensor | None) -> None:
        if loss is None:
            return
        outputs: tuple[Tensor, ...] = (loss,)
        gradients: tuple[Tensor | None, ...] = (None,)
        for stage in reversed(range(self._plan.stages)):
            _clear(self._model)
            self._differentiate(stage, outputs, gradients)
            self._compare_gradients(stage)
            if stage:
                received = self._received[stage - 1]
                pairs = [
                    (x, r.grad)
                    for x, r in zip(self._given[stage - 1], received, strict=True)
                    if r.grad is not None
                ]
                outputs, gradients = tuple(x for x, _ in pairs), tuple(g for _, g in pairs)

    def _differentiate(self, stage: int, outputs: Any, gradients: Any) -> None:
        self._after[stage].restore(afresh=True)
        try:
            torch.autograd.backward(outputs, gradients)
        except Exception as error:
            raise StageError(
                f"Expected stage {stage} to be differentiated alone, but got {type(error).__name__}: {error} "
                "Keep boundaries out of what an activation checkpoint runs again."
            ) from error

    def _compare_gradients(self, stage: int) -> None:
        owners, found = self._plan.tensors, _gradients(self._model)
        for name in found:
            if owners[name] != stage:
                raise StageError(
                    f"Expected stage {stage} to differentiate its own parameters, but {name!r} of stage "
                    f"{owners[name]} got a gradient. {REMEDY}"
                )
        for name, owner in owners.items():
            if owner == stage:
                expected, gradient = self._whole.gradients.get(name), found.get(name)
                self._compare(f"the gradient of {name!r} on stage {stage}", expected, gradient)

    def _compare(self, what: str, expected: Tensor | None, found: Tensor | None) -> None:
        if expected is None and found is None:
            return
        if expected is None or found is None:
            difference = f"is {'there' if expected is None else 'missing'}"
        elif expected.shape != found.shape or expected.dtype != found.dtype:
            difference = (
                f"is {found.dtype} {tuple(found.shape)} in place of {expected.dtype} {tuple(expected.shape)}"
            )
        elif _agree(expected, found, self._exact):
            return
        else:
            difference = f"differs by {float((expected.double() - found.double()).abs().max()):.3g}"
        raise StageError(
            f"Expected the chained stages to compute what the whole model does, but {what} {difference}. "
            f"{REMEDY}"
        )


def _agree(expected: Tensor, found: Tensor, exact: bool) -> bool:
    tolerances = {"rtol": 0.0, "atol": 0.0} if exact else {}
    try:
        torch.testing.assert_close(found.detach(), expected.detach(), equal_nan=True, **tolerances)  # type: ignore[arg-type]
    except AssertionError:
        return False
    return True


@contextmanager
def _without_others(model: nn.Module, plan: StagePlan, stage: int) -> Iterator[None]:
    """Put NaN into the parameters and buffers that `stage` does not hold."""
    kept: list[tuple[Tensor, Tensor]] = []
    seen: set[int] = set()
    for name, tensor in named_tensors(model).items():
        if not plan.holds(stage, name) and tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            kept.append((tensor, tensor.data))
            tensor.data = torch.full_like(tensor.data, float("nan"))
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
