"""The single experts that a study visits: of each layer the most promising, once it is found."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...errors import HyperParamsError
from ...modeling.locations import Location
from ...training.choice import location_from
from ...utils.output import write_json
from ..auto import FEWEST_EDITS

logger = logging.getLogger(__name__)


@dataclass
class StudyExperts:
    """Which experts a study visits: told from the weights, by the first process that has them.

    Attributes:
        file: The study's file of them.
        sought: Layers and modules of which an expert is to be visited.
    """

    file: Path
    sought: Collection[tuple[int, str]]
    _found: list[Location] | None = field(init=False, default=None)

    @property
    def missing(self) -> bool:
        """Whether experts are to be visited, and it is not known yet which."""
        return bool(self.sought) and self._read() is None

    def visited(self) -> list[Location]:
        """Returns the places that are sought, as far as they are found."""
        found = self._read() if self.sought else None
        return [one for one in found or () if (one.layer, one.module) in self.sought]

    def keep(self, found: Sequence[Location]) -> None:
        """Keeps the most promising expert of each layer for all processes.

        Raises:
            OutputError: They cannot be written.
        """
        write_json(self.file, [asdict(one) for one in found])

    def _read(self) -> list[Location] | None:
        if self._found is None:
            try:
                values = json.loads(self.file.read_text(encoding="utf-8"))
                self._found = [location_from(value) for value in values]
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                return None
        return self._found


def enough_edits(n_edits: int, *, alone: bool) -> bool:
    """Returns whether the most promising experts can be told.

    Args:
        n_edits: How many distinct edits there are.
        alone: Nothing else is to be visited.

    Raises:
        HyperParamsError: There are too few for all that is to be visited.
    """
    if n_edits >= FEWEST_EDITS:
        return True
    why = f"which expert to try is told with {FEWEST_EDITS} distinct edits, and there are {n_edits}"
    if alone:
        raise HyperParamsError(
            f"`sweep_modules` names single experts alone: {why}. Give more edits, or name other "
            "modules."
        )
    logger.info("Single experts are left out: %s.", why)
    return False
