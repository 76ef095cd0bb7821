"""Key covariances, in the files where EasyEdit looks for them before it asks a hub for Wikipedia.

ROME (with `mom2_adjustment`), MEMIT and AlphaEdit need the second moment of what enters the matrix
that they edit: the sum of x x^T over the tokens of a corpus. EasyEdit computes it a layer at a
time, from Wikipedia; here one pass over any corpus serves all layers.
"""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..devices import context_length, input_device
from ..errors import DataError, ModelError, one_message
from ..files import output_errors, replacing
from ..modes import evaluation_mode
from .corpus import Corpus, model_fingerprint

logger = logging.getLogger(__name__)

DTYPE = "float32"  # EasyEdit's `mom2_dtype`
# Up to this width sums are kept in float64, at 128 MiB a module.
_WIDEST_FLOAT64 = 4096
_CONSTRUCTOR = "easyeditor.util.runningstats.SecondMoment()"


class _AllSeen(Exception):
    """Ends a forward pass once every module has had its input; never leaves this module."""


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
    n_samples: int,
    model_id: str,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> dict[str, Path]:
    """Writes the second moment of each module's inputs, and returns the files by module.

    One pass over the corpus for all modules whose file is missing or damaged. The sum of x x^T,
    [D, D] in float32, is over all tokens, special ones included, as the tokenizer gives them.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        corpus: The texts.
        modules: Full names of linear modules in the model.
        stats_dir: EasyEdit's `stats_dir`.
        n_samples: How many of the corpus' documents to use, from its beginning.
        model_id: The last part of the model's `config._name_or_path` when EasyEdit runs.
        batch_tokens: Tokens of a batch, padding included; a longer document is a batch by itself.
        progress: Show a progress bar.

    Raises:
        ModelError: A module does not exist or is not linear, is not run, or gets a NaN or an
            infinite number.
        DataError: The corpus is too small, or a number is below 1.
        OutputError: A file cannot be written.
    """
    _check(model, modules, corpus, n_samples, model_id, batch_tokens)
    dataset = stats_name(corpus, model)
    files = {
        module: covariance_file(
            module, stats_dir=stats_dir, model_id=model_id, dataset=dataset, n_samples=n_samples
        )
        for module in modules
    }
    missing = [
        module
        for module, file in files.items()
        if not _is_complete(file, n_samples, _width(model.get_submodule(module)))
    ]
    if missing:
        documents = _tokenized(model, tokenizer, corpus.texts[:n_samples])
        sums, n_tokens = _second_moments(model, documents, missing, batch_tokens, progress)
        for module in missing:
            _write(files[module], sums[module], n_tokens, n_samples, module)
    return files


def _check(
    model: Any,
    modules: Sequence[str],
    corpus: Corpus,
    n_samples: int,
    model_id: str,
    batch_tokens: int,
) -> None:
    counts = {"n_samples": n_samples, "batch_tokens": batch_tokens}
    problems = [f"`{name}={n}` must be 1 or more." for name, n in counts.items() if n < 1]
    if n_samples > len(corpus.texts):
        problems.append(
            f"`n_samples={n_samples}`, but there are {len(corpus.texts)} documents "
            f"({corpus.description}). Lower it, or give more."
        )
    if not model_id or "/" in model_id:
        problems.append(f"`model_id={model_id!r}` must be a name without a slash.")
    if problems:
        raise DataError(one_message("Key covariances cannot be measured:", problems))
    found = dict(model.named_modules())
    wrong = [f"there is no module `{module}`." for module in modules if module not in found]
    wrong += [
        f"`{module}` ({type(found[module]).__name__}) is not linear."
        for module in modules
        if module in found and _width(found[module]) == 0
    ]
    if wrong:
        raise ModelError(one_message("Key covariances cannot be measured; correct:", wrong))


def _width(module: nn.Module) -> int:
    """Returns the size D of a linear module's inputs; 0 if it is not linear."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return 0
    # gpt2's Conv1D stores its matrix as [in, out].
    return int(weight.shape[0 if type(module).__name__ == "Conv1D" else 1])


def _tokenized(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[list[int]]:
    """Returns each text's token ids, cut to the model's context, longest first."""
    context = context_length(model)
    ids = [tokenizer(text)["input_ids"][:context] for text in texts]
    documents = sorted((document for document in ids if document), key=len, reverse=True)
    if not documents:
        raise DataError("The corpus has no tokens. Give other texts.")
    return documents


def _batches(documents: Sequence[list[int]], batch_tokens: int) -> Iterator[list[list[int]]]:
    """Yields batches of documents, which are sorted by length, longest first."""
    start = 0
    while start < len(documents):
        size = max(batch_tokens // len(documents[start]), 1)
        yield list(documents[start : start + size])
        start += size


def _second_moments(
    model: Any,
    documents: Sequence[list[int]],
    modules: Sequence[str],
    batch_tokens: int,
    progress: bool,
) -> tuple[dict[str, torch.Tensor], int]:
    """Returns the sum of x x^T, [D, D], for each module, and the number of tokens."""
    device = input_device(model)
    sums: dict[str, torch.Tensor] = {}
    n_tokens = 0
    bar = tqdm(total=len(documents), desc="key covariances", unit="document", disable=not progress)
    with bar, torch.no_grad(), evaluation_mode(model):
        for batch in _batches(documents, batch_tokens):
            lengths = torch.tensor([len(document) for document in batch])
            # Padding goes on the right, with any token: nothing before it sees it.
            ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
            for row, document in zip(ids, batch, strict=True):
                row[: len(document)] = torch.tensor(document)
            real = torch.arange(ids.shape[1]) < lengths[:, None]  # [B, T]
            with _adding(model, modules, real, sums):
                model(
                    input_ids=ids.to(device),
                    attention_mask=real.long().to(device),
                    use_cache=False,
                )
            n_tokens += int(lengths.sum())
            bar.update(len(batch))
    return sums, n_tokens


@contextmanager
def _adding(
    model: Any, modules: Sequence[str], real: torch.Tensor, sums: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Within, a forward pass adds x x^T of each module's inputs to `sums`, and ends after the last.

    Args:
        model: The model.
        modules: Names of modules.
        real: Which tokens count, [B, T].
        sums: By module, [D, D]; changed.

    Raises:
        ModelError: A module was not run.
    """
    seen: set[str] = set()

    def hook(name: str) -> Any:
        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
            flat = inputs.reshape(-1, inputs.shape[-1])  # [B * T, D]; some models flatten before
            keys = flat[real.reshape(-1).to(flat.device)].float()  # [tokens, D]
            moment = keys.T @ keys
            if name not in sums:
                wide = moment.shape[0] > _WIDEST_FLOAT64 or moment.device.type == "mps"
                sums[name] = torch.zeros_like(
                    moment, dtype=torch.float32 if wide else torch.float64
                )
            sums[name] += moment
            seen.add(name)
            if len(seen) == len(modules):
                raise _AllSeen

        return add

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
        for name in modules
    ]
    try:
        yield
    except _AllSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) < len(modules):
        unseen = [name for name in modules if name not in seen]
        raise ModelError(f"The model does not run {', '.join(unseen)}. Name other modules.")


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
    values = moment.to("cpu", torch.float32).numpy()
    if not np.isfinite(values).all():
        raise ModelError(
            f"The inputs of `{module}` hold a NaN or an infinite number. Load the model in another "
            "precision."
        )
    content: dict[str, Any] = {
        "mom2.constructor": np.array(_CONSTRUCTOR),
        "mom2.count": np.array(n_tokens),
        "mom2.mom2": values,
        "sample_size": np.array(n_samples),
    }
    with output_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **content)  # given a name, it would add .npz
