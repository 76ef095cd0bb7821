"""A model's folder: which files hold weights, and where in them each parameter lies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import DeltaError, ModelError, one_message
from ..modeling.parameter_slices import split_name
from ..utils.hashing import DTYPES as _BY_CODE
from ..utils.hashing import digest_of_sample, dtype_name, sample_positions
from ..utils.parsing import json_of, shown, text_of
from ..utils.progress import progress_bar
from .metadata import DTYPES
from .safetensors_header import Entry, opened, read_header, read_tensor
from .weights import Kind, Weights

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MOST_INDEX = 256 * 2**20
_PATIENCE = 2  # seconds before a progress bar shows
# Weights in another form: they would be those of the model before.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder.

    Attributes:
        folder: The folder.
        shards: The files with weights, by name; empty if these are not safetensors.
        places: For each parameter its shard and where it lies in it.
        others: The names of the files that belong to the model besides: configuration, tokenizer.
        left_out: The names of files that hold weights in another form.
    """

    folder: Path
    shards: dict[str, Path]
    places: dict[str, tuple[str, Entry]]
    others: dict[str, Path]
    left_out: list[str]

    def place_of(self, name: str) -> tuple[str, Entry]:
        """Returns the shard that a parameter lies in, and where; of a slice within its whole."""
        if name in self.places:
            return self.places[name]
        whole, expert = split_name(name)
        shard, entry = self.places[whole]
        size = entry.size // entry.shape[0]
        start = entry.start + int(expert or 0) * size
        return shard, Entry(entry.dtype, entry.shape[1:], start, size)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Returns what a model's folder holds, from the heads of its files.

    Links are followed within the folder, and to the `blobs` that the hub's cache keeps beside its
    snapshots; subfolders are left out.

    Raises:
        ModelError: It is no folder of a model, a part is missing or damaged, or a link leads
            elsewhere.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"`model={folder}` is no folder with a config.json. Give the folder of a model saved "
            "with `save_pretrained`, or its snapshot in the hub's cache."
        )
    files = _files(folder)
    shards = {name: files[name] for name in _shard_names(folder, files)}
    places: dict[str, tuple[str, Entry]] = {}
    try:
        for shard, path in shards.items():
            with opened(path) as file:
                entries, _ = read_header(file, path)
            places |= {name: (shard, entry) for name, entry in entries.items()}
    except DeltaError as error:
        raise ModelError(f"`model={folder}`: {error}") from error
    others = {n: p for n, p in files.items() if not n.endswith(_OTHER_WEIGHTS)}
    others = {n: p for n, p in others.items() if not n.endswith(".index.json")}
    left_out = sorted(set(files) - set(shards) - set(others) - {INDEX})
    return Checkpoint(folder, shards, places, others, left_out)


def _files(folder: Path) -> dict[str, Path]:
    """Returns the plain files in a folder by name, links resolved."""
    inside = folder.resolve()
    allowed = [inside, inside.parent.parent / "blobs"]
    files, problems = {}, []
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = Path(entry.path)
        if not path.is_file() or entry.name.startswith("."):
            continue
        resolved = path.resolve()
        if entry.is_symlink() and resolved.parent not in allowed:
            problems.append(f"`{entry.name}` is a link to `{resolved}`. Put the file itself there.")
        files[entry.name] = resolved
    if problems:
        raise ModelError(one_message(f"`model={folder}` leads out of its folder:", problems))
    return files


def _shard_names(folder: Path, files: dict[str, Path]) -> list[str]:
    """Returns the files that hold the weights, none if they are not safetensors."""
    if INDEX not in files:
        return [_SINGLE] if _SINGLE in files else []
    index = folder / INDEX
    try:
        text = text_of(files[INDEX], ModelError, most=_MOST_INDEX)
        shards = sorted(set(json_of(text, unique_keys=True)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"`{index}` is damaged: {error}. Download it again.") from error
    # Only names of files that stand in the folder itself: no path leads out of it.
    problems = [
        f"{shown(name)} is missing, or no plain file name that ends in .safetensors."
        for name in shards
        if name not in files or not name.endswith(".safetensors")
    ]
    if problems:
        raise ModelError(one_message(f"`{index}` names parts that cannot be:", problems))
    return shards


class CheckpointWeights(Weights):
    """A checkpoint's parameters, read where they lie; a sample costs a few pages each.

    Args:
        checkpoint: The checkpoint.
        names: Names of the model's parameters, all of which it holds; all that it holds if `None`,
            buffers and what is tied included.
    """

    def __init__(self, checkpoint: Checkpoint, names: Iterable[str] | None = None) -> None:
        super().__init__(f"`{checkpoint.folder}`", checkpoint.places if names is None else names)
        self._checkpoint = checkpoint

    def _kind(self, name: str) -> Kind | str:
        entry = self._checkpoint.places[name][1]
        if entry.dtype not in _BY_CODE:
            return f"it is stored as {entry.dtype}. Give a checkpoint that is not quantized"
        return dtype_name(_BY_CODE[entry.dtype]), entry.shape

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a parameter."""
        shard, entry = self._checkpoint.place_of(name)
        with opened(self._checkpoint.shards[shard]) as file:
            return read_tensor(file, entry, self._checkpoint.shards[shard])

    def _sample(self, name: str) -> set[str]:
        # In each precision: loading may leave some parameters in another one than the file's.
        shard, entry = self._checkpoint.place_of(name)
        if entry.dtype not in _BY_CODE or not entry.size:
            return set()
        dtype = _BY_CODE[entry.dtype]
        places = sample_positions(entry.size // dtype.itemsize) * dtype.itemsize
        with opened(self._checkpoint.shards[shard]) as file:
            # Read one by one, not mapped: the system would read on after each, nearly everything.
            parts = [
                os.pread(file.fileno(), dtype.itemsize, entry.start + place)
                for place in places.tolist()
            ]
        numbers = torch.frombuffer(bytearray().join(parts), dtype=dtype)
        return {digest_of_sample(numbers.to(d), entry.shape) for d in DTYPES.values()}


def write_checkpoint(checkpoint: Checkpoint, values: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes a copy of a checkpoint in which some parameters hold other values.

    Files without any of them are linked where the disk can do that, and copied where it cannot.
    In the others the numbers are written over where they lie, so that all else stays as it is to
    the byte and only one matrix at a time is in memory.

    Args:
        checkpoint: The checkpoint.
        values: New values by name, of the dtypes and shapes that are there.
        folder: Where the copy goes.

    Raises:
        OSError: It cannot be written.
    """
    rewritten = {checkpoint.place_of(name)[0] for name in values}
    shards = progress_bar(checkpoint.shards.items(), desc="files with weights", delay=_PATIENCE)
    for shard, path in shards:
        if shard not in rewritten:
            _link_or_copy(path, folder / shard)
            continue
        shutil.copyfile(path, folder / shard)
        with open(folder / shard, "r+b") as file:
            for name, value in values.items():
                own, entry = checkpoint.place_of(name)
                if own == shard:
                    file.seek(entry.start)
                    flat = value.detach().cpu().contiguous().view(-1)
                    file.write(flat.view(torch.uint8).numpy().data)
    if len(checkpoint.shards) > 1 or _SINGLE not in checkpoint.shards:
        shutil.copyfile(checkpoint.folder / INDEX, folder / INDEX)
    copy_others(checkpoint, folder)


def copy_others(checkpoint: Checkpoint, folder: Path) -> None:
    """Copies what belongs to a model besides its weights, where it is not there yet."""
    for name, path in checkpoint.others.items():
        if not (folder / name).exists():
            shutil.copyfile(path, folder / name)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a system without links
        shutil.copyfile(source, target)
