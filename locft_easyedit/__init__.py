"""LocFT-BF for EasyEdit: edit thousands of facts by localized, breadth-first fine-tuning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import read_requests
    from .delta.apply import (
        applied,
        apply_delta,
        apply_deltas,
        revert_delta,
        revert_deltas,
    )
    from .delta.delta import Delta
    from .delta.export import export_adapter, export_lora, export_model
    from .delta.file import load_delta, save_delta
    from .delta.folder import apply_to_folder, revert_in_folder, verify_folder
    from .delta.verify import verify_delta
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
    "applied": "delta.apply",
    "apply_delta": "delta.apply",
    "apply_deltas": "delta.apply",
    "apply_to_folder": "delta.folder",
    "edit_model": "pipeline",
    "export_adapter": "delta.export",
    "export_lora": "delta.export",
    "export_model": "delta.export",
    "load_delta": "delta.file",
    "make_requests": "requests",
    "open_session": "pipeline",
    "read_requests": "data",
    "register": "easyedit",
    "revert_delta": "delta.apply",
    "revert_deltas": "delta.apply",
    "revert_in_folder": "delta.folder",
    "save_delta": "delta.file",
    "summarize": "evaluate.summary",
    "unregister": "easyedit",
    "verify_delta": "delta.verify",
    "verify_folder": "delta.folder",
}
__all__ = [
    "Delta",
    "EditResult",
    "EditSession",
    "Evaluation",
    "LocFTBFHyperParams",
    "LocFTError",
    "__version__",
    "applied",
    "apply_delta",
    "apply_deltas",
    "apply_to_folder",
    "edit_model",
    "export_adapter",
    "export_lora",
    "export_model",
    "load_delta",
    "make_requests",
    "open_session",
    "read_requests",
    "register",
    "revert_delta",
    "revert_deltas",
    "revert_in_folder",
    "save_delta",
    "summarize",
    "unregister",
    "verify_delta",
    "verify_folder",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
