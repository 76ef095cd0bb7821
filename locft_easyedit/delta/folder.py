"""Edits put into, or taken out of, a model's folder: a new folder, whole or not at all."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import DeltaError, LocFTError, ModelError, OutputError, one_message
from ..modeling.loading import load_causal_lm, model_without_weights
from ..modeling.parameter_slices import parameters_named, slice_index, split_name, whole_name
from ..training.trained_weights import write_
from ..utils.files import new_folder, output_errors
from ..utils.hashing import dtype_name, tensor_sha256
from .edited_matrices import EditedMatrices
from .verify import Report, compare, values_after
from .weights import ModelWeights, tied_names
from .weights_folder import (
    Checkpoint,
    CheckpointWeights,
    copy_others,
    read_checkpoint,
    write_checkpoint,
)

logger = logging.getLogger(__name__)

Edited = TypeVar("Edited", bound=EditedMatrices)


def write_changed_folder(
    deltas: Sequence[EditedMatrices],
    model: str | Path,
    output: str | Path,
    *,
    reverted: bool = False,
    trust_remote_code: bool = False,
) -> bool:
    """Writes the model in a folder, with edits put into it or taken out, to another folder.

    Args:
        deltas: The edits, in the order in which they were made; to take them out, the last one
            comes first.
        model: The folder of the model.
        output: A folder that does not exist or is empty.
        reverted: Take the edits out.
        trust_remote_code: Allow the model's own code, where it has to be loaded.

    Returns:
        Whether the model had to be loaded (see `Delta.apply_to_folder`).

    Raises:
        DeltaError: There is no edit, or one does not fit; nothing was written.
        ModelError: `model` cannot be used.
        OutputError: `output` holds something or cannot be written.
    """
    if not deltas:
        raise DeltaError("No edit was given. Give at least one.")
    ids = [delta.id for delta in deltas]
    twice = next((d for i, d in enumerate(deltas) if d.id in ids[:i]), None)
    if twice is not None:
        raise DeltaError(f"Edit {twice.short_id} is given twice. Name each edit once.")
    check_output(model, output)
    checkpoint = read_checkpoint(model)
    for name in checkpoint.left_out:
        logger.warning("%s is left out: it holds weights without the change.", name)
    direct = weights_in_place(deltas, checkpoint, trust_remote_code=trust_remote_code)
    with output_errors(output), new_folder(output) as folder:
        if direct is not None:
            values = values_after(deltas, direct, reverted=reverted)
            write_checkpoint(checkpoint, values, folder)
        else:
            loaded: Any = _loaded(deltas[0], model, trust_remote_code)
            values = values_after(deltas, ModelWeights(loaded, model), reverted=reverted)
            write_(parameters_named(loaded, values), values)
            loaded.save_pretrained(folder)
            copy_others(checkpoint, folder)
    return direct is None


def check_output(model: str | Path, output: str | Path) -> None:
    """Checks that nothing will be written into the folder of the model that is read.

    Raises:
        OutputError: `output` is inside of `model`.
    """
    inside, folder = Path(output).expanduser().resolve(), Path(model).expanduser().resolve()
    if folder in inside.parents:
        raise OutputError(
            f"`output={output}` is inside of `model={model}`, which is never changed. Choose a "
            "folder outside of it."
        )


def compare_folder(
    delta: EditedMatrices, model: str | Path, *, trust_remote_code: bool = False
) -> Report:
    """Returns how the model in a folder stands to an edit; see `Delta.verify`.

    Raises:
        ModelError: The folder cannot be used.
    """
    checkpoint = read_checkpoint(model)
    direct = weights_in_place([delta], checkpoint, trust_remote_code=trust_remote_code)
    return compare(delta, direct or ModelWeights(_loaded(delta, model, trust_remote_code), model))


def with_originals(delta: Edited, base: Mapping[str, torch.Tensor] | str | Path) -> Edited:
    """Returns an edit with the values that it replaced, which come from elsewhere.

    Args:
        delta: The edit.
        base: The parameters of the model before the edit, or the folder of that model.

    Raises:
        DeltaError: They are not the values that the edit replaced.
        ModelError: The folder cannot be used.
    """
    if not isinstance(base, Mapping):
        base = _originals_in(base, delta)
    values = {n: v.to(delta.new[n].dtype) for n in delta.new if (v := _held(base, n)) is not None}
    wrong = [
        f"`{name}` is not there, or not what the edit replaced (sha256 "
        f"{described['original'][:12]}...)."
        for name, described in delta.matrices.items()
        if name not in values or tensor_sha256(values[name]) != described["original"]
    ]
    if wrong:
        raise DeltaError(one_message(f"The base of edit {delta.short_id} is another one:", wrong))
    return replace(delta, original=values)


def _held(base: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """Returns a parameter or a slice of one; `None` if it is not there."""
    whole, expert = split_name(name)
    if name in base or whole not in base or expert is None:
        return base.get(name)
    index = slice_index(expert, base[whole].shape)
    return None if index is None else base[whole][index]


def _originals_in(base: str | Path, delta: EditedMatrices) -> dict[str, torch.Tensor]:
    """Returns the matrices of a model's folder that are of the kinds that an edit replaced."""
    checkpoint = read_checkpoint(base)
    weights = CheckpointWeights(checkpoint)
    return {
        name: weights.tensor(name)
        for name, described in delta.matrices.items()
        if weights.kind(name) == (described["dtype"], tuple(described["shape"]))
    }


def values_beside(
    delta: EditedMatrices, model: str | Path, *, trust_remote_code: bool = False
) -> dict[str, torch.Tensor]:
    """Returns what the modules of edited parameters hold besides: a bias beside its weight.

    Raises:
        ModelError: The model's folder cannot be used.
    """
    checkpoint = read_checkpoint(model)
    skeleton = skeleton_of(model, trust_remote_code)
    modules = {name.rpartition(".")[0] for name in delta.new}
    names = {
        f"{module}.{own}"
        for module in modules
        for own in skeleton.get_submodule(module).state_dict()
    } - set(delta.new)
    direct = weights_in_place([delta], checkpoint, trust_remote_code=trust_remote_code)
    if direct is not None and names <= set(checkpoint.places):
        return {name: direct.tensor(name) for name in sorted(names)}
    loaded = _loaded(delta, model, trust_remote_code).state_dict() if names else {}
    return {name: loaded[name] for name in sorted(names)}


def weights_in_place(
    deltas: Iterable[EditedMatrices], checkpoint: Checkpoint, *, trust_remote_code: bool = False
) -> CheckpointWeights | None:
    """Returns the weights of a checkpoint whose files an edit can be written into as they are.

    They hold every parameter of the model under its own name, and the edited ones in the edit's
    precision; `None` if they do not.
    """
    if not checkpoint.shards:
        return None
    try:
        skeleton = skeleton_of(checkpoint.folder, trust_remote_code)
    except LocFTError as error:
        logger.debug("%s cannot be built without weights: %s", checkpoint.folder, error)
        return None
    names = {name for name, _ in skeleton.named_parameters()}
    weights = CheckpointWeights(checkpoint, names)
    edited = {
        whole_name(n): m["dtype"]
        for delta in deltas
        for n, m in delta.matrices.items()
        if whole_name(n) in names
    }
    # What is tied is for the loaded model to refuse: a checkpoint does not know of it.
    tied = tied_names(skeleton)
    held = names <= set(checkpoint.places)
    same = held and all(weights.kind(n)[0] == d and n not in tied for n, d in edited.items())
    return weights if same else None


def skeleton_of(folder: str | Path, trust_remote_code: bool) -> nn.Module:
    """Returns the model of a folder without its weights."""
    return model_without_weights(_whole_path(folder), trust_remote_code=trust_remote_code)


def _whole_path(folder: str | Path) -> str:
    """Returns a folder's path as nothing that the hub could know."""
    return str(Path(folder).expanduser().resolve())


def _loaded(delta: EditedMatrices, model: str | Path, trust_remote_code: bool) -> nn.Module:
    """Returns the model of a folder in an edit's precision, in the host's memory."""
    try:
        return load_causal_lm(
            _whole_path(model),
            device="cpu",
            dtype=delta.dtype,
            trust_remote_code=trust_remote_code,
        )[0]
    except LocFTError as error:
        raise ModelError(
            f"Edit {delta.short_id} names parameters that `{model}` does not hold in "
            f"{dtype_name(delta.dtype)}, and it cannot be loaded to look further: {error}"
        ) from error
