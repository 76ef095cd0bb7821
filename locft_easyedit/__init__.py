"""LocFT-BF for EasyEdit: edit thousands of facts by localized, breadth-first fine-tuning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import read_requests
    from .delta.apply import apply_deltas_, revert_deltas_
    from .delta.delta import Delta
    from .easyedit import register, unregister
    from .editing import EditSession
    from .errors import LocFTError
    from .evaluate.evaluation import Evaluation
    from .evaluate.summary import summarize
    from .hparams import LocFTBFHyperParams
    from .pipeline import edit_model, open_session
    from .requests import make_requests
    from .result import EditResult

__version__ = "0.1.0"

# Loaded on first use: `import locft_easyedit` must stay quick and without effects.
_HOMES = {
    "Delta": "delta.delta",
    "EditResult": "result",
    "EditSession": "editing",
    "Evaluation": "evaluate.evaluation",
    "LocFTBFHyperParams": "hparams",
    "LocFTError": "errors",
    "apply_deltas_": "delta.apply",
    "edit_model": "pipeline",
    "make_requests": "requests",
    "open_session": "pipeline",
    "read_requests": "data",
    "register": "easyedit",
    "revert_deltas_": "delta.apply",
    "summarize": "evaluate.summary",
    "unregister": "easyedit",
}
__all__ = [
    "Delta",
    "EditResult",
    "EditSession",
    "Evaluation",
    "LocFTBFHyperParams",
    "LocFTError",
    "__version__",
    "apply_deltas_",
    "edit_model",
    "make_requests",
    "open_session",
    "read_requests",
    "register",
    "revert_deltas_",
    "summarize",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
