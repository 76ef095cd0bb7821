"""What one process of a comparison does, as a file that the process reads."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ..evaluation.metric_names import DEFAULT_METRICS
from ..modeling.loading import resolve_device
from ..utils.files import output_errors, write_atomically
from ..utils.hashing import json_sha256
from ..utils.run_folder import differences_of

BEFORE = "before editing"
STATISTICS = "key covariances"
# Whose versions a result depends on.
PACKAGES = ("locft_easyedit", "torch", "transformers", "peft")


@dataclass
class Job:
    """One process: the model before editing, the key covariances, or one method.

    What is not explained here is as in `Settings` or in the hyper-parameters of LocFT-BF.

    Attributes:
        name: `BEFORE`, `STATISTICS` or a method.
        model: The model's folder or hub name.
        batch_size: Prompts measured together.
        metrics: What is measured, as for `Evaluation`.
        stream: Commits in which the edits come, for a method.
        hparams: LocFT-BF's hyper-parameters, for it.
        overrides: The user's values for a method of EasyEdit.
        covariance_modules: Modules whose covariance is wanted, for `STATISTICS`.
        statistics: What `STATISTICS` found, for a method that needs it.
        identity: What the result depends on besides: hashes of data and model, versions.
        beside: How many processes share its device at that time.
    """

    name: str
    model: str
    data: str
    n: int | None
    device: str | None
    dtype: str
    model_parallel: bool = False
    trust_remote_code: bool = False
    append_eos: bool = True
    batch_size: int = 64
    row_tokens: int = 64
    metrics: list[str] = field(default_factory=lambda: list(DEFAULT_METRICS))
    stream: int | None = None
    capability: list[str] = field(default_factory=list)
    capability_limit: int | None = None
    tasks_dir: str | None = None
    hparams: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    stats_dir: str | None = None
    text: str | None = None
    documents: int = 0
    document_tokens: int = 0
    covariance_modules: list[str] = field(default_factory=list)
    statistics: dict[str, Any] | None = None
    identity: dict[str, str] = field(default_factory=dict)
    beside: int = 1

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Returns a line for each value in which a stored job is another one than this.

        Of the device only its kind counts: which of several GPUs was free changes nothing. What
        the statistics found is no setting.
        """
        return differences_of(_settings(vars(self)), _settings(other))


def _settings(job: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a job on which its result depends, of its device the kind alone."""
    values = {key: value for key, value in job.items() if key not in ("beside", "statistics")}
    values["device"] = device_kind(values.get("device"))
    if isinstance(values.get("hparams"), Mapping) and "device" in values["hparams"]:
        # As the job's: what the process is given is that of the job.
        values["hparams"] = {**values["hparams"], "device": values["device"]}
    return values


def device_kind(device: Any) -> str:
    """Returns `cpu`, `cuda` or what else a device is of; `None` is what would be chosen here."""
    if device is None:
        return resolve_device(None).type
    name = str(device)
    return "cuda" if name.isdigit() else name.partition(":")[0]


class JobFolder:
    """The folder in which a job's process works, and where it leaves what it found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.job = path / "job.json"
        self.result = path / "result.json"
        self.progress = path / "progress.json"
        self.log = path / "log.txt"
        self.state = path / "state"

    def read(self, file: Path, *keys: str) -> Any:
        """Returns a file's mapping with at least these keys; `None` if there is none."""
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) and set(keys) <= set(found) else None

    def write(self, file: Path, value: Any) -> None:
        """Writes a file so that it is there whole or not at all.

        NaN stays NaN: Python's own reader, the only one of these files, knows it.

        Raises:
            OutputError: It cannot be written.
        """
        with output_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(value).encode())


class Progress:
    """Tells the process that waits how far this one is."""

    def __init__(self, folder: JobFolder) -> None:
        self._folder = folder
        self._last = 0.0
        self._parent = os.getppid()

    def say(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Notes the phase, and how many of its `total` parts are done.

        Ends the process if the one that waits is gone: a later comparison may work in its folder.
        """
        if os.getppid() != self._parent:
            raise SystemExit("the comparison that started this process has ended")
        now = time.monotonic()
        if done not in (0, total) and now - self._last < 0.3:
            return
        self._last = now
        self._folder.write(self._folder.progress, {"phase": phase, "done": done, "total": total})


def folder_hash(folder: str | Path, pattern: str) -> str:
    """Returns a short hash of the files below a folder whose names match `pattern`."""
    files = [path for path in sorted(Path(folder).rglob(pattern)) if path.is_file()]
    return _short([[str(path.relative_to(folder)), file_hash(path)] for path in files])


def model_id(model: str) -> str:
    """Returns the last part of a model's path or hub name: EasyEdit's name for its statistics."""
    return model.rstrip("/\\").replace("\\", "/").rpartition("/")[2]


def version_of(package: str) -> str:
    """Returns an installed package's version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def file_hash(path: str | Path) -> str:
    """Returns a short hash of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def model_hash(name: str) -> str:
    """Returns a short hash of a model folder's configuration and of its files' sizes and times.

    A hub name stands for itself. Reading all weights would take minutes for a large model.
    """
    folder = Path(name)
    if not folder.is_dir():
        return name
    kinds = (".safetensors", ".bin", ".json", ".index")
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.suffix in kinds]
    return _short([[name, status.st_size, status.st_mtime_ns] for name, status in files])


def _short(value: Any) -> str:
    return json_sha256(value)[:16]
