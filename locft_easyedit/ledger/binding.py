"""What a ledger is bound to: a base model, its tokenizer and the settings; another is refused."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..delta.metadata import frozen_samples
from ..distributed.world import World
from ..errors import HyperParamsError, LedgerError, one_message
from ..hparams import LocFTBFHyperParams, given_values
from ..hparams_rules import BREADTH_FIRST, DEPTH_FIRST
from ..modeling.device_map import left_on_disk
from ..modeling.devices import input_device
from ..modeling.fsdp import sharded_layers
from ..modeling.parameter_slices import whole_name
from ..prefix.streaming import samples_on_disk, stream_of
from ..training.identity import settings_of
from ..utils.hashing import configuration, dtype_name, json_sha256
from ..utils.run_folder import differences_of
from .log import FORMAT, Event

# What the backend of a fast tokenizer holds of the last call to it.
_OF_THE_CALL = ("padding", "truncation")
_MOST_NAMED = 3
_SHARDED = (
    "all processes have to take part whenever a shared layer runs, and they check their facts, and "
    "ask for answers, in unequal numbers of passes. Set `shard_frozen: false`; layers below the "
    "place can be left on disk (`stream_frozen: true`)."
)
_REPAIRED = (
    "facts that are lost would stay lost. Leave it out, or give the rounds of repair that there "
    "may be."
)
_COMPILED = (
    "what a ledger holds is made anew to the bit, and code that is compiled another time may round "
    "otherwise. Set `compile_layers: false`."
)
_PRESERVED = (
    "what is preserved is measured in the whole model. Set `stream_frozen: false`, on a device "
    "that holds it, or `preserve: []` in another ledger."
)


def binding_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, hparams: LocFTBFHyperParams
) -> dict[str, Any]:
    """Returns what the first event of a ledger says: what tells this model from others.

    Args:
        model: The base model, without an edit.
        tokenizer: Its tokenizer.
        hparams: The settings.
    """
    return {
        "format": FORMAT,
        "model": {
            "configuration": json_sha256([type(model).__name__, configuration(model)]),
            "precision": dtype_name(model.dtype),
            "tokenizer": tokenizer_digest(tokenizer),
        },
        "parameters": _samples(model, ()),
        "hparams": hparams.to_dict(),
    }


def hparams_of(init: Event) -> LocFTBFHyperParams:
    """Returns the settings that a ledger is bound to.

    Raises:
        LocFTError: This version does not know them.
    """
    values = init.said["hparams"]
    unknown = set(values) - {field.name for field in fields(LocFTBFHyperParams)}
    if unknown:
        raise LedgerError(
            f"The ledger was made with `{sorted(unknown)[0]}`, which this version does not know. "
            "Update locft_easyedit."
        )
    # A null of another version may stand for what is a number by now.
    return LocFTBFHyperParams(**given_values(values))


def check_supported(hparams: LocFTBFHyperParams) -> None:
    """Checks, before a model is loaded, that a ledger can be kept with these settings.

    Raises:
        LedgerError: Lists what a ledger cannot do.
    """
    problems = []
    if hparams.pipeline == DEPTH_FIRST:
        problems.append(f"`pipeline={DEPTH_FIRST}`: facts are trained {BREADTH_FIRST}. Set that.")
    if hparams.shard_frozen:
        problems.append(f"`shard_frozen=True`: {_SHARDED}")
    if hparams.repairs == 0:
        problems.append(f"`repairs=0`: {_REPAIRED}")
    if hparams.compile_layers:
        problems.append(f"`compile_layers=True`: {_COMPILED}")
    if hparams.stream_frozen and hparams.preserved:
        problems.append(f"`stream_frozen=True` with `preserve`: {_PRESERVED}")
    _refuse(problems)


def check_loaded(
    model: PreTrainedModel, first_layer: int | None, hparams: LocFTBFHyperParams
) -> None:
    """Checks that a ledger can be kept of a model as it is loaded.

    Raises:
        LedgerError: Layers are shared out among processes, or what is to be preserved cannot be
            measured because frozen layers are on disk.
    """
    problems = []
    if sharded_layers(model) is not None:
        problems.append(f"layers are shared out among processes: {_SHARDED}")
    if hparams.preserved and stream_of(model, first_layer) is not None:
        problems.append(
            f"frozen layers are on disk (`stream_frozen`), with `preserve`: {_PRESERVED}"
        )
    _refuse(problems)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise LedgerError(one_message("A ledger cannot be kept so:", problems))


def check_same_model(
    init: Event,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trained: Collection[str] = (),
) -> None:
    """Checks that a model, apart from what the ledger trains, is the one it is bound to.

    Of each parameter 1,024 numbers are compared; none of a fused one of which an expert is trained.

    Args:
        init: The ledger's first event.
        model: The model.
        tokenizer: The tokenizer.
        trained: Names of the trained parameters.

    Raises:
        LedgerError: Lists what differs.
    """
    said = init.said
    now = {
        "configuration": json_sha256([type(model).__name__, configuration(model)]),
        "precision": dtype_name(model.dtype),
        "tokenizer": tokenizer_digest(tokenizer),
    }
    problems = []
    for key, value in now.items():
        if said["model"].get(key) != value:
            named = f": {said['model'].get(key)} there, now {value}" if key == "precision" else ""
            problems.append(f"the {key} is another{named}.")
    left_out = set(map(whole_name, trained))
    samples, there = _samples(model, left_out), dict(said["parameters"])
    for name in left_out:
        there.pop(name, None)
    other = sorted(name for name in {*samples, *there} if samples.get(name) != there.get(name))
    if other:
        more = f" and {len(other) - _MOST_NAMED} more" if len(other) > _MOST_NAMED else ""
        names = ", ".join(f"`{name}`" for name in other[:_MOST_NAMED])
        problems.append(f"{len(other)} of {len(there)} parameters are others: {names}{more}.")
    if problems:
        problems.append("Give the model that the ledger was made with, without edits of others.")
        raise LedgerError(one_message("The ledger is bound to another model:", problems))


def _samples(model: PreTrainedModel, trained: Collection[str]) -> dict[str, str | None]:
    """Returns a sample's hash of each parameter but the trained ones, on disk or in memory."""
    on_disk = {n: value for n, value in samples_on_disk(model).items() if n not in trained}
    return frozen_samples(model, trained) | on_disk


def check_same_settings(init: Event, hparams: LocFTBFHyperParams) -> None:
    """Checks that hyper-parameters that come from elsewhere are those of a ledger.

    Those that leave the result as it is (memory, folders) may be others.

    Raises:
        HyperParamsError: Lists what differs.
    """
    # A ledger repairs by itself, whatever `alg_name` stands for.
    given, there = (
        settings_of(one) | {"repairs": one.most_repairs} for one in (hparams, hparams_of(init))
    )
    lines = differences_of(given, there)
    if lines:
        raise HyperParamsError(
            one_message(
                "The ledger was made with other settings. Use these, or make another ledger:", lines
            )
        )


def surroundings(model: PreTrainedModel, world: World) -> dict[str, Any]:
    """Returns versions, devices and processes: elsewhere the last bits may be others."""
    device = input_device(model)
    on_gpu = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "threads": None if on_gpu else torch.get_num_threads(),
        "processes": world.size,
        "frozen_layers": "on disk" if left_on_disk(model) else "resident",
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of all that decides how a tokenizer turns texts into tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules: Mapping[str, Any] = json.loads(backend.to_str())
        rules = {key: value for key, value in rules.items() if key not in _OF_THE_CALL}
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return json_sha256([rules, special, getattr(tokenizer, "chat_template", None)])


def check_agreed(
    world: World, what: str, value: Any, remedy: str = "Start all of them with the same."
) -> None:
    """Checks that all processes have the same.

    Args:
        world: The processes.
        what: What it is, for the message.
        value: The value, of JSON's kinds.
        remedy: What is to be done where they have not.

    Raises:
        LedgerError: They have not; in all of them.
    """
    if len(set(world.all_gather(json_sha256(value)))) > 1:
        raise LedgerError(f"The {world.size} processes have other {what}. {remedy}")
