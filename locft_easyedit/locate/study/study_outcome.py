"""What a location study finds: a dictionary of figures for each cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ...modeling.locations import Location
from ...training.choice import Cell

OK, DIVERGED, OUT_OF_MEMORY, FAILED = "ok", "diverged", "out of memory", "failed"
STATES = (OK, DIVERGED, OUT_OF_MEMORY, FAILED)
# Figures of a cell; the first are always there, the others where the data has such prompts.
FIGURES = (
    "reliability",  # generated, on the edits' prompts
    "reworded",  # share of rewordings by template whose answer is the target, token by token
    "drift",  # KL of next-token distributions on unrelated text, nats a token
    "score",  # see score.py; of the three figures above, and nothing else
    "generalization",  # generated, on the data's rephrase prompts
    "locality",  # share of locality prompts whose generated answer is what it was
    "portability",
    "rewrite_acc",  # EasyEdit's
    "rephrase_acc",
    "locality_acc",
    "capability",  # mean over the tasks asked for
)
LESS_IS_BETTER = ("drift",)


@dataclass(frozen=True)
class CellOutcome:
    """What a cell found.

    Attributes:
        cell: The place and the learning rate.
        state: One of `STATES`.
        reason: Why it is not `ok`; else empty.
        figures: Some of `FIGURES`; empty where the state is not `ok`.
        epochs: Passes over the edits.
        converged: Whether training ended below the threshold.
        seconds: Seconds by phase: `training`, `metrics`.
        parameters: Numbers that were trained.
    """

    cell: Cell
    state: str = OK
    reason: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    epochs: int = 0
    converged: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    parameters: int = 0

    @property
    def merit(self) -> tuple[float, float]:
        """What a cell with figures is chosen by: the larger, the better."""
        return self.figures["score"], -self.figures["drift"]

    def to_dict(self) -> dict[str, Any]:
        """Returns the outcome ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CellOutcome:
        """Returns the outcome that `to_dict` gave.

        Raises:
            KeyError: Something is missing.
        """
        own = {f.name: values[f.name] for f in fields(cls)}
        return cls(**{**own, "cell": Cell.from_dict(own["cell"])})


@dataclass(frozen=True)
class StudyOutcome:
    """What a study found, so far.

    Attributes:
        model: The model's name.
        data: The data file's name.
        n: Edits a cell.
        cells: The cells that are done.
        n_cells: Cells of the whole study.
        before: The model's figures before any edit (`reliability`, `generalization`, ...).
        planned: All cells of the study, done or not.
    """

    model: str
    data: str
    n: int
    cells: Sequence[CellOutcome]
    n_cells: int
    before: Mapping[str, float] = field(default_factory=dict)
    planned: Sequence[Cell] = ()

    @property
    def measured(self) -> list[CellOutcome]:
        """The cells that have figures."""
        return [cell for cell in self.cells if cell.state == OK]

    def best_rates(self) -> list[CellOutcome]:
        """Returns each place's cell with the best score, by layer and module.

        Of equals the one with less drift, then the smaller rate: the order in which cells were
        done plays no part.
        """
        best: dict[Location, CellOutcome] = {}
        for one in sorted(self.measured, key=lambda one: one.cell.rank):
            former = best.get(one.cell.location)
            if former is None or one.merit > former.merit:
                best[one.cell.location] = one
        return list(best.values())

    def marked(self) -> list[CellOutcome]:
        """Returns the cells that are done and have no figures, by layer, module and rate."""
        marked = [one for one in self.cells if one.state != OK]
        return sorted(marked, key=lambda one: one.cell.rank)

    def chosen(self) -> CellOutcome | None:
        """Returns the cell with the best score; the evaluation's prompts play no part in it.

        Of equals the one with less drift, then the first by layer, module and rate. `None` if no
        cell has figures.
        """
        return max(self.best_rates(), key=lambda one: one.merit, default=None)
