"""Checkpoints: what an interrupted training goes on from, bit for bit.

One safetensors file a training: float32 masters, Adam's moments, how far it has come, and what it
belongs to (see `identity.py`). It is replaced as a whole, so that a kill at any moment leaves the
last one; checksums tell damage.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data.training_texts import TrainingTexts
from ..distributed.world import SINGLE_PROCESS, World
from ..errors import CheckpointError, EditInterrupted, OutputError, one_message
from ..hparams import LocFTBFHyperParams
from ..modeling.places import Place
from ..utils.signals import Interrupts
from .checkpoint_file import Saved, read_checkpoint, write_checkpoint
from .identity import Identity, check_agreed
from .preserve.sources import Source
from .progress import Progress
from .trained_weights import TrainedWeights, write_

logger = logging.getLogger(__name__)

FILE_NAME = "checkpoint.safetensors"
_BYTES_A_NUMBER = 12  # a master and two moments in float32
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_PATIENCE = 30.0  # seconds in which a second signal is the first one again
_ASK_SECONDS = 0.25  # about how often ranks ask each other for a checkpoint, and at most
_MOST_STEPS = 100  # from one time to the next


class Checkpoints:
    """The checkpoint of one training: found, resumed from, and replaced as training goes on.

    Where several processes train together rank 0 alone reads and writes it.

    Args:
        folder: Where it is; made if need be.
        minutes: Time between two of them.
        identity: What this training is; a checkpoint of another one is refused.
        world: The processes that train together.

    Attributes:
        path: The file.
        saved: What was found there, or `None`; its tensors are on rank 0 alone.
        notes: What to keep besides, for a run that resumes.

    Raises:
        CheckpointError: There is one that is damaged, or the unfinished one of another training.
    """

    def __init__(
        self, folder: str | Path, minutes: float, identity: Identity, world: World = SINGLE_PROCESS
    ) -> None:
        self.path = Path(folder) / FILE_NAME
        self.seconds = 60 * minutes
        self.identity = identity
        self.notes: dict[str, Any] = {"preserved": None}
        self.world = world
        self.saved = self._found()
        # A launcher passes on a Ctrl-C that its processes have got from the terminal already.
        self._interrupts = Interrupts(patience=_PATIENCE if world.is_distributed else 0.0)
        self._asked: signal.Signals | None = None
        self._steps_left = 0
        self._last = self._started = time.monotonic()
        self._agreed = self._last, 1  # when ranks last asked each other, and steps since
        self._before = 0.0  # seconds of training before this process

    @property
    def finished(self) -> bool:
        """Whether the training that was found is over: only its weights are to be taken."""
        return self.saved is not None and self.saved.progress.finished

    def noted(self, name: str) -> Any:
        """Returns what a checkpoint that is resumed has noted; `None` if there is none."""
        return None if self.saved is None else self.saved.notes.get(name)

    def check_preserved(self, digest: str) -> None:
        """Notes what is preserved, and checks that a checkpoint was made with the same.

        Args:
            digest: Hash of the text that was measured.

        Raises:
            CheckpointError: It was made with other text.
        """
        if self.saved is not None and self.saved.notes["preserved"] != digest:
            raise CheckpointError(
                f"{self.path} was made with other text in `preserve` than was found now: what the "
                "model samples is kept in `preserve_dir`, and differs from device to device. Give "
                "that folder again, or remove the file to begin anew."
            )
        self.notes["preserved"] = digest

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
        stepped = self.world.broadcast_from_main(lambda: self._checked(masters, n_batches))
        if self.world.is_main_process:
            write_(masters, {name: tensors[f"master.{name}"] for name in masters})
        self.world.broadcast_(masters.values())
        weights.copy_masters_to_model_()
        for name in stepped if optimizer is not None else []:
            assert optimizer is not None
            master = masters[name]
            state = {moment: _empty(moment, master) for moment in _MOMENTS}
            if self.world.is_main_process:
                write_(state, {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS})
            self.world.broadcast_(state.values())
            optimizer.state[master] = state
        self._before = progress.seconds
        self.saved = None  # its tensors have done their work
        if progress.finished:
            logger.info("%s: training was finished; its weights are taken.", self.path)
        else:
            logger.info("%s: training goes on %s.", self.path, progress.so_far())
        return dataclasses.replace(progress)

    def _checked(self, masters: Mapping[str, torch.Tensor], n_batches: int | None) -> list[str]:
        """Returns which masters the optimizer has stepped.

        Raises:
            CheckpointError: A tensor is missing or of another shape, or the steps do not add up.
        """
        assert self.saved is not None
        progress, tensors = self.saved.progress, self.saved.tensors
        stepped = [name for name in masters if f"step.{name}" in tensors]
        problems = [
            f"`{key}` is missing or of another shape."
            for name, master in masters.items()
            for key in (f"master.{name}", *(f"{moment}.{name}" for moment in _MOMENTS[:2]))
            if (key.startswith("master.") or name in stepped)
            and (key not in tensors or tensors[key].shape != master.shape)
        ]
        n_steps = len(progress.step_losses)
        in_epoch = n_steps - progress.epoch * (n_batches or 0)
        if n_batches and not (progress.depth_first or 0 <= in_epoch == progress.step <= n_batches):
            problems.append(f"{n_steps} steps do not fit {progress.epoch} epochs of {n_batches}.")
        if problems:
            raise CheckpointError(one_message(f"{self.path} cannot be resumed:", problems))
        return stepped

    def check_room(self, weights: TrainedWeights) -> None:
        """Warns, hours before it would be missed, if the disk has no room for a checkpoint."""
        if not self.world.is_main_process:
            return
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
        """Context manager that holds Ctrl-C and SIGTERM back to the end of a step; counts time."""
        self._last = self._started = time.monotonic()
        self._agreed, self._steps_left = (self._last, 1), 0
        try:
            with self._interrupts.noted():
                yield
        finally:
            progress.seconds = self._elapsed()

    def due(self) -> bool:
        """Returns whether it is time for a checkpoint; called after every step.

        Ranks have to answer alike. They ask each other every few steps, so that hosts which run
        ahead of their GPUs are not held up.
        """
        self._steps_left -= 1
        if self._steps_left > 0:
            return False
        now = time.monotonic()
        received = self._interrupts.received
        # The first rank's clock counts.
        late = self.world.is_main_process and now - self._last >= self.seconds
        seconds, steps = now - self._agreed[0], self._agreed[1]
        ahead = int(steps * min(_ASK_SECONDS, self.seconds) / max(seconds, 1e-9))
        ahead = max(1, min(_MOST_STEPS, ahead)) if self.world.is_main_process else 1
        answers = self.world.all_max([int(received or 0), int(late), ahead])
        self._steps_left = answers[2] if self.world.is_distributed else 0
        self._agreed = now, max(1, self._steps_left)
        self._asked = signal.Signals(answers[0]) if answers[0] else None
        return self._asked is not None or bool(answers[1])

    def save(
        self, progress: Progress, weights: TrainedWeights, optimizer: torch.optim.Optimizer
    ) -> bool:
        """Replaces the checkpoint by the present state; returns whether it could be written.

        One that cannot be written is a warning: training goes on, and the last one stays.

        Raises:
            EditInterrupted: A signal has asked for the end.
        """
        tensors: dict[str, torch.Tensor] = {}
        for name, master in weights.named_masters().items():
            tensors[f"master.{name}"] = master
            for moment, value in optimizer.state.get(master, {}).items():
                tensors[f"{moment}.{name}"] = value
        progress.seconds = self._elapsed()
        # No rank goes on, or ends, before it is written.
        written = self.world.broadcast_from_main(lambda: self._write(progress, tensors))
        self._last = time.monotonic()
        self.end_if_asked(progress, written)
        return written

    def finish(self, progress: Progress, weights: TrainedWeights) -> None:
        """Leaves the trained weights alone: whatever comes next, they need not be trained again.

        Raises:
            EditInterrupted: A signal came after the last step.
        """
        masters = weights.named_masters()
        progress.seconds = self._elapsed()
        kept = {f"master.{name}": master for name, master in masters.items()}
        written = self.world.broadcast_from_main(lambda: self._write(progress, kept))
        [asked] = self.world.all_max([int(self._interrupts.received or 0)])
        self._asked = signal.Signals(asked) if asked else None
        self.end_if_asked(progress, written)

    def end_if_asked(self, progress: Progress, written: bool) -> None:
        """Ends the training if a signal has asked for it.

        Args:
            progress: How far training has come.
            written: Whether the checkpoint that it goes on from could be written.

        Raises:
            EditInterrupted: It has.
        """
        if self._asked is None:
            return
        where = progress.so_far()
        kept = f"{self.path} has what was trained; the same edit goes on there."
        if not written:
            kept = f"{self.path} could not be written; an earlier one may be there."
        raise EditInterrupted(
            self._asked,
            f"Interrupted {'after training' if progress.finished else where}. The model is as "
            f"before the edit. {kept}",
        )

    def discard(self) -> None:
        """Removes the checkpoint."""
        if self.world.is_main_process:
            self.path.unlink(missing_ok=True)

    def _elapsed(self) -> float:
        return self._before + time.monotonic() - self._started

    def _write(self, progress: Progress, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Writes a checkpoint; returns whether that worked."""
        try:
            write_checkpoint(self.path, Saved(self.identity, self.notes, progress, dict(tensors)))
        except OutputError as error:
            logger.warning("No checkpoint was made, and training goes on: %s", error)
            return False
        return True

    def _found(self) -> Saved | None:
        """Returns the checkpoint that this training goes on from, if there is one.

        Raises:
            CheckpointError: It is damaged, or the unfinished one of another training.
        """
        whole: Saved | None = None

        def look() -> Saved | None:
            nonlocal whole
            whole = self._on_disk()
            return None if whole is None else dataclasses.replace(whole, tensors={})

        without_tensors = self.world.broadcast_from_main(look)
        return whole or without_tensors

    def _on_disk(self) -> Saved | None:
        """Returns the checkpoint in the folder, if this training goes on from it.

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


def _empty(moment: str, master: torch.Tensor) -> torch.Tensor:
    """Returns room for one of Adam's values of a parameter; its step is one number."""
    like = master.detach()
    return like.new_zeros(()) if moment == "step" else torch.zeros_like(like)


def agreed_checkpoints(
    model: PreTrainedModel,
    place: Place,
    texts: TrainingTexts,
    hparams: LocFTBFHyperParams,
    sources: Sequence[Source],
    folder: str | None,
    world: World,
) -> Checkpoints | None:
    """Returns the checkpoints of a training on which all processes agree.

    Args:
        model: The model, with its original weights.
        place: What is trained.
        texts: The edits and their rewordings.
        hparams: The hyper-parameters, with the place that was chosen.
        sources: What is to be preserved.
        folder: Where checkpoints lie; `None` leaves none, and returns `None`.
        world: The processes that train together.

    Raises:
        RankError: A process is about to make another edit.
        CheckpointError: As for `Checkpoints`.
    """
    if folder is None and not world.is_distributed:
        return None
    identity = Identity.of_training(
        model,
        place,
        texts.texts,
        hparams,
        world.size,
        sources,
        [*texts.wordings, texts.subjects],
    )
    check_agreed(world.all_gather(identity))
    if folder is None or hparams.checkpoint_minutes is None:
        return None
    checkpoints = Checkpoints(folder, hparams.checkpoint_minutes, identity, world)
    world.advise(
        f"{checkpoints.path} has the last checkpoint, if one was due; the same edit "
        "goes on there, with any number of processes."
    )
    return checkpoints
