"""What a comparison will run: everything checked, and a job for each process."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.readers import read_requests
from ..data.requests import distinct_edits
from ..easyedit.peers.peer_editor import commit_of
from ..easyedit.peers.peer_hparams import PEERS, PeerHparams, peer_hparams
from ..easyedit.peers.published import ALIASES
from ..easyedit.peers.yamls import (
    MethodUnavailableError,
    check_method,
    easyedit_folder,
)
from ..errors import HyperParamsError, LocFTError, one_message
from ..evaluation.metric_names import DEFAULT_METRICS, check_metrics
from ..hparams import LocFTBFHyperParams
from ..ledger.binding import check_supported
from ..modeling.loading import model_without_weights, resolve_device
from ..modeling.model_name import check_model_name
from ..modeling.places import match_parameters
from ..training.rewordings.writers import check_writer
from ..utils.output import prepare_folder
from .commits import commits_of
from .job import (
    BEFORE,
    PACKAGES,
    STATISTICS,
    Job,
    device_kind,
    file_hash,
    folder_hash,
    model_hash,
    version_of,
)
from .ours import IN_LEDGER, OURS, known_name, own_hparams

logger = logging.getLogger(__name__)


@dataclass
class Settings:
    """What is compared.

    Attributes:
        hparams: LocFT-BF's hyper-parameters; model, device and precision are everybody's.
        methods: Names in EasyEdit's `ALG_DICT`, and those of `OURS`.
        data: A data file.
        n: Edits; all of the file if `None`.
        output: Where everything goes.
        metrics: What is measured before and after all edits, as for `Evaluation`; right after each
            edit it is `PLAIN_METRICS`.
        stream: Commits in which the edits come, and after each of which all so far are measured;
            all at once if `None`.
        peers: The user's values for a method of EasyEdit, by its name.
        stats_dir: Where key covariances are kept from one comparison to the next.
        text: Folder of text files for key covariances; `None` samples text from the model.
        documents: Documents they are measured on.
        document_tokens: Tokens of a sampled document.
        capability: lm-evaluation-harness tasks; empty for none.
        capability_limit: Items a task, at most.
        tasks_dir: Folder with tasks besides the harness's own.
        devices: A process on each of these runs a method; that of `hparams` alone, one method after
            another, if `None`.
        progress: Show a progress bar.
    """

    hparams: LocFTBFHyperParams
    methods: Sequence[str]
    data: str
    n: int | None
    output: Path
    metrics: Sequence[str] = DEFAULT_METRICS
    stream: int | None = None
    peers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stats_dir: str = "data/stats"
    text: str | None = None
    documents: int = 400
    document_tokens: int = 150
    capability: Sequence[str] = ()
    capability_limit: int | None = None
    tasks_dir: str | None = None
    devices: Sequence[int | str] | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        """Gives each method the name that it has here, whatever its case."""
        self.methods = [known_name(method) for method in self.methods]
        self.peers = {known_name(method): values for method, values in self.peers.items()}


def planned(settings: Settings) -> tuple[dict[str, Job], dict[str, list[str]]]:
    """Checks everything and returns the jobs by name, and each method's covariance modules.

    Raises:
        LocFTError: Something cannot be used.
    """
    h = settings.hparams
    _check_methods(settings)
    check_metrics(settings.metrics)
    if not isinstance(h.model_name, str):
        raise HyperParamsError(
            "`model_name` must be a folder or a hub name: each process loads it."
        )
    requests = read_requests(settings.data, settings.n)
    distinct_edits(requests, "error" if h.on_conflict == "error" else None)
    check_writer(h)
    # What is measured once for all methods is measured on one device.
    device = h.device if h.device is not None or not settings.devices else settings.devices[0]
    for one in (device, *(settings.devices or ())):
        resolve_device(one)
    name = check_model_name(h.model_name)
    model = str(Path(name).resolve()) if Path(name).is_dir() else name
    _check_stream(settings, len(requests))
    together = max(len(commit) for commit in commits_of(len(requests), settings.stream))
    plans = _peer_plans(settings, model, together)
    if settings.capability:
        from ..evaluation.capability.prepared_tasks import prepare_tasks  # an extra

        prepare_tasks(
            list(settings.capability),
            tasks_dir=settings.tasks_dir,
            limit=settings.capability_limit,
            progress=False,
        )
    prepare_folder(settings.output)
    stats_dir = str(Path(settings.stats_dir).expanduser().resolve())
    common: dict[str, Any] = {
        "model": model,
        "data": str(Path(settings.data).resolve()),
        "n": settings.n,
        "device": None if device is None else str(device),
        "dtype": h.dtype or ("float16" if h.fp16 else "float32"),
        "model_parallel": h.model_parallel,
        "trust_remote_code": h.trust_remote_code,
        "append_eos": h.append_eos,
        "batch_size": h.eval_batch_size,
        "row_tokens": h.row_tokens,
        "metrics": list(settings.metrics),
        "capability": list(settings.capability),
        "capability_limit": settings.capability_limit,
        "tasks_dir": _absolute(settings.tasks_dir),
        "identity": {
            "data": file_hash(settings.data),
            "model": model_hash(model),
            "easyedit": _easyedit(),
            **{package: version_of(package) for package in PACKAGES},
        },
    }
    jobs = {BEFORE: Job(BEFORE, **common)}
    needed = {method: plan.covariance_modules for method, plan in plans.items()}
    needed = {method: modules for method, modules in needed.items() if modules}
    if settings.tasks_dir is not None:
        common["identity"]["tasks"] = folder_hash(settings.tasks_dir, "*")
    text: dict[str, Any] = {
        "stats_dir": stats_dir,
        "text": _absolute(settings.text),
        "documents": settings.documents,
        "document_tokens": settings.document_tokens,
    }
    texts = {} if settings.text is None else {"text": folder_hash(settings.text, "*.txt")}
    if needed:
        modules = sorted({m for each in needed.values() for m in each}, key=_natural)
        jobs[STATISTICS] = Job(
            STATISTICS,
            **common
            | {"capability": [], "capability_limit": None, "tasks_dir": None}
            | {"identity": common["identity"] | texts},
            **text,
            covariance_modules=modules,
        )
    common["stream"] = settings.stream
    for method in settings.methods:
        files = texts if method in needed else {}
        if method in OURS:
            jobs[method] = Job(method, **common, hparams=own_hparams(method, h))
        else:
            given = dict(settings.peers.get(method, {}))
            if "hparams" in given:  # the process works in a folder of its own
                given["hparams"] = _absolute(given["hparams"])
                files = files | {"hparams": file_hash(given["hparams"])}
            own = {**common, "identity": common["identity"] | files}
            jobs[method] = Job(method, **own, overrides=given, **(text if method in needed else {}))
    return jobs, needed


def _check_methods(settings: Settings) -> None:
    methods = list(settings.methods)
    problems = []
    if not methods:
        problems.append(f"`methods=[]` names none. Choose among {', '.join((*OURS, *PEERS))}.")
    problems += [
        f"`methods` names {m} twice{_also_called(m)}. Keep one."
        for m in sorted({m for m in methods if methods.count(m) > 1})
    ]
    for m in (m for m in methods if m not in OURS):
        try:
            check_method(m)
        except LocFTError as error:
            problems.append(str(error))
    problems += [
        f"`peers.{m}` is for a method that is not compared. Add {m} to `methods`, or drop it."
        for m in settings.peers
        if m not in methods or m in OURS
    ]
    if settings.devices is not None and not settings.devices:
        problems.append("`devices` is empty. Name at least one, or leave it out.")
    if settings.devices and settings.hparams.model_parallel:
        problems.append(
            "`devices` gives each method one device, and `model_parallel` takes all of them. Keep "
            "one of the two."
        )
    kinds = sorted({device_kind(device) for device in settings.devices or ()})
    if len(kinds) > 1:
        problems.append(
            f"`devices` names {' and '.join(kinds)}: seconds and memory of the methods could not "
            "be compared. Name devices of one kind."
        )
    if settings.documents < 1 or settings.document_tokens < 2:
        problems.append("`documents` must be 1 or more, and `document_tokens` 2 or more.")
    if settings.text is not None and not Path(settings.text).is_dir():
        problems.append(f"`text={settings.text}` is no folder. Give one with *.txt files.")
    if problems:
        raise HyperParamsError(one_message("The comparison cannot be made:", problems))


def _also_called(method: str) -> str:
    names = [alias for alias, name in ALIASES.items() if name == method]
    return f" ({', '.join(names)} is the same)" if names else ""


def _check_stream(settings: Settings, n_edits: int) -> None:
    stream = settings.stream
    if stream is not None and not 1 <= stream <= n_edits:
        raise HyperParamsError(
            f"`stream={stream}`: the {n_edits} edits come in so many commits. Give a number from 1 "
            f"to {n_edits}."
        )
    if any(str(method).endswith(IN_LEDGER) for method in settings.methods):
        check_supported(settings.hparams)


def _peer_plans(settings: Settings, model: str, n_edits: int) -> dict[str, PeerHparams]:
    """Returns what each of EasyEdit's methods will be run with, from a model without weights.

    Raises:
        LocFTError: A method's values cannot be used; all such problems in one error.
    """
    methods = [method for method in settings.methods if method not in OURS]
    h = settings.hparams
    empty = model_without_weights(model, trust_remote_code=h.trust_remote_code)
    if {*OURS} & {*settings.methods} and not h.chooses:
        match_parameters(empty, h.layers, h.templates)
    plans, problems = {}, []
    for method in methods:
        try:
            plans[method] = peer_hparams(
                method,
                empty,
                device=resolve_device(h.device),
                n_edits=n_edits,
                stats_dir=settings.stats_dir,
                corpus_name="none",
                n_samples=settings.documents,
                overrides=settings.peers.get(method),
            )
        except MethodUnavailableError as error:
            logger.warning("%s It will be a row with this reason.", error)
        except LocFTError as error:
            problems.append(str(error))
    if problems:
        raise HyperParamsError("\n".join(problems))
    return plans


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def _easyedit() -> str:
    """Returns which EasyEdit it is, as far as can be told without importing it."""
    home = easyedit_folder()
    if home is None:
        return f"installed {version_of('easyeditor')}"
    return f"{home} {commit_of(home)}".strip()


def _natural(name: str) -> list[Any]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
