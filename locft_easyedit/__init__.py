"""LocFT-BF for EasyEdit: edit thousands of facts by localized, breadth-first fine-tuning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import import_hook

if TYPE_CHECKING:
    from .api import edit_model, open_session
    from .data.readers import read_requests
    from .data.requests import make_requests
    from .delta.apply import apply_deltas_, revert_deltas_
    from .delta.delta import Delta
    from .easyedit import register, unregister
    from .errors import LocFTError
    from .evaluation.evaluation import Evaluation
    from .evaluation.summary import summarize
    from .hparams import LocFTBFHyperParams
    from .ledger.ledger import Ledger
    from .training.result import EditResult
    from .training.session import EditSession

__version__ = "0.1.0"

# Loaded on first use: `import locft_easyedit` must stay quick. `LocFTBFEditor` needs EasyEdit, and
# is therefore not in `__all__`.
_HOMES = {
    "Delta": "delta.delta",
    "EditResult": "training.result",
    "EditSession": "training.session",
    "Evaluation": "evaluation.evaluation",
    "Ledger": "ledger.ledger",
    "LocFTBFEditor": "easyedit.registration",
    "LocFTBFHyperParams": "hparams",
    "LocFTError": "errors",
    "apply_deltas_": "delta.apply",
    "edit_model": "api",
    "make_requests": "data.requests",
    "open_session": "api",
    "read_requests": "data.readers",
    "register": "easyedit",
    "revert_deltas_": "delta.apply",
    "summarize": "evaluation.summary",
    "unregister": "easyedit",
}
__all__ = [
    "Delta",
    "EditResult",
    "EditSession",
    "Evaluation",
    "Ledger",
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


import_hook.install()
