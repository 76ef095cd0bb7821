"""The breadth-first training loop of LocFT-BF ("Fine-tuning Done Right in Model Editing").

Ordinary training, restored to model editing: epochs over all edits, shuffled, in mini-batches,
with Adam on the trained matrices alone (arXiv 2509.22072, section 4).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .ahead import ahead
from .checkpoint import Checkpoints
from .errors import NonFiniteLossError
from .hparams import LocFTBFHyperParams
from .progress import Progress
from .runner import Prepared, TextRunner
from .sharding import lockstep
from .share import Partition
from .variants import Variants
from .weights import TrainedWeights
from .world import SINGLE_PROCESS

logger = logging.getLogger(__name__)


def breadth_first_(
    runner: TextRunner,
    weights: TrainedWeights,
    indices: np.ndarray,
    hparams: LocFTBFHyperParams,
    *,
    share: Partition | None = None,
    variants: Variants | None = None,
    adam: Mapping[str, Any] | None = None,
    describe: Callable[[int], str] = str,
    progress: bool = False,
    checkpoints: Checkpoints | None = None,
) -> Progress:
    """Trains `weights` on the edits `indices`, in place; returns what it did.

    Args:
        runner: Gives the losses of a batch of edits, with a graph to the parameters; where several
            processes train together, of this one's share.
        weights: What is trained.
        indices: The edits, [N].
        hparams: Epochs, batch size, learning rate, thresholds and seed.
        share: Which texts this process runs; all if `None`.
        variants: Which texts stand for an edit in an epoch; text i for edit i if `None`.
        adam: What Adam is given beside the rate; by default PyTorch's values, and `weight_decay`.
        describe: Names an edit in an error.
        progress: Show a progress bar.
        checkpoints: Where an interrupted training goes on from, and leaves its state.

    Raises:
        NonFiniteLossError: A loss or a weight became NaN or infinite. Restoring the weights is up
            to the caller, who holds the originals.
        EditInterrupted: Ctrl-C or SIGTERM, after a checkpoint.
    """
    share = share or Partition.in_world(SINGLE_PROCESS, runner.texts.input_lengths)
    variants = variants or Variants.alone(len(share.position))
    step = _Step(runner, weights, hparams, share, variants, adam)
    n_batches = math.ceil(len(indices) / hparams.batch_size)
    done = Progress.start(hparams.seed, step.micro_batch.size)
    if checkpoints is not None:
        checkpoints.check_room(weights)
        done = checkpoints.resume_(weights, step.optimizer, n_batches) or done
        step.micro_batch.size = done.micro_batch_size
    generator = torch.Generator()
    with (
        tqdm(
            total=hparams.num_steps * n_batches,
            initial=done.epoch * n_batches + done.step,
            desc="breadth-first",
            unit="step",
            disable=not progress,
        ) as bar,
        checkpoints.watching(done) if checkpoints is not None else nullcontext(),
    ):
        while done.epoch < hparams.num_steps and not done.converged:
            generator.set_state(done.shuffling)
            order = indices[torch.randperm(len(indices), generator=generator).numpy()]
            batches = [
                order[start : start + hparams.batch_size]
                for start in range(0, len(order), hparams.batch_size)
            ]
            outcomes: list[Outcome] = []
            left = batches[done.step :]
            texts = [variants.texts(batch, done.epoch) for batch in left]
            for batch, parts in zip(texts, step.prepared(texts), strict=True):
                outcomes.append(step.take_(parts, len(batch)))
                bar.update()
                if step.waits and not torch.isfinite(outcomes[-1][0]):
                    break
                if checkpoints is not None and checkpoints.due():
                    _count_(done, outcomes, batches, describe, hparams)
                    done.micro_batch_size = step.micro_batch.size
                    checkpoints.save(done, weights, step.optimizer)
            _count_(done, outcomes, batches, describe, hparams)
            sizes = [len(batch) for batch in batches]
            epoch_losses = done.step_losses[-len(batches) :]
            done.losses.append(float(np.dot(epoch_losses, sizes)) / len(order))
            done.epoch, done.step, done.shuffling = done.epoch + 1, 0, generator.get_state()
            done.converged = done.losses[-1] < hparams.epoch_loss_threshold
            bar.set_postfix(epoch=done.epoch, loss=f"{done.losses[-1]:.4f}")
        weights.clear_gradients_()
        # The same sums were added to all; unlike GPUs may still have rounded them differently.
        share.world.broadcast_(weights.masters)
        weights.publish_()
        if not weights.finite():
            raise NonFiniteLossError(
                "The last update made a weight NaN or infinite; the weights are as they were "
                f"before the edit. Lower `lr={hparams.lr}`."
            )
        done.finished = True
        if checkpoints is not None:
            checkpoints.finish(done, weights)
    return done


Outcome = tuple[torch.Tensor, torch.Tensor]  # a mini-batch's loss, and whether it made an update


def _count_(
    done: Progress,
    outcomes: list[Outcome],
    batches: list[np.ndarray],
    describe: Callable[[int], str],
    hparams: LocFTBFHyperParams,
) -> None:
    """Moves outcomes to the host and into `done`: the only wait for a GPU in an epoch.

    Raises:
        NonFiniteLossError: A loss is NaN or infinite.
    """
    if not outcomes:
        return
    losses, updated = (torch.stack(column).tolist() for column in zip(*outcomes, strict=True))
    outcomes.clear()
    for number, loss in enumerate(losses, start=done.step):
        if not math.isfinite(loss):
            explained = _explain(loss, done.epoch, number, batches[number], describe, hparams)
            raise NonFiniteLossError(explained)
    done.step_losses += losses
    done.n_updates += sum(updated)
    done.step += len(losses)


class _Step:
    """One mini-batch after another: losses, gradients and, above the threshold, an update."""

    def __init__(
        self,
        runner: TextRunner,
        weights: TrainedWeights,
        hparams: LocFTBFHyperParams,
        share: Partition,
        variants: Variants,
        adam: Mapping[str, Any] | None,
    ) -> None:
        self.runner = runner
        self.share = share
        self.weights = weights
        self.threshold = hparams.batch_loss_threshold
        most = hparams.micro_batch_size or hparams.batch_size
        self.micro_batch = _MicroBatch(most, variants.most)
        self.optimizer = torch.optim.Adam(
            weights.masters,
            lr=hparams.lr,
            fused=True,
            **{"weight_decay": hparams.weight_decay} | dict(adam or {}),
        )
        # A CPU has nothing to wait for.
        self.waits = runner.device.type == "cpu"

    def prepared(self, batches: list[np.ndarray]) -> Iterator[list[Prepared]]:
        """Yields each mini-batch's micro-batches, ready on the device."""
        return ahead(
            self._parts,
            batches,
            self.runner.device,
            move=lambda parts: (tensor for part in parts for tensor in part.tensors()),
            in_thread=self.runner.waits,
            also=[] if self.runner.prefix is None else [self.runner.prefix.device],
        )

    def _parts(self, batch: np.ndarray) -> list[Prepared]:
        return self._micro_batches(self.share.of(batch))

    def _micro_batches(self, texts: np.ndarray) -> list[Prepared]:
        lengths = self.runner.texts.input_lengths[texts]
        return [self.runner.prepare(part) for part in self.micro_batch.split(texts, lengths)]

    def _again(self, parts: list[Prepared]) -> list[Prepared]:
        return self._micro_batches(np.concatenate([part.batch for part in parts]))

    def take_(self, parts: list[Prepared], n_texts: int) -> Outcome:
        """Makes one step on a mini-batch.

        Args:
            parts: This process's share of it, in micro-batches.
            n_texts: Texts of the whole mini-batch.
        """
        if max((part.n_texts for part in parts), default=0) > self.micro_batch.size:
            parts = self._again(parts)  # made ahead, before memory ran out
        # Whoever has less to run, or has to run it again in smaller parts, is waited for.
        with lockstep(self.runner.model):
            loss, known_below = self._own_gradients_(parts, n_texts)
        if known_below:
            return loss, torch.tensor(False, device=loss.device)
        # All that processes which train together exchange in a step.
        self.share.world.sum_(chain([loss], self.weights.gradients_()))
        update = torch.isfinite(loss) & (loss >= self.threshold)
        if self.waits:
            if update:
                self.optimizer.step()
                self.weights.publish_()
            return loss, update
        # A fused Adam leaves everything as it is where this says so: nobody waits for a GPU.
        self.optimizer.found_inf = (~update).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.weights.publish_()
        return loss, update

    def _own_gradients_(self, parts: list[Prepared], n_texts: int) -> tuple[torch.Tensor, bool]:
        """Computes this process's share of the mini-batch's loss and gradients.

        Returns it, and whether it is below the threshold, where that costs nothing to know: there
        are no gradients then.
        """
        while True:
            self.weights.clear_gradients_()
            try:
                return self._summed_(parts, n_texts)
            except torch.cuda.OutOfMemoryError as error:
                self.micro_batch.halve(parts, error)
            # Outside the handler: the exception's frames hold the tensors that have to go.
            torch.cuda.empty_cache()
            parts = self._again(parts)

    def _summed_(self, parts: list[Prepared], n_texts: int) -> tuple[torch.Tensor, bool]:
        losses = []
        # Then what follows a loss below the threshold is saved.
        known_at_once = self.waits and len(parts) == 1 and not self.share.world.is_distributed
        for part in parts:
            loss = self.runner.edit_losses(part).sum() / n_texts
            if known_at_once and not loss >= self.threshold:
                return loss.detach(), True  # NaN as well
            (loss * self.weights.loss_scale).backward()
            self.weights.collect_gradients_()
            losses.append(loss.detach())
        total = torch.stack(losses).sum() if losses else torch.zeros((), device=self.runner.device)
        return total, False


class _MicroBatch:
    """How many texts one forward pass takes: halved for good when the GPU's memory runs out.

    Args:
        edits: How many edits to begin with.
        texts_each: Texts of an edit.
    """

    def __init__(self, edits: int, texts_each: int = 1) -> None:
        self.size = edits * texts_each
        self._texts_each = texts_each

    def split(self, batch: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """Returns micro-batches of about as many tokens each; one is the batch as it is."""
        n_parts = math.ceil(len(batch) / self.size)
        if n_parts <= 1:
            return [batch] if n_parts else []
        # Longest first, dealt to and fro: no part gets all the long ones.
        order = np.argsort(-lengths, kind="stable")
        turn = np.arange(len(batch)) % (2 * n_parts)
        part = np.where(turn < n_parts, turn, 2 * n_parts - 1 - turn)
        return [batch[np.sort(order[part == i])] for i in range(n_parts)]

    def halve(self, parts: list[Prepared], error: Exception) -> None:
        used = max(part.n_texts for part in parts)
        if used == 1:
            raise error
        self.size = used // 2
        logger.warning(
            "%d texts in one forward pass do not fit into the GPU's memory; %d at a time, with "
            "gradients added up, give the same mini-batch. `micro_batch_size: %d` starts there.",
            used,
            self.size,
            max(1, self.size // self._texts_each),
        )


def _explain(
    loss: float,
    epoch: int,
    number: int,
    batch: np.ndarray,
    describe: Callable[[int], str],
    hparams: LocFTBFHyperParams,
) -> str:
    shown = "; ".join(describe(int(i)) for i in batch[:3])
    more = f"; and {len(batch) - 3} more" if len(batch) > 3 else ""
    return (
        f"The loss became {loss} in epoch {epoch + 1}, mini-batch "
        f"{number + 1} ({shown}{more}). The weights are as they were "
        f"before the edit. Lower `lr={hparams.lr}`, or use `dtype: float32` if it is float16."
    )
