"""`layers: auto`: a place, and where asked a rate, chosen with a few of the edits themselves.

Two steps, which together take at most a tenth of a run of 3,000 edits (see `Costs`): one backward
pass ranks all places by what a step there would teach (see `sensitivity`); the best few, from
different modules and depths, are tried with a few edits and epochs, and the best of those again for
longer. What counts is `score`: the edits, their rewordings by template, and the drift on unrelated
text. Of a request only its prompt and its target are looked at.

What it loses against location studies of two models on two data sets stands in
`docs/results.md` (`benchmarks/checks/auto.py` measures it).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.requests import Edit
from ..data.tokenization import TokenizedTexts
from ..distributed.world import World
from ..errors import ModelError, NonFiniteLossError, RequestError
from ..hparams import LocFTBFHyperParams
from ..hparams_rules import AUTO
from ..modeling.locations import Location
from ..modeling.places import Place, find_layers, match_parameters
from ..training.choice import Cell, Choice, TrialScores, TriedPlace, keep_choice, kept_choice
from ..training.identity import Identity
from ..utils.progress import progress_bar
from .candidates import Costs, candidates, diverse
from .experts import fused_locations, promising_experts
from .sensitivity import of_place, sensitivities
from .trial import Trials

logger = logging.getLogger(__name__)

FEWEST_EDITS = 8
MOST_EDITS = 20
_BATCH = 10
_SEED = 0
# Places that are tried, and for how many epochs.
_PLACES = (6, 10)
# With `lr: auto` fewer, and the best of them again with its rate times these, for longer: what
# learns fast looks better in a short trial than it is.
_PLACES_FIRST, _RATES = (4, 8), ((1.0, 0.5), 15)
# The first of them is tried with rates so many times as high while it learns less than this (the
# edits' mean probability).
_RAISE, _MOST_RAISES, _LEARNED = 3.0, 2, 0.5
# A rate over the root mean square of a matrix's numbers. That of the down-projections of
# SmolLM2-135M is 0.2 and 3e-3 suits them; several matrices at once want less each.
_RATE = 0.015


def check_enough(n_edits: int) -> None:
    """Checks that there are enough edits to choose a place with.

    Raises:
        RequestError: There are not.
    """
    if n_edits < FEWEST_EDITS:
        raise RequestError(
            f"`layers=auto` tries places with the edits themselves and needs {FEWEST_EDITS} "
            f"distinct ones; there are {n_edits}. Name a layer and a module (`locft locate` finds "
            "them, with other edits of the kind), or give more edits at a time."
        )


def choose_place(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    hparams: LocFTBFHyperParams,
    *,
    progress: bool = True,
) -> Choice:
    """Returns a place for these edits; the model is, bit for bit, as before.

    The same edits, model and settings give the same choice.

    Args:
        model: The model, not edited.
        tokenizer: Its tokenizer.
        edits: The distinct edits to be made; a sample of them is used.
        hparams: `layers` is `auto`; what else is `auto` is chosen as well.
        progress: Show a progress bar.

    Raises:
        RequestError: There are fewer edits than it takes.
        PlaceError: No place can be trained.
        ModelError: The model's layers cannot be found, or are not all loaded.
        NonFiniteLossError: Training diverged at every place.
    """
    start = time.perf_counter()
    screen = _Screen(model, tokenizer, edits, hparams)
    best = screen.best(progress)
    n_places, n_edits = len(screen.promises), len(screen.trials.edits)
    choice = Choice(best.cell, tuple(screen.tried), n_places, n_edits, time.perf_counter() - start)
    logger.info(
        "`layers=auto` chose %s (%s) with lr=%g among %d places, %d of them tried, in %.0f s.",
        best.cell.location,
        best.cell.location.rewrite_module_tmp,
        best.cell.lr,
        n_places,
        len({one.cell.location for one in screen.tried}),
        choice.seconds,
    )
    return choice


def promises_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    hparams: LocFTBFHyperParams,
) -> dict[Location, float | None]:
    """Returns what one backward pass says of each place (see `sensitivity`), for these edits.

    The larger, the more is taught for the same drift; `None` where nothing is known. Arguments and
    errors are those of `choose_place`.
    """
    return _Screen(model, tokenizer, edits, hparams).promises


class _Screen:
    """The places in question, what is known of them, and what it has cost.

    Attributes:
        trials: A sample of the edits to tell the places apart with.
        promises: What one backward pass says of each place.
        tried: What was tried.
        scale: Of all rates that are not given.
        spent: The work done so far, as `Costs` counts it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[Edit],
        hparams: LocFTBFHyperParams,
    ) -> None:
        check_enough(len(edits))
        stack = find_layers(model)
        if stack is None or any(parameter.is_meta for parameter in model.parameters()):
            raise ModelError(
                f"`layers=auto` needs all of {type(model).__name__}'s layers, in one list and "
                "loaded. Name a layer and a module."
            )
        self.model, self.stack, self.hparams = model, stack, hparams
        locations = candidates(model, stack, hparams)
        order = np.random.default_rng(_SEED).permutation(len(edits))[:MOST_EDITS]
        sample = [edits[i] for i in sorted(order.tolist())]
        # As many steps an epoch as a sample allows, never larger ones than those of the run.
        batch_size = min(_BATCH, hparams.of_edits(len(edits)).batch_size)
        t = Trials(model, tokenizer, sample, hparams, batch_size)
        self.trials = t
        self.tried: list[TriedPlace] = []
        self.scale = 1.0
        self.costs = Costs.estimate(model, stack, t.own, t.rewordings, t.text, t.batch_size)
        self.spent = self.costs.sensitivities()
        figures = sensitivities(
            model, stack, t.own, t.rewordings, t.text,
            packed=t.packed, row_tokens=hparams.row_tokens,
        )  # fmt: skip
        self.promises: dict[Location, float | None] = {}
        for location in locations:
            names = [name for name, p in self._parameters(location).items() if p.ndim > 1]
            found = of_place(figures, names)
            self.promises[location] = None if found is None else found.promise
        if hparams.rewrite_module_tmp == AUTO:  # LoRA's locations are none of fused experts
            self.promises |= promising_experts(figures, fused_locations(model, locations))

    def best(self, progress: bool) -> TriedPlace:
        """Returns the best of what was tried, or the most promising if there is no room for trials.

        Raises:
            NonFiniteLossError: Nothing that was tried could be trained.
        """
        factors, longer = _RATES if self.hparams.lr == AUTO else ((), 0)
        n_places, epochs = _PLACES_FIRST if factors else _PLACES
        first = diverse(self.promises, n_places, len(self.stack.layers))
        with progress_bar(
            total=len(first) + len(factors),
            desc="choosing the place",
            unit="trial",
            show=progress,
        ) as bar:
            if factors:
                self._calibrate(first[0], epochs, bar)
            cells = [
                Cell(location, self._rate(location))
                for location in first
                if location not in {one.cell.location for one in self.tried}
            ]
            self._round(cells, epochs, bar, kept_back=(len(factors), longer))
            if not self.tried:
                return TriedPlace(cells[0], self.promises[first[0]], 0, TrialScores())
            learned = [one for one in self.tried if not math.isnan(one.found.drift)]
            if not learned:
                raise NonFiniteLossError(
                    f"`layers=auto`: training diverged at all of {len(self.tried)} places that "
                    f"were tried. Lower `lr={self.hparams.lr}`."
                )
            best = min(learned, key=_worse)
            again = [
                Cell(best.cell.location, _rounded(best.cell.lr * factor)) for factor in factors
            ]
            return next(iter(self._round(again, longer, bar)), best)

    def _calibrate(self, location: Location, epochs: int, bar: tqdm) -> None:
        """Raises all rates as long as one place, tried with them, learns too little.

        How large a rate a model's weights take beside their size differs from model to model
        several times over; from place to place within one it differs little.
        """
        found: dict[float, TrialScores] = {}
        for raised in range(1 + _MOST_RAISES):
            self.scale = _RAISE**raised
            bar.total = (bar.total or 0) + bool(raised)
            self._round([Cell(location, self._rate(location))], epochs, bar)
            if len(self.tried) == len(found):
                break  # no room
            found[self.scale] = self.tried[-1].found
            if math.isnan(self.tried[-1].found.drift) or found[self.scale].reliability >= _LEARNED:
                break
        if found:
            self.scale = max(found, key=lambda scale: found[scale].score)

    def _round(
        self,
        cells: Sequence[Cell],
        epochs: int,
        bar: tqdm,
        *,
        kept_back: tuple[int, int] = (0, 0),
    ) -> list[TriedPlace]:
        """Tries cells as far as the budget goes; returns those that were learned, best first.

        What is spent never exceeds the allowance of the best place so far, nor that of the one to
        be tried: whichever is chosen, the choice took no more than its share. `kept_back` is the
        trials of the next round for which room is left, and their epochs.
        """
        h = self.hparams
        done: list[TriedPlace] = []
        best: TriedPlace | None = None
        n_later, epochs_later = kept_back
        for cell in cells:
            layers = [cell.location.layer] + ([] if best is None else [best.cell.location.layer])
            room = min(self.costs.allowance(layer, h.num_steps) for layer in layers)
            cost = self.costs.trial(layers[0], min(epochs, h.num_steps))
            later = n_later * self.costs.trial(layers[0], min(epochs_later, h.num_steps))
            # Two places are tried before anything is kept back.
            if self.spent + cost + (later if len(self.tried) + len(done) > 1 else 0) > room:
                logger.info("%s is not tried: the choice would take more than its share.", cell.key)
                continue
            self.spent += cost
            one = TriedPlace(
                cell, self.promises[cell.location], epochs, self.trials.run(cell, epochs)
            )
            logger.info("%s, %d epochs: %s", cell.key, epochs, one.found)
            done.append(one)
            best = one if best is None else min(best, one, key=_worse)
            bar.update()
        self.tried += done
        learned = [one for one in done if not math.isnan(one.found.drift)]
        return sorted(learned, key=_worse)

    def _parameters(self, location: Location) -> dict[str, torch.nn.Parameter]:
        return match_parameters(self.model, [location.layer], location.templates)

    def _rate(self, location: Location) -> float:
        """Returns the rate that is given, or one that suits the size of a place's numbers."""
        if self.hparams.lr != AUTO:
            return float(self.hparams.lr)
        matrices = [p for p in self._parameters(location).values() if p.ndim > 1]
        squares = sum(float(p.detach().float().square().sum()) for p in matrices)
        mean = squares / max(1, sum(p.numel() for p in matrices))
        return _rounded(self.scale * _RATE * math.sqrt(mean) / math.sqrt(max(1, len(matrices))))


def _worse(one: TriedPlace) -> tuple[float, float]:
    """Returns what is less for a better trial."""
    return -one.found.score, one.found.drift


def _rounded(rate: float) -> float:
    """Returns a rate to two digits."""
    return float(f"{rate:.1e}") if rate > 0 else 1e-4


def choose_once(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    texts: TokenizedTexts,
    hparams: LocFTBFHyperParams,
    folder: str | None,
    *,
    world: World,
    progress: bool = True,
) -> Choice:
    """Returns the place for these edits, which rank 0 chooses for all (see `choose_place`).

    In `folder` an interrupted run finds its choice again; it was made for the same `texts`, which
    are what is trained, as tokens. `None` keeps none.

    Raises:
        LocFTError: As for `choose_place` and `kept_choice`, here or on rank 0.
    """

    def choose() -> Choice:
        if folder is None:
            return choose_place(model, tokenizer, edits, hparams, progress=progress)
        identity = Identity.of_training(model, Place({}, None, None), texts, hparams)
        kept = kept_choice(folder, identity)
        if kept is not None:
            return kept
        choice = choose_place(model, tokenizer, edits, hparams, progress=progress)
        keep_choice(folder, identity, choice)
        return choice

    return world.broadcast_from_main(choose)
