"""Key covariances, in the files where EasyEdit looks for them before it asks a hub for Wikipedia.

ROME (with `mom2_adjustment`), MEMIT and AlphaEdit need the second moment of what enters the matrix
that they edit: the sum of x x^T over the tokens of a corpus. EasyEdit computes it a layer at a
time, from Wikipedia; here one pass over any corpus serves all layers.
"""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...data.tokenization import ids_of
from ...training.preserve.input_moments import (
    check_finite,
    check_modules,
    input_width,
    second_moments,
    within_context,
)
from ...utils.files import output_errors, replacing
from ...utils.hashing import model_fingerprint
from .corpus import Corpus

logger = logging.getLogger(__name__)

DTYPE = "float32"  # EasyEdit's `mom2_dtype`
_CONSTRUCTOR = "easyeditor.util.runningstats.SecondMoment()"


def stats_name(corpus: Corpus, model: Any) -> str:
    """Returns the `mom2_dataset` that stands for this corpus and the weights of this model.

    EasyEdit's file name has the model's name but nothing of its weights, so that a covariance
    would be taken for that of any other version of the model.

    Raises:
        ModelError: The weights are not loaded.
    """
    return f"{corpus.name}-{model_fingerprint(model)}"


def covariance_file(
    module: str, *, stats_dir: str | Path, model_id: str, dataset: str, n_samples: int
) -> Path:
    """Returns the file in which EasyEdit looks for the covariance of a module's inputs."""
    name = f"{module}_{DTYPE}_mom2_{n_samples}.npz"
    return Path(stats_dir) / model_id / f"{dataset}_stats" / name


def write_key_covariances(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    modules: Sequence[str],
    *,
    stats_dir: str | Path,
    model_id: str,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> dict[str, Path]:
    """Writes the second moment of each module's inputs, and returns the files by module.

    One pass over the corpus for all modules whose file is missing or damaged. The sum of x x^T,
    [D, D] in float32, is over all tokens, special ones included, as the tokenizer gives them.
    `model_id` is the last part of the model's `config._name_or_path` when EasyEdit runs.

    Raises:
        ModelError: A module does not exist or is not linear, is not run, or gets a NaN or an
            infinite number.
        DataError: The corpus has no tokens.
        OutputError: A file cannot be written.
    """
    check_modules(model, modules, "Key covariances cannot be measured; correct:")
    dataset, n_samples = stats_name(corpus, model), len(corpus.texts)
    files = {
        module: covariance_file(
            module, stats_dir=stats_dir, model_id=model_id, dataset=dataset, n_samples=n_samples
        )
        for module in modules
    }
    missing = [
        module
        for module, file in files.items()
        if not _is_complete(file, n_samples, input_width(model.get_submodule(module)))
    ]
    if missing:
        documents = within_context(model, ids_of(tokenizer, corpus.texts))
        sums, n_tokens = second_moments(
            model,
            documents,
            missing,
            batch_tokens=batch_tokens,
            description="key covariances",
            progress=progress,
        )
        for module in missing:
            _write(files[module], sums[module], n_tokens, n_samples, module)
    return files


def _is_complete(file: Path, n_samples: int, width: int) -> bool:
    """Says whether a file holds what `_write` writes; a damaged one is reported."""
    if not file.is_file():
        return False
    try:
        with np.load(file, allow_pickle=False) as saved:
            moment = saved["mom2.mom2"]
            whole = (
                str(saved["mom2.constructor"]) == _CONSTRUCTOR
                and int(saved["mom2.count"]) > 0
                and int(saved["sample_size"]) == n_samples
                and moment.shape == (width, width)
                and moment.dtype == np.float32
                and bool(np.isfinite(moment).all())
            )
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error):
        whole = False
    if not whole:
        logger.warning("%s is damaged and is made anew.", file)
    return whole


def _write(file: Path, moment: torch.Tensor, n_tokens: int, n_samples: int, module: str) -> None:
    values = moment.to("cpu", torch.float32)
    check_finite(values, module)
    content: dict[str, Any] = {
        "mom2.constructor": np.array(_CONSTRUCTOR),
        "mom2.count": np.array(n_tokens),
        "mom2.mom2": values.numpy(),
        "sample_size": np.array(n_samples),
    }
    with output_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **content)  # given a name, it would add .npz
