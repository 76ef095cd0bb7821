"""Whether edits fit a model: are they in there, could they be put in, and if neither, why not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import DeltaError, one_message
from ..utils.progress import progress_bar
from .edited_matrices import EditedMatrices
from .weights import Weights

# Other edits change a few parameters; of another model nearly all differ.
_FEW = 0.2
_PATIENCE = 2  # seconds before a progress bar shows


@dataclass
class Report:
    """How a model stands to an edit, as `Delta.verify` found it.

    Attributes:
        id: The edit.
        model: What it was compared with.
        fits_base: The edit can be applied: everything is as it was before it.
        fits_applied: The edit is in, and nothing else has changed: it can be reverted.
        differences: A line for each thing that is neither.
        unchecked: Parameters that could not be compared: left on disk, or quantized.
    """

    id: str
    model: str
    fits_base: bool
    fits_applied: bool
    differences: list[str] = field(default_factory=list)
    unchecked: int = 0

    @property
    def state(self) -> str:
        """`base`, `applied` or `neither`."""
        return "applied" if self.fits_applied else "base" if self.fits_base else "neither"


def compare(delta: EditedMatrices, weights: Weights) -> Report:
    """Returns how a model stands to an edit; see `Delta.verify`."""
    found: dict[str, set[str]] = {}
    differences, other_precision = [], set()
    for name, described in delta.matrices.items():
        kind = weights.kind(name)
        if isinstance(kind, str):
            differences.append(f"`{name}`: {kind}.")
        elif list(kind[1]) != described["shape"]:
            differences.append(
                f"`{name}` is {list(kind[1])} there and {described['shape']} in the edit: the base "
                "is another model."
            )
        elif kind[0] != described["dtype"]:
            other_precision.add((kind[0], described["dtype"]))
        else:
            present = weights.tensor_sha256(name)
            found[name] = {k for k in ("new", "original") if described[k] == present}
    for there, ours in sorted(other_precision):
        differences.append(
            f"The model is of another precision: {there}; the edit was made in {ours}. Load the "
            f"model with dtype={ours}."
        )
    if differences:
        return Report(delta.id, weights.label, False, False, differences)
    others, unchecked = _other_parameters(delta, weights)
    fits_base, fits_applied = (
        not others and all(kind in kinds for kinds in found.values())
        for kind in ("original", "new")
    )
    differences = [*_of_matrices(found), *others]
    return Report(delta.id, weights.label, fits_base, fits_applied, differences, unchecked)


def _of_matrices(found: Mapping[str, set[str]]) -> list[str]:
    strange = [name for name, kinds in found.items() if not kinds]
    if strange:
        return [
            f"{_some(strange)}: neither the values before the edit nor those after it. Another "
            "edit is in there, or the base is another model."
        ]
    for kind in ("new", "original"):
        if all(kind in kinds for kinds in found.values()):
            return []
    edited = [name for name, kinds in found.items() if "new" in kinds]
    return [f"{_some(edited)}: the edited values; the edit's other matrices hold those before it."]


def _other_parameters(delta: EditedMatrices, weights: Weights) -> tuple[list[str], int]:
    """Returns lines on the parameters that the edit leaves alone, and how many went unseen."""
    frozen, names = delta.metadata["frozen"], weights.names_beside(delta.matrices)
    lacking = sorted(set(frozen) - names)
    added = sorted(names - set(frozen))
    lines = []
    if lacking:
        lines.append(f"{_some(lacking)}: not in the model. The base is another one.")
    if added:
        lines.append(f"{_some(added)}: not in the model that was edited. The base is another one.")
    present = [name for name in frozen if name in names]
    bar = progress_bar(present, desc="comparing parameters", delay=_PATIENCE, leave=False)
    samples = {name: weights.samples(name) for name in bar}
    unchecked = [n for n, found in samples.items() if frozen[n] is None or not found]
    checked = [name for name in samples if name not in set(unchecked)]
    changed = [name for name in checked if frozen[name] not in samples[name]]
    if changed:
        one = len(changed) <= max(1, _FEW * len(checked))
        reason = (
            "An edit is missing there, or lies in between or on top"
            if one
            else "The base is another model, or of another precision"
        )
        lines.append(
            f"{_some(changed)}: {len(changed)} of {len(checked)} other parameters are not as in "
            f"the model that was edited. {reason}."
        )
    return lines, len(unchecked)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more


def values_after(
    deltas: Iterable[EditedMatrices], weights: Weights, *, reverted: bool = False
) -> dict[str, torch.Tensor]:
    """Returns what a model's parameters hold once edits are applied, or reverted, in this order.

    Each edit is compared with what it finds when its turn comes; `weights` hold the edits
    afterwards, the model itself is not changed.

    Args:
        deltas: The edits.
        weights: The model's parameters.
        reverted: Take the edits out; the one that was applied last comes first.

    Raises:
        DeltaError: There is no edit, one does not fit what is there when its turn comes, or one
            that is to be reverted was saved without what it replaced.
    """
    values: dict[str, torch.Tensor] = {}
    for delta in deltas:
        report = compare(delta, weights)
        if not (report.fits_applied if reverted else report.fits_base):
            raise DeltaError(_refusal(delta, report, reverted))
        if reverted and not delta.original:
            raise DeltaError(
                f"Edit {delta.short_id} was saved without the values that it replaced. Take them "
                f"from its base ({delta.metadata['base_model']}) with `base=FOLDER`."
            )
        kind, after = ("original", delta.original) if reverted else ("new", delta.new)
        weights.put(after, {name: described[kind] for name, described in delta.matrices.items()})
        # What comes last is written last: a fused parameter, or after it one of its slices.
        values = {name: value for name, value in values.items() if name not in after} | after
    if not values:
        raise DeltaError("No edit was given. Give at least one.")
    return values


def _refusal(delta: EditedMatrices, report: Report, reverted: bool) -> str:
    what = "taken out of" if reverted else "applied to"
    title = f"Edit {delta.short_id} cannot be {what} {report.model}:"
    if reverted and report.state == "base":
        return f"{title} it is not in there: the model is as before the edit."
    if not reverted and report.state == "applied":
        return f"{title} it is already applied."
    remedy = (
        "Edits come out in the opposite order: revert later ones first."
        if reverted
        else "Give the model that the edit was trained on, or first apply what was in it."
    )
    return one_message(title, [*report.differences, remedy])
