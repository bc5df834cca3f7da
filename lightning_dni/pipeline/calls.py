"""Put something else in the place of a module's call for a while: copies and pickles know nothing of it."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_dni.core.boundary import COMPILED
from lightning_dni.errors import StageError

SLOT = "_compiled_call_impl"
"""Where `nn.Module.__call__` looks first for what to run; torch leaves it out of copies and pickles."""

OnCall = Callable[..., Any]


class Call:
    """What stands in for the call of one module object; copies and pickles of it are None, so nothing."""

    def __init__(self, on_call: OnCall) -> None:
        self._on_call = on_call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer in the module's place."""
        return self._on_call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has wrapped `module` or compiled it in place."""
    return COMPILED in module._modules or (
        getattr(module, SLOT) is not None and not isinstance(getattr(module, SLOT), Call)
    )


def plain_call(module: nn.Module) -> OnCall:
    """The call of `module` with its hooks, but not as compiled code."""
    inner = module._modules.get(COMPILED)
    return module._call_impl if inner is None else inner._call_impl


def usual_call(module: nn.Module) -> OnCall:
    """What calling `module` runs now."""
    current = getattr(module, SLOT)
    return module._call_impl if current is None else current


class Calls:
    """The modules whose calls are answered by somebody else, put there and taken back together."""

    def __init__(self) -> None:
        self._placed: list[tuple[nn.Module, Call, Any]] = []

    @property
    def placed(self) -> bool:
        """Whether any call is answered by somebody else."""
        return bool(self._placed)

    def place(self, module: nn.Module, on_call: OnCall) -> None:
        """Let `on_call` answer for `module`.

        Raises:
            StageError: Somebody answers for it already.
        """
        previous = module.__dict__.get(SLOT)
        if isinstance(previous, Call):
            raise StageError(
                "Expected a model that is not split, but another split answers for a "
                f"{type(module).__name__} in it. Call `detach()` on the other one first."
            )
        call = Call(on_call)
        # past __setattr__: wrappers pass attributes on to what they wrap
        module.__dict__[SLOT] = call
        self._placed.append((module, call, previous))

    def check(self) -> None:
        """See that every call is still answered as placed.

        Raises:
            StageError: A module was compiled in place in the meantime.
        """
        for module, call, _ in self._placed:
            if module.__dict__.get(SLOT) is not call:
                raise StageError(
                    f"Expected no submodule to be compiled while the model is split, but a "
                    f"{type(module).__name__} was. Compile before training, or detach and attach the split."
                )

    def remove(self) -> None:
        """Leave every module as it was; harmless where nothing is placed."""
        while self._placed:
            module, call, previous = self._placed.pop()
            if module.__dict__.get(SLOT) is not call:
                continue
            if previous is None:
                del module.__dict__[SLOT]
            else:
                module.__dict__[SLOT] = previous
