"""One way to run an edit: its settings, how weights lie on several GPUs, and who waits for whom.

`copies`
    Each GPU holds the weights that stay and is a rank of its own. Gradients are exchanged.
`fsdp`
    A rank a GPU too, but the frozen layers above the place are cut into as many parts as a node
    has GPUs, and each layer is gathered before it runs, forward and backward.
`model_parallel`
    One process, and so one rank, for a group of GPUs: the layers lie on one after another, and
    while one GPU of the group computes the others wait.

Each edit belongs to one rank, dealt out in turn, and a mini-batch is drawn from all edits: how many
of its edits belong to which rank is chance (a multivariate hypergeometric distribution; with many
more edits than a mini-batch has, a multinomial one). A step takes as long as its largest rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from ..hparams import torch_dtype
from .shapes import ModelShapes
from .workload import Machine, Workload

LAYOUTS = ("copies", "fsdp", "model_parallel")

# Beyond so many standard deviations nothing is left that could be added up.
_DEVIATIONS = 12.0


@dataclass(frozen=True)
class Setting:
    """What can be chosen of a run.

    Attributes:
        dtype: Precision of weights and computation.
        streamed: Read the frozen layers from the checkpoint instead of keeping them.
        cut: Where the prefix ends: `matrix`, `mlp` or `layer`.
        micro_batch_size: Edits in one forward pass of training.
        layout: How weights lie on several GPUs: `copies`, `fsdp` or `model_parallel`.
        group: GPUs that share one copy of the weights.
    """

    dtype: str
    streamed: bool
    cut: str
    micro_batch_size: int
    layout: str = "copies"
    group: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes a number of the model."""
        return torch_dtype(self.dtype).itemsize

    def processes(self, gpus: int) -> int:
        """Returns the processes of a node with so many GPUs."""
        return gpus // (self.group if self.layout == "model_parallel" else 1)


@dataclass(frozen=True)
class Run:
    """A run in one setting: what memory, work and time are counted of."""

    shapes: ModelShapes
    setting: Setting
    work: Workload
    machine: Machine

    @property
    def processes(self) -> int:
        """Processes of a node."""
        return self.setting.processes(self.machine.gpus)

    @property
    def ranks(self) -> int:
        """Processes of all nodes, R: what edits are dealt out to."""
        return self.processes * self.machine.nodes

    @property
    def share(self) -> LargestShare:
        """The largest part of a mini-batch that one rank gets, in edits."""
        work = self.work
        n_steps = work.epochs * math.ceil(work.n / work.batch_size)
        # Ranks own texts: an edit's rewordings are dealt out as edits are.
        batch = math.ceil(min(work.batch_size, work.n) * work.texts)
        found = largest_share(work.n * work.recorded_texts, batch, self.ranks, n_steps)
        return LargestShare(found.mean / work.texts, math.ceil(found.most / work.texts))

    @property
    def folds(self) -> bool:
        """Whether the prefix holds what a confined change makes constant."""
        return self.shapes.folds(self.setting.cut)

    @property
    def cells(self) -> float:
        """Cells of the rows that a micro-batch fills, with its rewordings."""
        return self.work.cells(self.setting.micro_batch_size * self.work.step_tokens)

    @property
    def kept(self) -> int:
        """Parameters that are not streamed."""
        return self.shapes.upper if self.setting.streamed else self.shapes.parameters

    @property
    def resident(self) -> float:
        """Parameters that stay on a GPU.

        Layers that lie on several GPUs are not cut: one of them may have a layer more than its
        part.
        """
        shapes, setting = self.shapes, self.setting
        if setting.layout == "fsdp":
            return self.kept - shapes.sharded * (1 - 1 / setting.group)
        if setting.layout == "model_parallel":
            stays = shapes.layers[shapes.first_layer if setting.streamed else 0 :]
            most = self.kept / setting.group + max(one.parameters for one in stays)
            return min(self.kept, most)
        return self.kept

    @property
    def gathered(self) -> float:
        """Bytes of cut-up layers that a GPU receives in a pass forward, or backward."""
        if self.setting.layout != "fsdp":
            return 0.0
        return self.shapes.sharded * self.setting.itemsize * (1 - 1 / self.setting.group)


@dataclass(frozen=True)
class LargestShare:
    """Of the edits of a mini-batch, those of the rank with most of them.

    Attributes:
        mean: Their number, on average over all mini-batches.
        most: Their number in the worst of a run's mini-batches, as likely as not.
    """

    mean: float
    most: int


@cache
def largest_share(n_edits: int, batch_size: int, ranks: int, n_steps: int = 1) -> LargestShare:
    """Returns the largest number of edits that one of the ranks has in a mini-batch.

    The probability that no rank has more than m is the product, over ranks, of the probabilities
    that independent binomials stay at m or below, times that of their sum being the batch size when
    they do, over that of the sum being it anyway (Levin, "A representation for multinomial
    cumulative distribution functions", Annals of Statistics 1981). Nothing is sampled.

    Args:
        n_edits: All edits, N.
        batch_size: Edits in a mini-batch, B; at most N of them are there.
        ranks: Ranks, R.
        n_steps: Mini-batches of the run.
    """
    batch = min(batch_size, n_edits)
    if ranks == 1 or batch == n_edits:
        most = math.ceil(batch / ranks)
        return LargestShare(float(most), most)
    chance = batch / n_edits
    # Dealt out in turn, the first few ranks have one edit more than the others.
    each, n_more = divmod(n_edits, ranks)
    owned = [(each + 1, n_more), (each, ranks - n_more)]
    ranks_alike = [(_log_binomial(owns, chance, batch), n) for owns, n in owned if n]
    anyway = float(np.exp(_log_binomial(n_edits, chance, batch)[batch]))
    low = math.ceil(batch / ranks)
    high = min(batch, math.ceil(low + _DEVIATIONS * math.sqrt(low) + _DEVIATIONS))
    mean, most = float(low), low
    for m in range(low, high + 1):
        above = min(1.0, max(0.0, 1.0 - _none_above(m, ranks_alike, batch) / anyway))
        mean += above
        if 1 - (1 - above) ** n_steps >= 0.5:
            most = m + 1
    return LargestShare(mean, min(most, batch))


def _none_above(m: int, ranks_alike: list[tuple[np.ndarray, int]], batch: int) -> float:
    """Returns the probability that no binomial is above `m` and that all add up to `batch`.

    Args:
        m: The limit.
        ranks_alike: Logarithms of a rank's probabilities, [1 + most], and how many ranks have them.
        batch: The sum.
    """
    kept = [(np.exp(logs[: m + 1]), n) for logs, n in ranks_alike]
    length = 1 + sum(n * (len(one) - 1) for one, n in kept)
    if length <= batch:
        return 0.0
    product, log_scale = np.ones(length, dtype=complex), 0.0
    for one, n in kept:
        # Each is made to add up to 1: the 64th power of anything less is lost in rounding.
        log_scale += n * math.log(one.sum())
        product *= np.fft.fft(one / one.sum(), length) ** n
    return float(np.fft.ifft(product).real[batch]) * math.exp(log_scale)


def _log_binomial(n: int, chance: float, up_to: int) -> np.ndarray:
    """Returns the logarithms of the probabilities of 0 to `up_to` successes in `n` trials."""
    k = np.arange(1, min(n, up_to) + 1, dtype=float)
    ways = np.concatenate([[0.0], np.cumsum(np.log((n - k + 1) / k))])
    k = np.arange(len(ways))
    return ways + k * math.log(chance) + (n - k) * math.log1p(-chance)
