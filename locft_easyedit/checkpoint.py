"""Checkpoints: what an interrupted training goes on from, bit for bit.

One safetensors file a training: float32 masters, Adam's moments, how far it has come, and what it
belongs to (see `identity.py`). It is replaced as a whole, so that a kill at any moment leaves the
last one; checksums tell damage.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import CheckpointError, EditInterrupted, OutputError, one_message
from .files import output_errors, replacing
from .hparams_rules import CUTS
from .identity import Identity
from .interrupts import Interrupts
from .progress import Progress
from .weights import TrainedWeights

logger = logging.getLogger(__name__)

FILE_NAME = "checkpoint.safetensors"
_FORMAT = 1
_KEY = "locft_checkpoint"
_BYTES_A_NUMBER = 12  # a master and two moments in float32
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
# Of `Progress`: kept as tensors, which hold every bit, or left to JSON.
_SERIES = ("losses", "step_losses")
_COUNTS = ("epoch", "step", "n_updates", "converged", "finished", "micro_batch_size", "seconds")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read.

    Attributes:
        identity: What it belongs to.
        notes: What the session noted for its resumption, such as where the prefix ends.
        progress: How far training had come.
        tensors: `master.NAME` and Adam's `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`.
    """

    identity: Identity
    notes: dict[str, Any]
    progress: Progress
    tensors: dict[str, torch.Tensor]


class Checkpoints:
    """The checkpoint of one training: found, resumed from, and replaced as training goes on.

    Args:
        folder: Where it is; made if need be.
        minutes: Time between two of them.
        identity: What this training is; a checkpoint of another one is refused.

    Attributes:
        path: The file.
        saved: What was found there, or `None`.
        notes: What to keep besides, for whoever resumes.

    Raises:
        CheckpointError: There is one that is damaged, or the unfinished one of another training.
    """

    def __init__(self, folder: str | Path, minutes: float, identity: Identity) -> None:
        self.path = Path(folder) / FILE_NAME
        self.seconds = 60 * minutes
        self.identity = identity
        self.notes: dict[str, Any] = {}
        self.saved = self._found()
        self._interrupts = Interrupts()
        self._last = self._started = time.monotonic()
        self._before = 0.0  # seconds of training before this process

    @property
    def finished(self) -> bool:
        """Whether the training that was found is over: only its weights are to be taken."""
        return self.saved is not None and self.saved.progress.finished

    def noted(self, name: str) -> Any:
        """Returns what a checkpoint that is resumed has noted; `None` if there is none."""
        return None if self.saved is None else self.saved.notes.get(name)

    def resume_(
        self,
        weights: TrainedWeights,
        optimizer: torch.optim.Optimizer | None = None,
        n_batches: int | None = None,
    ) -> Progress | None:
        """Gives weights and optimizer the state that was found; returns how far it had come.

        `None` if there is nothing to resume.

        Args:
            weights: What is trained.
            optimizer: Its optimizer; `None` if training is over.
            n_batches: Mini-batches an epoch.

        Raises:
            CheckpointError: It lacks a matrix, or one has another shape; nothing was changed.
        """
        if self.saved is None:
            return None
        progress, tensors = self.saved.progress, self.saved.tensors
        self.notes = dict(self.saved.notes)
        masters = weights.named_masters()
        problems = [
            f"`{key}` is missing or of another shape."
            for name, master in masters.items()
            for key in (f"master.{name}", *(f"{moment}.{name}" for moment in _MOMENTS[:2]))
            if (key.startswith("master.") or f"step.{name}" in tensors)
            and (key not in tensors or tensors[key].shape != master.shape)
        ]
        n_steps = len(progress.step_losses)
        in_epoch = n_steps - progress.epoch * (n_batches or 0)
        if n_batches and not 0 <= in_epoch == progress.step <= n_batches:
            problems.append(f"{n_steps} steps do not fit {progress.epoch} epochs of {n_batches}.")
        if problems:
            raise CheckpointError(one_message(f"{self.path} cannot be resumed:", problems))
        weights.load_({name: tensors[f"master.{name}"] for name in masters})
        for name, master in masters.items():
            if optimizer is not None and f"step.{name}" in tensors:
                optimizer.state[master] = {
                    moment: tensors[f"{moment}.{name}"].to(master.device) for moment in _MOMENTS
                }
        self._before = progress.seconds
        self.saved = None  # its tensors have done their work
        if progress.finished:
            logger.info("%s: training was finished; its weights are taken.", self.path)
        else:
            logger.info(
                "%s: training goes on in epoch %d, after %d of its mini-batches.",
                self.path,
                progress.epoch + 1,
                progress.step,
            )
        return dataclasses.replace(progress)

    def check_room(self, weights: TrainedWeights) -> None:
        """Warns, hours before it would be missed, if the disk has no room for a checkpoint."""
        folder = self.path.parent
        needed = _BYTES_A_NUMBER * sum(m.numel() for m in weights.masters)
        free = shutil.disk_usage(folder).free if folder.is_dir() else needed
        if free < needed:
            logger.warning(
                "%s: a checkpoint takes %.2f GiB, and %.2f GiB are free. Free some space, or "
                "choose another `checkpoint_dir`: without room an interruption loses the training.",
                folder,
                needed / 2**30,
                free / 2**30,
            )

    @contextmanager
    def watching(self, progress: Progress) -> Iterator[None]:
        """Within, Ctrl-C and SIGTERM wait for the end of a step, and time is counted."""
        self._last = self._started = time.monotonic()
        try:
            with self._interrupts.noted():
                yield
        finally:
            progress.seconds = self._elapsed()

    def due(self) -> bool:
        """Returns whether it is time for a checkpoint."""
        return (
            self._interrupts.received is not None or time.monotonic() - self._last >= self.seconds
        )

    def save(
        self, progress: Progress, weights: TrainedWeights, optimizer: torch.optim.Optimizer
    ) -> None:
        """Replaces the checkpoint by the present state.

        One that cannot be written is a warning: training goes on, and the last one stays.

        Raises:
            EditInterrupted: A signal has asked for the end.
        """
        tensors: dict[str, torch.Tensor] = {}
        for name, master in weights.named_masters().items():
            tensors[f"master.{name}"] = master
            for moment, value in optimizer.state.get(master, {}).items():
                tensors[f"{moment}.{name}"] = value
        written = self._write(progress, tensors)
        self._last = time.monotonic()
        if self._interrupts.received is not None:
            raise EditInterrupted(
                self._interrupts.received,
                f"Interrupted in epoch {progress.epoch + 1}, after {progress.step} of its "
                "mini-batches. The model is as before the edit. "
                + (
                    f"{self.path} has what was trained; the same edit goes on there."
                    if written
                    else f"{self.path} could not be written; an earlier one may be there."
                ),
            )

    def finish(self, progress: Progress, weights: TrainedWeights) -> None:
        """Leaves the trained weights alone: whatever comes next, they need not be trained again."""
        masters = weights.named_masters()
        self._write(progress, {f"master.{name}": master for name, master in masters.items()})

    def discard(self) -> None:
        """Removes the checkpoint."""
        self.path.unlink(missing_ok=True)

    def _elapsed(self) -> float:
        return self._before + time.monotonic() - self._started

    def _write(self, progress: Progress, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Writes a checkpoint; returns whether that worked."""
        progress.seconds = self._elapsed()
        kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        kept["shuffling"] = progress.shuffling
        for name in _SERIES:
            kept[name] = torch.tensor(getattr(progress, name), dtype=torch.float64)
        content = {
            "format": _FORMAT,
            "identity": self.identity.to_dict(),
            "notes": self.notes,
            "progress": {name: getattr(progress, name) for name in _COUNTS},
            "crc32": {name: _crc32(value) for name, value in kept.items()},
        }
        try:
            with output_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(self.path) as temporary:
                    save_file(kept, temporary, metadata={"format": "pt", _KEY: json.dumps(content)})
        except OutputError as error:
            logger.warning("No checkpoint was made, and training goes on: %s", error)
            return False
        return True

    def _found(self) -> Saved | None:
        """Returns the checkpoint that this training goes on from, if there is one.

        Raises:
            CheckpointError: It is damaged, or the unfinished one of another training.
        """
        if not self.path.exists():
            return None
        saved = read_checkpoint(self.path)
        differences = self.identity.differences(saved.identity)
        if not differences:
            for line in self.identity.changes_of_surroundings(saved.identity):
                logger.warning(
                    "The training goes on, but its bits may be others than without the "
                    "interruption: %s",
                    line,
                )
            return saved
        if saved.progress.finished:
            logger.info("%s is of another training that was finished; it is replaced.", self.path)
            return None
        raise CheckpointError(
            one_message(
                f"{self.path} is the unfinished training of something else. Go on with that, "
                "choose another folder, or remove it to begin anew:",
                differences,
            )
        )


def read_checkpoint(path: Path) -> Saved:
    """Reads a checkpoint; nothing in it is executed or taken for granted.

    Raises:
        CheckpointError: It cannot be read, is damaged, or is of another format.
    """
    remedy = "Remove it to begin anew, or restore it from a copy."
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {}).get(_KEY, ""))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no checkpoint: {error}. {remedy}") from error
    try:
        if content["format"] != _FORMAT:
            raise CheckpointError(
                f"{path} has format {content['format']!r}; this version reads {_FORMAT}. Finish "
                "that edit with the version that began it, or remove the file to begin anew."
            )
        sums = content["crc32"]
        if sums.keys() != tensors.keys():
            raise CheckpointError(f"{path} is damaged: tensors are missing. {remedy}")
        damaged = [name for name, value in tensors.items() if _crc32(value) != sums[name]]
        if damaged:
            named = ", ".join(damaged[:3])
            raise CheckpointError(f"{path} is damaged: {named} changed since. {remedy}")
        progress = _progress(content["progress"], tensors)
        identity = Identity.from_dict(content["identity"])
        notes = {"cut": content["notes"]["cut"], "packed": content["notes"]["packed"]}
        if notes["cut"] not in (None, *CUTS) or type(notes["packed"]) is not bool:
            raise ValueError(f"its notes are {notes}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is damaged ({reason}). {remedy}") from error
    return Saved(identity, notes, progress, tensors)


def _progress(counts: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Progress:
    """Returns the progress that a checkpoint holds, and takes its tensors out.

    Raises:
        KeyError, TypeError, ValueError: Something is missing or is not what it must be.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(Progress)}
    for name in _COUNTS:
        kind = type(defaults[name])
        least = 1 if name == "micro_batch_size" else 0
        if type(counts[name]) is not kind or not least <= counts[name] < math.inf:
            raise ValueError(f"{name} is {counts[name]!r}")
    series = {name: tensors.pop(name) for name in _SERIES}
    shuffling = tensors.pop("shuffling")
    if any(s.dtype != torch.float64 or s.dim() != 1 for s in series.values()):
        raise ValueError("its losses are no numbers")
    if len(series["losses"]) != counts["epoch"]:
        raise ValueError(f"{counts['epoch']} epochs, but {len(series['losses'])} losses")
    try:
        torch.Generator().set_state(shuffling)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"its random state: {error}") from error
    values: dict[str, Any] = {name: counts[name] for name in _COUNTS}
    values |= {name: numbers.tolist() for name, numbers in series.items()}
    return Progress(shuffling, **values)


def _crc32(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
