"""The exceptions that a user can meet; each is a `ValueError` with a message to act on."""

from __future__ import annotations

import signal
from collections.abc import Sequence


class LocFTError(ValueError):
    """Base of every error that this library raises on purpose."""


class HyperParamsError(LocFTError):
    """The hyper-parameters are unknown, missing, ill-typed or out of range."""


class RequestError(LocFTError):
    """The edit requests cannot be used."""


class DataError(LocFTError):
    """A data file cannot be read, or its records lack fields."""


class PlaceError(LocFTError):
    """The layers and the module template select nothing that can be trained."""


class ModelError(LocFTError):
    """The model or its tokenizer cannot be loaded or used."""


class PreserveError(LocFTError):
    """What is to be preserved cannot be measured, or leaves nothing that could be changed."""


class RewordingsError(LocFTError):
    """Rewordings cannot be written, or what is kept of them cannot be used."""


class NonFiniteLossError(LocFTError):
    """Training met a NaN or infinite value; the weights are as they were before."""


class MemoryBudgetError(LocFTError):
    """The memory that is allowed cannot hold what is needed."""


class CheckpointError(LocFTError):
    """A checkpoint is damaged, or belongs to another training."""


class OutputError(LocFTError):
    """A result cannot be written."""


class DeltaError(LocFTError):
    """An edit's file is damaged, or does not fit the model that it is put into or taken out of."""


class LedgerError(LocFTError):
    """A ledger is damaged, belongs to another model, or does not hold what is asked of it."""


class PlanError(LocFTError):
    """No settings fit the memory that there is."""


class EasyEditNotFoundError(LocFTError, ImportError):
    """EasyEdit is not installed and `EASYEDIT_HOME` does not lead to it."""


class MissingDependencyError(LocFTError, ImportError):
    """A package that is needed for this step is not installed."""


class RankError(LocFTError):
    """Another process of those that work together has failed, or they do not find each other."""


class LostRankError(RankError):
    """Another process of those that work together has ended, or cannot be reached."""


class EditInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a training, after a checkpoint; the model is as before.

    Args:
        number: The signal.
        message: What was kept, and how to go on.
    """

    def __init__(self, number: signal.Signals, message: str) -> None:
        super().__init__(message)
        self.number = number


def one_message(title: str, problems: Sequence[str], limit: int = 10) -> str:
    """Returns one message that lists all `problems`, at most `limit` of them in full."""
    lines = [f"  - {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  - ... and {len(problems) - limit} more of the kind.")
    return "\n".join([title, *lines])
