"""An edit as a value: the new matrices, the ones they replaced, and where they belong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..errors import DeltaError, one_message
from ..hashes import dtype_name, json_sha256, readable, sample_digest, tensor_sha256
from ..hparams import LocFTBFHyperParams
from ..requests import distinct_edits, with_leading_space
from ..result import EditResult
from .about import DTYPES, FORMAT, now, printable, problems_of, sealed, versions

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Delta:
    """An edit: what a model's matrices were, what they became, and how to tell that model.

    Make one with `Delta.of`, keep it with `save_delta`, get it back with `load_delta`.

    Attributes:
        new: The edited matrices by the names of the model's parameters.
        original: The values that they replaced; empty where these were left out.
        about: What the file's metadata say: `id`, `base_model` (for display), `matrices` (dtype,
            shape and hashes of each), `frozen` (a sample's hash of every other parameter),
            `requests`, `hparams`, `metrics`, `losses`, `versions`, `created`, `lora`.
        lora: For an edit that was trained as LoRA, the factors A, [R, in], and B, [out, R], of each
            matrix; its change is B A alpha / R.
    """

    new: dict[str, torch.Tensor]
    original: dict[str, torch.Tensor]
    about: dict[str, Any]
    lora: dict[str, Factors] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        result: EditResult,
        model: nn.Module,
        hparams: LocFTBFHyperParams,
        requests: Sequence[Mapping[str, Any]] | None = None,
        *,
        metrics: Mapping[str, Any] | None = None,
    ) -> Delta:
        """Returns an edit that was made.

        Args:
            result: What `edit_model` returned, with the factors of an edit that trained these.
            model: The model that was edited; whether the edit is in it plays no part.
            hparams: The hyper-parameters it was made with.
            requests: The requests that were trained; those of `result` if `None`.
            metrics: Figures to keep, such as `summarize` returns.

        Raises:
            DeltaError: The matrices cannot be kept: their names, types or numbers.
        """
        if requests is not None:
            policy = "last" if hparams.on_conflict == "last" else None
            edits = distinct_edits(requests, policy).edits
        else:
            edits = result.edits.edits
        matrices: dict[str, Any] = {
            name: {
                "dtype": dtype_name(new.dtype),
                "shape": list(new.shape),
                "new": tensor_sha256(new),
                "original": tensor_sha256(result.original[name]),
            }
            for name, new in result.new.items()
        }
        low_rank = result.lora
        factors: dict[str, Factors] = {}
        rank = None
        if low_rank is not None:
            factors = {name: (low_rank.a[name], low_rank.b[name]) for name in matrices}
            rank = {"rank": low_rank.rank, "alpha": float(low_rank.alpha)}
            for name, (a, b) in factors.items():
                matrices[name] |= {"lora_A": tensor_sha256(a), "lora_B": tensor_sha256(b)}
        about = {
            "format": FORMAT,
            "base_model": printable(str(hparams.to_dict()["model_name"])),
            "matrices": matrices,
            "frozen": frozen_samples(model, matrices),
            "lora": rank,
            "hparams": printable(hparams.to_dict()),
            "requests": requests_hash([(e.prompt, e.target) for e in edits]),
            "metrics": printable(metrics or {}),
            "losses": [float(loss) for loss in result.losses],
            "versions": versions(),
            "created": now(),
        }
        delta = cls(dict(result.new), dict(result.original), sealed(about), factors)
        delta.check()
        return delta

    @property
    def id(self) -> str:
        """The edit's name: a sha256 over all hashes."""
        return str(self.about["id"])

    @property
    def short_id(self) -> str:
        """The beginning of the id, for people."""
        return self.id[:12]

    @property
    def matrices(self) -> dict[str, Any]:
        """Of each matrix its `dtype`, `shape` and the hashes `new` and `original`."""
        return dict(self.about["matrices"])

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the model that was edited, as its first matrix has it."""
        return DTYPES[next(iter(self.about["matrices"].values()))["dtype"]]

    def without_originals(self) -> Delta:
        """Returns the edit without the values that it replaced: half the size, not undone alone."""
        return replace(self, original={})

    def with_originals(self, original: Mapping[str, torch.Tensor]) -> Delta:
        """Returns the edit with the values that it replaced, which come from elsewhere.

        Raises:
            DeltaError: They are not the values that it replaced.
        """
        values = {n: original[n].to(self.new[n].dtype) for n in self.new if n in original}
        wrong = [
            f"`{name}` is not there, or not what the edit replaced (sha256 "
            f"{described['original'][:12]}...)."
            for name, described in self.matrices.items()
            if name not in values or tensor_sha256(values[name]) != described["original"]
        ]
        if wrong:
            raise DeltaError(
                one_message(f"The base of edit {self.short_id} is another one:", wrong)
            )
        return replace(self, original=values)

    def check(self) -> None:
        """Checks what is said of the edit, and that its numbers are the ones described.

        Raises:
            DeltaError: Lists everything that is wrong.
        """
        problems = problems_of(self.about) or tensor_problems(self)
        if problems:
            raise DeltaError(one_message("The edit cannot be used:", problems))


def frozen_samples(model: nn.Module, edited: Mapping[str, Any]) -> dict[str, str | None]:
    """Returns a sample's hash of each parameter that an edit leaves alone.

    A parameter that is not here (left on disk, quantized) has `None`.
    """
    return {
        name: sample_digest(p) if readable(p) else None
        for name, p in model.named_parameters()
        if name not in edited
    }


def requests_hash(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Returns the sha256 and the number of (prompt, target) pairs; their order plays no part."""
    texts = sorted([prompt, with_leading_space(target)] for prompt, target in pairs)
    return {"sha256": json_sha256(texts), "count": len(texts)}


def tensor_problems(delta: Delta) -> list[str]:
    """Returns a line for each tensor that is not what `delta.about` says, or is not finite."""
    problems = []
    for name, described in delta.matrices.items():
        tensors = {"new": delta.new.get(name)}
        if delta.original:
            tensors["original"] = delta.original.get(name)
        if delta.about["lora"] is not None:
            tensors["lora_A"], tensors["lora_B"] = delta.lora.get(name, (None, None))
        for kind, tensor in tensors.items():
            problem = _problem(tensor, described, kind, delta.about["lora"])
            problems += [f"`{name}` ({kind}): {problem}"] if problem else []
    return problems


def _problem(tensor: torch.Tensor | None, described: Any, kind: str, lora: Any) -> str:
    if tensor is None:
        return "it is missing."
    if kind in ("new", "original"):
        if dtype_name(tensor.dtype) != described["dtype"] or list(tensor.shape) != list(
            described["shape"]
        ):
            return f"{dtype_name(tensor.dtype)} {list(tensor.shape)} is not what is described."
    elif not _is_factor(tensor, kind, described["shape"], lora["rank"]):
        return f"{list(tensor.shape)} is no factor of rank {lora['rank']}."
    if tensor_sha256(tensor) != described[kind]:
        return "its numbers are not the ones described: damaged, or tampered with."
    if not all(bool(torch.isfinite(part).all()) for part in tensor.flatten().split(2**24)):
        return "it holds values that are no finite numbers."
    return ""


def _is_factor(tensor: torch.Tensor, kind: str, shape: Sequence[int], rank: int) -> bool:
    """Returns whether a tensor is a low-rank factor; Conv1D has its matrix transposed."""
    if tensor.dim() != 2 or len(shape) != 2:
        return False
    side, other = (1, 0) if kind == "lora_A" else (0, 1)
    return tensor.shape[other] == rank and tensor.shape[side] in shape
