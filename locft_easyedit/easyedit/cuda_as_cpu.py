"""Runs EasyEdit's PyPI release, which knows GPUs only, on a machine without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from .importing import EasyEdit


class CudaAsCPU(TorchFunctionMode):
    """While active, tensors and modules that are sent to or made on a CUDA device use the CPU.

    Covers `Tensor.to`, `Tensor.cuda`, `Module.to`, `Module.cuda` and every `device=` argument of
    a tensor function; `torch.load` and the functions of `torch.cuda` are as ever.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls `func` with every CUDA device in its arguments replaced."""
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0].to("cpu")
        if func is torch.Tensor.to:
            args = (args[0], *(_as_cpu(value) for value in args[1:]))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _as_cpu(kwargs["device"])}
        return func(*args, **kwargs)


def _as_cpu(value: Any) -> Any:
    """Returns the CPU for a CUDA device in any spelling, anything else as it is."""
    is_cuda = (
        (isinstance(value, str) and value.startswith("cuda"))
        or (isinstance(value, torch.device) and value.type == "cuda")
        # A bare number is a CUDA device; a bool is another argument of `Tensor.to`.
        or (isinstance(value, int) and not isinstance(value, bool))
    )
    return torch.device("cpu") if is_cuda else value


def needs_cuda_as_cpu(easyedit: EasyEdit) -> bool:
    """Says whether EasyEdit can run here only inside `CudaAsCPU`: the release, and no GPU."""
    return easyedit.is_release and not torch.cuda.is_available()
