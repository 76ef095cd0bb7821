"""Edits that do not hold after a training are trained again, until a check of all finds none.

An edit holds where its target is the model's first choice at every token, by more than rounding
could turn: then it is what greedy decoding answers. With a frozen prefix to look at all of them
takes one pass of the upper layers. A change that is trained beside a matrix in half precision is
looked at before it is added to it, which rounds once more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..data.batching import in_batches
from ..data.variants import Replayed, Variants
from ..distributed.world import Partition
from ..errors import NonFiniteLossError
from ..hparams import LocFTBFHyperParams
from ..hparams_rules import CONSTANT
from ..modeling.fsdp import lockstep
from ..modeling.modes import evaluation_mode
from ..modeling.near_ties import too_close
from ..prefix.runner import TextRunner
from .trained_weights import write_

logger = logging.getLogger(__name__)

# Of the rate: few edits are behind a repair's gradients, and Adam takes steps of one size whatever
# they are. Chosen on the first 200 records of ZsRE.
_RATE = 0.25


@dataclass(frozen=True)
class Repaired:
    """What repairs came to.

    Attributes:
        rounds: Rounds of training, with those before.
        epochs: Passes over what was trained, in all rounds.
        wrong: Texts that are not right after all rounds, [W] ascending.
    """

    rounds: int
    epochs: int
    wrong: np.ndarray


def repair_(
    parameters: Mapping[str, torch.Tensor],
    begun: Repaired,
    not_right: Callable[[], np.ndarray],
    train_again_: Callable[[np.ndarray, int], int],
    rounds: int,
    *,
    patience: int | None = None,
    better: Callable[[Repaired], None] = lambda _: None,
) -> Repaired:
    """Trains again what is wrong, in place, until nothing is; else the best state counts.

    A round that diverges is the last one, and a warning: the best state before it counts.

    Args:
        parameters: What is trained, by name.
        begun: What is wrong now, and what rounds before have come to, of which this is the best
            state.
        not_right: Returns the texts that are not right by then, ascending.
        train_again_: Trains some texts; gets them and the round, from 1, and returns its epochs.
        rounds: At most so many, with those of `begun`.
        patience: Rounds without fewer wrong texts, after which there are no more; `None` sets no
            limit.
        better: Told what they came to after each round with fewer wrong texts than any before.
    """
    n, epochs, wrong, since = begun.rounds, begun.epochs, begun.wrong, 0
    fewest = wrong
    # On the host: a device may be full.
    best = {name: _on_host(p) for name, p in parameters.items()} if len(wrong) else {}
    while len(wrong) and n < rounds and since != patience:
        n, since = n + 1, since + 1
        try:
            epochs += train_again_(wrong, n)
        except NonFiniteLossError:
            logger.warning("Round %d of repair diverged; the best state before it counts.", n)
            write_(parameters, best)
            wrong = fewest
            break
        wrong = not_right()
        if len(wrong) < len(fewest):
            fewest, since = wrong, 0
            write_(best, parameters)
            better(Repaired(n, epochs, wrong))
    if len(fewest) < len(wrong):
        write_(parameters, best)
        wrong = fewest
    return Repaired(n, epochs, wrong)


def _on_host(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().to("cpu", copy=True)


def of_round(hparams: LocFTBFHyperParams, number: int, factor: float = 1.0) -> LocFTBFHyperParams:
    """Returns the hyper-parameters of a round of repair.

    Args:
        hparams: Those of the training.
        number: The round, from 1.
        factor: What the rate of repairs is multiplied by; that of the training is not exceeded.
    """
    # A mean below the thresholds may hide what is still wrong: they are lowered each time.
    return replace(
        hparams,
        lr=hparams.lr * min(1.0, _RATE * factor),
        lr_schedule=CONSTANT,  # a round may end after any epoch
        batch_loss_threshold=hparams.batch_loss_threshold * 10.0**-number,
        epoch_loss_threshold=hparams.epoch_loss_threshold * 10.0**-number,
    )


def again_beside(n_texts: int, checked: np.ndarray, wrong: np.ndarray, seed: int) -> Replayed:
    """Returns the texts of a round of repair: each as it is, beside as many that are right.

    Args:
        n_texts: All texts.
        checked: Those that are checked.
        wrong: Those of them that are trained again.
        seed: Seed of what is drawn.
    """
    right = np.setdiff1d(checked, wrong)
    return Replayed.of(Variants.own_alone(n_texts), 0, right, seed)


def wrong_texts(
    runner: TextRunner,
    share: Partition,
    texts: np.ndarray,
    batch_size: int,
    *,
    clearly: bool = True,
    progress: bool = False,
) -> np.ndarray:
    """Returns those of these texts whose targets are not the model's first choices, ascending.

    Args:
        runner: Runs this process's texts.
        share: Which of all texts they are.
        texts: The texts, of all, [B].
        batch_size: Texts a forward pass.
        clearly: A first choice counts only where rounding could not turn it; else a second one
            counts as well where rounding could make it the first.
        progress: Show a progress bar.

    Raises:
        RankError: Another process has failed.
    """
    found: list[int] = []

    def note(batch: np.ndarray) -> None:
        logits, rows = runner.logits(batch)
        best = logits.topk(2, dim=-1)  # [S, 2]
        labels = runner.ids[rows.label_index].to(logits.device)
        bad = best.indices[:, 0] != labels
        if clearly:
            bad |= too_close(best.values, runner.model)
        else:
            wanted = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
            pair = torch.stack([best.values[:, 0], wanted], dim=1)
            bad &= ~too_close(pair, runner.model)
        bad |= ~torch.isfinite(best.values[:, 0])
        owners = np.unique(rows.owner.to(logits.device)[bad].cpu().numpy())
        found.extend(batch[owners].tolist())

    run_in_batches(runner, share, share.positions_of(texts), note, batch_size, progress=progress)
    of_all = share.world.all_gather(share.own[np.array(found, np.int64)])
    return np.sort(np.concatenate(of_all))


@torch.no_grad()
def run_in_batches(
    runner: TextRunner,
    share: Partition,
    texts: np.ndarray,
    run: Callable[[np.ndarray], Any],
    batch_size: int,
    *,
    progress: bool = False,
) -> None:
    """Calls `run` with this process's share of some texts, batch by batch, without gradients.

    Args:
        runner: Runs this process's texts.
        share: Which of all texts they are.
        texts: The texts, of this process's, [b].
        run: Handles one batch, and may be called again with halves of it (see `in_batches`).
        batch_size: Texts in a batch.
        progress: Show a progress bar.

    Raises:
        RankError: Another process has failed.
    """
    with share.world.sharing_errors(), lockstep(runner.model):
        if len(texts):
            with evaluation_mode(runner.model), runner.running():
                batches = runner.layout.batches(batch_size, texts)
                in_batches(batches, run, description="check", progress=progress)
