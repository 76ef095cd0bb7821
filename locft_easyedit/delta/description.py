"""An edit for people: tables for the terminal, and the same as a JSON value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rich.table import Table

from ..evaluation.report import metrics_table
from ..utils.tables import Row, terminal_table
from .edited_matrices import EditedMatrices


def description(delta: EditedMatrices) -> dict[str, Any]:
    """Returns what an edit's file says, and how much the edit changes; ready for JSON."""
    return {
        **delta.metadata,
        "originals": bool(delta.original),
        "bytes": sum(t.numel() * t.element_size() for t in delta.tensors().values()),
        "relative_change": {name: relative_change(delta, name) for name in delta.original},
    }


def relative_change(delta: EditedMatrices, name: str) -> float:
    """Returns ||new - original|| / ||original|| of a matrix (Frobenius norms, in float32)."""
    new, original = delta.new[name].float(), delta.original[name].float()
    return float(torch.linalg.norm(new - original) / torch.linalg.norm(original).clamp(min=1e-30))


def delta_tables(delta: EditedMatrices) -> list[Table]:
    """Returns tables of an edit: what it is, where it is, and its metrics if it has any."""
    said = description(delta)
    requests, losses, lora = said["requests"], said["losses"], said["lora"]
    said_of_it = {
        "id": delta.id,
        "base model (name only)": said["base_model"],
        "made": f"{said['created']} with "
        + ", ".join(f"{name} {value}" for name, value in said["versions"].items()),
        "edits": f"{requests['count']}; sha256 {requests['sha256']}",
        "training": f"{len(losses)} epochs" + (f", loss {losses[-1]:.4f}" if losses else ""),
        "low rank": f"rank {lora['rank']}, alpha {lora['alpha']:g}" if lora else "no",
        "undone": "with this file" if delta.original else "with the base model's folder",
        "size": f"{said['bytes'] / 2**20:.1f} MiB",
        "other parameters": f"{len(said['frozen'])} sampled",
    }
    overview = terminal_table(
        ["what", "value"],
        [Row([what, str(value)]) for what, value in said_of_it.items()],
        title=f"Edit {delta.short_id}",
        text_columns=2,
        header=False,
    )
    rows, hashes = [], []
    for name, described in said["matrices"].items():
        change = said["relative_change"].get(name)
        cells = [
            name,
            described["dtype"],
            " x ".join(map(str, described["shape"])),
            "-" if change is None else f"{100 * change:.2f} %",
        ]
        rows.append(Row(cells))
        hashes.append(Row([name, described["new"][:12], described["original"][:12]]))
    headings = ["name", "dtype", "shape", "change"]
    where = terminal_table(headings, rows, title="Matrices", whole_first=True)
    headings = ["name", "sha256 after", "sha256 before"]
    sums = terminal_table(headings, hashes, title="Their hashes", whole_first=True)
    metrics = {key: _numbers(said["metrics"].get(key)) for key in ("pre", "post")}
    return [overview, where, sums, *([metrics_table(metrics)] if metrics["post"] else [])]


def _numbers(value: Any) -> dict[str, Any]:
    """Returns the numbers in nested mappings, and nothing else that a file may hold there."""
    if not isinstance(value, Mapping):
        return {}
    return {
        key: _numbers(entry) if isinstance(entry, Mapping) else entry
        for key, entry in value.items()
        if isinstance(entry, (Mapping, int, float)) and not isinstance(entry, bool)
    }
