"""The runner of a session's edits: made when it is needed, and anew when its states do not hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ..data.tokenization import TokenizedTexts
from ..distributed.world import World
from ..hparams import LocFTBFHyperParams
from ..prefix.frozen_prefix import PrefixRecorder
from ..prefix.prepare import prepare_runner
from ..prefix.runner import TextRunner
from ..prefix.shortcuts import Shortcuts
from ..prefix.store import Budget
from ..prefix.streaming import FrozenStream
from ..utils.timing import timed
from .checkpoints import Checkpoints
from .preserve.confined_change import ConfinedChange
from .preserve.protection import Protection


@dataclass(eq=False)
class EditRunner:
    """What the runner of these edits is made of, and the runner once it is made.

    Attributes:
        model: The model, in evaluation mode.
        texts: This process's edits as tokens.
        hparams: `row_tokens`, `eval_batch_size`, `prefix_cut`.
        shortcuts: What leaves the model's logits as they are.
        budget: Where the recorded states may lie.
        protection: The confined change whose constants are recorded as well, if there is one.
        kept: As for `prepare_runner`, like `stream` and `states`.
        progress: Show progress bars.
        runner: The runner, with its prefix recorded; `None` while there is none.
    """

    model: PreTrainedModel
    texts: TokenizedTexts
    hparams: LocFTBFHyperParams
    shortcuts: Shortcuts
    budget: Budget
    protection: Protection | None = None
    kept: tuple[str, Iterable[str]] | None = None
    stream: FrozenStream | None = None
    states: PrefixRecorder | None = None
    progress: bool = False
    runner: TextRunner | None = field(init=False, default=None)

    def prepare(self, checkpoints: Checkpoints | None) -> TextRunner:
        """Returns the runner, made unless it is there.

        Args:
            checkpoints: Those of the training, which note where the prefix ends.

        Raises:
            MemoryBudgetError, OutputError: As for `prepare_runner`.
        """
        if self.runner is not None:
            return self.runner
        h, shortcuts = self.hparams, self.shortcuts
        if self.protection is not None:
            shortcuts = self.protection.folded(shortcuts)
        noted = None if checkpoints is None else checkpoints.noted("cut")
        self.runner = runner = prepare_runner(
            self.model,
            self.texts,
            shortcuts,
            row_tokens=h.row_tokens,
            batch_size=h.eval_batch_size,
            budget=self.budget,
            # The budget's choice may be another one by now, and move the last bits.
            cut=noted or h.prefix_cut,
            kept=self.kept,
            stream=self.stream,
            states=self.states,
            progress=self.progress,
        )
        if checkpoints is not None:
            checkpoints.notes.update(self._how_it_runs(runner))
        return runner

    def complete_runner(self, world: World, timings: dict[str, float]) -> TextRunner:
        """Returns the runner with its prefix complete, made first if a checkpoint made it needless.

        Args:
            world: The processes that train together.
            timings: Seconds by phase; gets `prefix`.
        """
        runner = self.prepare(None)
        if runner.prefix is not None and not runner.replays:
            with world.sharing_errors(), timed(timings, "prefix", self.model):
                runner.prefix.ensure()
        return runner

    def confined_(self) -> ConfinedChange | None:
        """Returns the confined change, at its beginning, on top of the present weights.

        Where these are others than before, the runner goes.
        """
        if self.protection is None:
            return None
        if not self.protection.begin_():
            if self.runner is not None and self.runner.prefix is not None:
                self.runner.prefix.close()
            self.runner = None
        return self.protection.change

    def how_it_ran(self, checkpoints: Checkpoints | None) -> Mapping[str, Any]:
        """Returns where the prefix ended, and whether rows were packed.

        Args:
            checkpoints: Those of the training; a finished one has made no runner, and noted it.
        """
        if self.runner is None:
            assert checkpoints is not None
            return checkpoints.notes
        return self._how_it_runs(self.runner)

    @staticmethod
    def _how_it_runs(runner: TextRunner) -> dict[str, Any]:
        cut = None if runner.prefix is None else runner.prefix.cut.kind
        return {"cut": cut, "packed": runner.packed}
