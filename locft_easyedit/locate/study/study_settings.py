"""What a location study is asked to do, checked: layers, modules, rates, and their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import HyperParamsError, PlaceError, one_message
from ...hparams import LocFTBFHyperParams
from ...hparams_rules import AUTO
from ...modeling.locations import MODULES, Location, select_locations
from ...modeling.places import check_low_rank, match_parameters

RATES = (0.1, 0.3, 1.0, 3.0)  # times the rate of the YAML
ANY_DEVICE = "auto"  # the study's own, or a GPU if there is one


@dataclass(frozen=True)
class StudySettings:
    """What a location study is asked to do.

    Attributes:
        hparams: Model and training; the place and the rate of these are replaced.
        data: A file with edits.
        n: Only the first n edits; all if `None`.
        layers: Layers to visit; all if `None`.
        every: Of these layers every so many, counted from the last.
        modules: Modules to visit (see `MODULES`); all that the model has if `None`.
        rates: Learning rates; `RATES` times that of `hparams` if `None`.
        text: A text file for the drift; the fixed text of the health check if `None`.
        capability: Tasks to measure in every cell.
        capability_limit: Items of a task at most.
        tasks_dir: Folder with tasks of the user's own.
        devices: A process on each of these works on cells; that of `hparams` alone if `None`.
        retry: Try cells again that diverged, ran out of memory or failed.
    """

    hparams: LocFTBFHyperParams
    data: str
    n: int | None = None
    layers: Sequence[int] | None = None
    every: int = 1
    modules: Sequence[str] | None = None
    rates: Sequence[float] | None = None
    text: str | None = None
    capability: Sequence[str] = ()
    capability_limit: int | None = None
    tasks_dir: str | None = None
    devices: Sequence[int | str] | None = None
    retry: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings ready for JSON."""
        return {**vars(self), "hparams": self.hparams.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StudySettings:
        """Returns the settings that `to_dict` gave."""
        hparams = LocFTBFHyperParams.from_mapping(values["hparams"], source="The study")
        return cls(**{**values, "hparams": hparams})


def coarse_to_fine(locations: Sequence[Location]) -> list[Location]:
    """Returns the places in an order that gives a picture of the whole model early.

    The middle layer comes first, then those half-way to the ends, and so on.
    """
    layers = sorted({location.layer for location in locations})
    order, waiting = [], [(0, len(layers))]
    while waiting:
        start, end = waiting.pop(0)
        if start < end:
            middle = (start + end) // 2
            order.append(layers[middle])
            waiting += [(start, middle), (middle + 1, end)]
    return sorted(locations, key=lambda one: (order.index(one.layer), MODULES.index(one.module)))


def visited(locations: Sequence[Location], settings: StudySettings) -> list[Location]:
    """Returns the places that a study visits.

    Raises:
        HyperParamsError: A layer or module is named that the model does not have.
    """
    there = sorted({one.layer for one in locations})
    modules = [m for m in MODULES if any(one.module == m for one in locations)]
    problems = []
    if settings.layers is not None and (bad := [i for i in settings.layers if i not in there]):
        problems.append(f"`sweep_layers`: {bad} is not among the layers 0 to {there[-1]}.")
    if settings.modules is not None and (odd := [m for m in settings.modules if m not in MODULES]):
        problems.append(f"`sweep_modules`: {odd} must be among {', '.join(MODULES)}.")
    elif settings.modules is not None and not set(settings.modules) & set(modules):
        problems.append(
            f"`sweep_modules={list(settings.modules)}`: this model has none of them, but "
            f"{', '.join(modules)}. Choose among these."
        )
    if problems:
        raise HyperParamsError(one_message("This study cannot be made:", problems))
    layers = sorted(settings.layers) if settings.layers is not None else there
    # From the last: late layers are where most models are edited.
    layers = layers[::-1][:: settings.every]
    return select_locations(locations, layers, settings.modules)


def has_low_rank(model: Any, location: Location, rank: int) -> bool:
    """Returns whether LoRA can change a place: all of it are matrices of linear layers."""
    try:
        parameters = match_parameters(model, [location.layer], location.templates)
        check_low_rank(model, parameters, rank)
    except PlaceError:
        return False
    return True


def problems_of(settings: StudySettings) -> list[str]:
    """Returns what is wrong with the settings, as far as they alone can tell."""
    h, found = settings.hparams, []
    if not isinstance(h.model_name, str):
        found.append("`model_name` must be a folder or hub name: each process loads the model.")
    for key in ("stream_frozen", "shard_frozen", "quantize_frozen"):
        if getattr(h, key):
            found.append(
                f"`{key}={getattr(h, key)!r}`: every layer of the model is trained in turn, so all "
                f"of it must be on the device. Leave `{key}` out, or locate in a smaller model of "
                "the family."
            )
    if settings.rates is not None and (
        not settings.rates or not all(0 < float(rate) < float("inf") for rate in settings.rates)
    ):
        found.append(f"`sweep_lrs={list(settings.rates)}` must be numbers above 0, at least one.")
    if settings.rates is None and h.lr == AUTO:
        found.append("`lr=auto`: a study has rates to try. Name them: sweep_lrs=[1e-4,3e-4,1e-3].")
    if settings.every < 1:
        found.append(f"`every={settings.every}` must be 1 or more.")
    for key, value in (("sweep_layers", settings.layers), ("sweep_modules", settings.modules)):
        if value is not None and not value:
            found.append(f"`{key}` is empty. Name at least one, or leave it out for all.")
    if settings.devices is not None and not settings.devices:
        found.append("`devices` is empty. Name at least one, or leave it out.")
    return found
