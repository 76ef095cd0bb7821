"""What a training is: whether a checkpoint belongs to the same model, edits and settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from ..data.tokenization import TokenizedTexts
from ..errors import RankError, one_message
from ..hparams import LocFTBFHyperParams
from ..modeling.devices import input_device
from ..modeling.places import Place
from ..utils.hashing import (
    arrays_sha256,
    checksum,
    configuration,
    dtype_name,
    json_sha256,
    sample_digest,
)
from ..utils.run_folder import differences_of
from .preserve.sources import Source

# Hyper-parameters that leave the bits of the result as they are, or that are told elsewhere: the
# model by its weights, the prefix by the cut that is noted.
_WITHOUT_EFFECT = frozenset(
    [
        "alg_name",
        "model_name",
        "device",
        "model_parallel",
        "fp16",
        "dtype",
        "max_length",
        "prefix_cut",
        "prefix_gpu_gib",
        "prefix_host_gib",
        "prefix_disk_gib",
        "prefix_dir",
        "preserve_dir",
        "augment_cache",
        "stream_frozen",
        "shard_frozen",
        "checkpoint_dir",
        "checkpoint_minutes",
        "health_check",
        "ledger_dir",
        "trust_remote_code",
        "evaluation_type",
        "api_key",
    ]
)


@dataclass(frozen=True)
class Identity:
    """What a training is.

    Attributes:
        model: Hashes of the model's configuration, its frozen weights (a sample of each; `None`
            for those that are on disk) and the original values of what is trained (all of them),
            and its precision.
        edits: Hash of the edits' tokens, and their number.
        settings: The hyper-parameters that have an effect on the result.
        surroundings: Versions, device and processes, which may move its last bits.
    """

    model: dict[str, str | None]
    edits: dict[str, Any]
    settings: dict[str, Any]
    surroundings: dict[str, Any]

    @classmethod
    def of_training(
        cls,
        model: Any,
        place: Place,
        texts: TokenizedTexts,
        hparams: LocFTBFHyperParams,
        n_processes: int = 1,
        sources: Sequence[Source] = (),
        around: Sequence[Any] = (),
    ) -> Identity:
        """Returns the identity of a training that is about to begin.

        Args:
            model: The model, with its original weights.
            place: What is trained.
            texts: All edits as tokens.
            hparams: The hyper-parameters.
            n_processes: Processes that train together.
            sources: What is to be preserved.
            around: Wordings and subjects of the edits, which it is measured with.
        """
        device = input_device(model)
        on_gpu = device.type == "cuda"
        return cls(
            model={
                "configuration": json_sha256([type(model).__name__, configuration(model)]),
                "precision": dtype_name(model.dtype),
                **_frozen(model, place),
                "weights to be trained": json_sha256(
                    [
                        [name, list(value.shape), checksum(value)]
                        for name, value in place.parameters.items()
                    ]
                ),
            },
            edits={
                "number of edits": len(texts),
                "edits": arrays_sha256(texts.ids, texts.offsets, texts.target_start),
            },
            settings=settings_of(hparams)
            | {f"preserve: {source.name}": source.digest() for source in sources}
            | ({"preserve: wordings and subjects": json_sha256(list(around))} if sources else {}),
            surroundings={
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
                "threads": None if on_gpu else torch.get_num_threads(),
                "processes": n_processes,
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Identity:
        """Returns what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: It is not of that form.
        """
        return cls(**{f.name: dict(values[f.name]) for f in dataclasses.fields(cls)})

    def differences(self, other: Identity) -> list[str]:
        """Returns a line for everything in which `other`, which was found, is another training."""
        lines = []
        for name, value in self.model.items():
            unknown = value is None or (name in other.model and other.model[name] is None)
            if not unknown and other.model.get(name) != value:
                named = f" ({other.model.get(name)}; now {value})" if name == "precision" else ""
                lines.append(f"the model's {name} is another{named}.")
        if other.edits != self.edits:
            n_now, n_found = (x.edits.get("number of edits") for x in (self, other))
            what = (
                f"{n_found} edits; now {n_now}"
                if n_now != n_found
                else "other edits, rewordings, or order"
            )
            lines.append(f"the edits are others ({what}).")
        return lines + differences_of(self.settings, other.settings)

    def changes_of_surroundings(self, other: Identity) -> list[str]:
        """Returns a line for each version or device that `other`, which was found, had not."""
        return [
            f"{key} was {other.surroundings.get(key)} and is {value}."
            for key, value in self.surroundings.items()
            if other.surroundings.get(key) != value
        ]


def check_agreed(identities: Sequence[Identity]) -> None:
    """Checks that all ranks are about to make the same edit.

    Args:
        identities: What each is about to make, by rank.

    Raises:
        RankError: They are not.
    """
    first, *others = identities
    for rank, other in enumerate(others, start=1):
        differences = first.differences(other)
        if differences:
            raise RankError(
                one_message(
                    f"Rank {rank} of {len(identities)} is about to make another edit than rank 0. "
                    "Start all of them with the same model, data and settings:",
                    differences,
                )
            )


def settings_of(hparams: LocFTBFHyperParams) -> dict[str, Any]:
    """Returns the hyper-parameters that have an effect on the result."""
    # What `alg_name` stands for, where nothing else is said.
    meant = {
        "forms": hparams.wrapped_forms,
        "preserve": hparams.preserved,
        "repairs": hparams.rounds_of_repair or None,
    }
    return {k: v for k, v in (hparams.to_dict() | meant).items() if k not in _WITHOUT_EFFECT}


def run_settings(
    hparams: LocFTBFHyperParams, requests: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns what tells one run from another, known before the model is loaded."""
    return {
        "model_name": str(hparams.to_dict()["model_name"]),
        "precision": hparams.dtype or ("float16" if hparams.fp16 else None),
        "number of requests": len(requests),
        "requests": json_sha256(list(requests)),
        **settings_of(hparams),
    }


def _frozen(model: nn.Module, place: Place) -> dict[str, str | None]:
    """Returns hashes of a sample of what is frozen: of what may be left on disk, and of the rest.

    What is on disk is not read: whether it is there may change from one run to the next.
    """
    lower = [] if place.stack is None else list(place.stack.layers[: place.first_layer or 0])
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    on_disk = {id(p) for module in (embedding, *lower) for p in module.parameters()}
    samples: dict[str, list[Any] | None] = {"lower layers": [], "upper layers": []}
    for name, parameter in model.named_parameters():
        part = "lower layers" if id(parameter) in on_disk else "upper layers"
        taken = samples[part]
        if parameter.is_meta:
            samples[part] = None
        elif taken is not None and name not in place.parameters:
            taken.append([name, sample_digest(parameter)])
    return {part: None if taken is None else json_sha256(taken) for part, taken in samples.items()}
