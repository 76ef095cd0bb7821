"""One process of a comparison: `python -m locft_easyedit.compare.worker FOLDER`.

A method that crashes, runs out of memory or leaves globals behind takes only its own process with
it. What it finds goes into the folder's `result.json`; everything that it prints into `log.txt`.
"""

from __future__ import annotations

import gc
import logging
import platform
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data.readers import read_requests
from ..easyedit import register
from ..easyedit.peers.corpus import corpus_from_folder, corpus_from_model
from ..easyedit.peers.covariance import stats_name, write_key_covariances
from ..easyedit.peers.peer_editor import describe
from ..easyedit.peers.yamls import MethodUnavailableError
from ..errors import LocFTError
from ..evaluation.evaluation import Evaluation, finish_
from ..evaluation.predictions import EvalConfig
from ..evaluation.summary import summarize
from ..modeling.loading import load_causal_lm
from ..utils.memory import is_out_of_memory
from .commits import commits_of
from .edits import Edits, method_editor
from .job import BEFORE, PACKAGES, STATISTICS, Job, JobFolder, Progress, model_id, version_of
from .ours import OURS
from .outcome import Outcome, checked


def main(arguments: Sequence[str]) -> int:
    """Does the job of the folder that is named; returns the exit status."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    folder = JobFolder(Path(arguments[0]))
    job = Job(**folder.read(folder.job))
    progress = Progress(folder)
    progress.say("starting")
    if job.name == BEFORE:
        result = _before(job, progress)
    elif job.name == STATISTICS:
        result = _statistics(job, progress)
    else:
        result = _method(job, folder, progress)
    folder.write(folder.result, {"job": asdict(job), "result": result})
    return 0


def _before(job: Job, progress: Progress) -> dict[str, Any]:
    """Measures the model before any edit, once for all methods."""
    easyedit = register()
    requests = read_requests(job.data, job.n)
    model, tokenizer = _load(job, progress)
    evaluation = Evaluation(model, tokenizer, requests, _how(job), metrics=job.metrics)
    progress.say("metrics")
    records = evaluation.measure("before")
    summary = summarize([{"pre": record, "post": record} for record in records])["pre"]
    return {
        "n": len(requests),
        "records": records,
        "summary": summary,
        "capability": _capability(job, model, tokenizer, progress),
        "easyedit": describe(easyedit).removeprefix("EasyEdit's "),
        "device": str(model.get_input_embeddings().weight.device),
        "versions": {package: version_of(package) for package in PACKAGES}
        | {"python": platform.python_version()},
    }


def _statistics(job: Job, progress: Progress) -> dict[str, Any]:
    """Measures the key covariances that methods of this comparison need, in one pass for all."""
    start = time.perf_counter()
    model, tokenizer = _load(job, progress)
    progress.say("text for key covariances")
    if job.text is not None:
        corpus = corpus_from_folder(job.text, job.documents)
    else:
        corpus = corpus_from_model(
            model,
            tokenizer,
            job.documents,
            tokens_per_document=job.document_tokens,
            batch_size=job.batch_size,
            cache=job.stats_dir,
        )
    progress.say("key covariances")
    files = write_key_covariances(
        model,
        tokenizer,
        corpus,
        job.covariance_modules,
        stats_dir=str(job.stats_dir),
        model_id=model_id(job.model),
    )
    return {
        "name": stats_name(corpus, model),
        "corpus": corpus.description,
        "n_samples": len(corpus.texts),
        "files": [str(file) for file in files.values()],
        "seconds": time.perf_counter() - start,
    }


def _method(job: Job, folder: JobFolder, progress: Progress) -> dict[str, Any]:
    """Edits with one method and measures; what goes wrong becomes the outcome's reason."""
    try:
        outcome = checked(_edited(job, folder, progress))
    except MethodUnavailableError as error:
        outcome = Outcome(job.name, status="unavailable", reason=_one_line(error))
    except Exception as error:  # whatever EasyEdit's code may raise
        traceback.print_exc()
        if is_out_of_memory(error):
            reason = f"out of memory: {_one_line(error)}"
        elif isinstance(error, LocFTError):
            reason = _one_line(error)
        else:
            reason = f"{type(error).__name__}: {_one_line(error)}"
            if register().is_release and job.name not in OURS:
                reason += " (in EasyEdit's release of 2023; its current source may do better)"
        outcome = Outcome(job.name, status="failed", reason=reason)
    return outcome.to_dict()


def _edited(job: Job, folder: JobFolder, progress: Progress) -> Outcome:
    start = time.perf_counter()
    requests = read_requests(job.data, job.n)
    before = folder.read(JobFolder(folder.path.parent / "before").result)["result"]["records"]
    easyedit = register()
    model, tokenizer = _load(job, progress)
    together = max(len(commit) for commit in commits_of(len(requests), job.stream))
    editor = method_editor(job, model, tokenizer, together, easyedit, folder.state)
    seconds = {"load": time.perf_counter() - start}
    edits = Edits(editor, requests, model, tokenizer, _how(job), folder, progress, job.stream)
    edits.make_()
    seconds |= {"edit": edits.seconds, "metrics right after each edit": edits.seconds_measuring}
    gc.collect()

    start = time.perf_counter()
    progress.say("metrics after all edits")
    evaluation = Evaluation(model, tokenizer, requests, edits.how, metrics=job.metrics)
    after = evaluation.measure("after all edits")
    for pre, post in zip(before, after, strict=True):
        finish_(pre, post)
    seconds["metrics"] = time.perf_counter() - start
    folder.write(folder.path / "records.json", after)
    notes = [*editor.notes, *edits.notes]
    if job.beside > 1:
        notes.append(
            f"Up to {job.beside} methods shared {job.device} at a time: alone it would take "
            "fewer seconds."
        )
    return Outcome(
        job.name,
        n_edits=edits.n_made,
        after_all=_means(after),
        right_after_each=_means(edits.right_after) if editor.one_by_one else None,
        by_commit=edits.by_commit,
        capability=_capability(job, model, tokenizer, progress),
        seconds=seconds,
        seconds_per_edit=edits.seconds / edits.n_made,
        peak_memory_gib=edits.peak.gib,
        peak_memory_of=edits.peak.of,
        corpus=(job.statistics or {}).get("corpus"),
        hparams=editor.values,
        notes=notes,
        log=str(folder.log),
    )


def _means(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means: dict[str, Any] = summarize([{"pre": {}, "post": record} for record in records])["post"]
    return means


def _capability(job: Job, model: Any, tokenizer: Any, progress: Progress) -> dict[str, Any] | None:
    if not job.capability:
        return None
    from ..evaluation.capability.harness import measure_capability  # an extra

    progress.say("capability")
    return measure_capability(
        model, tokenizer, job.capability, tasks_dir=job.tasks_dir, limit=job.capability_limit
    )


def _load(job: Job, progress: Progress) -> tuple[Any, Any]:
    progress.say("loading the model")
    return load_causal_lm(
        job.model,
        device=job.device,
        dtype=job.dtype,
        model_parallel=job.model_parallel,
        trust_remote_code=job.trust_remote_code,
    )


def _how(job: Job) -> EvalConfig:
    return EvalConfig(job.batch_size, job.row_tokens, progress=True)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) if isinstance(error, LocFTError) else (lines or ["no message"])[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
