"""EasyEdit's fluency: the n-gram entropy of a sampled continuation."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import MissingDependencyError
from ..modeling.devices import input_device
from ..modeling.forward import run_cached
from ..modeling.modes import evaluation_mode
from ..utils.progress import progress_bar
from .decoding import decode_

logger = logging.getLogger(__name__)

_TOP_K = 5
_TOTAL_TOKENS = 100
_WEIGHTS = {2: 2 / 3, 3: 4 / 3}


def word_tokenizer() -> Callable[[str], list[str]]:
    """Returns nltk's word tokenizer, which EasyEdit counts n-grams with.

    It needs nltk's data `punkt_tab`. Without it, words are split without splitting sentences
    first, and a warning says that figures can differ from EasyEdit's.

    Raises:
        MissingDependencyError: nltk is not installed.
    """
    try:
        import nltk
    except ImportError as error:
        raise MissingDependencyError(
            "Fluency (`test_generation=True`) needs nltk, which is not installed. "
            "Install it: pip install nltk"
        ) from error
    try:
        nltk.word_tokenize("A test. Of two.")
    except LookupError:
        logger.warning(
            "nltk's data `punkt_tab` is not there, so fluency is computed without splitting "
            "sentences first and can differ a little from EasyEdit's. To have its exact words: "
            "python -m nltk.downloader punkt_tab"
        )
        return lambda text: list(nltk.word_tokenize(text, preserve_line=True))
    return lambda text: list(nltk.word_tokenize(text))


def ngram_entropy(words: Sequence[str]) -> float:
    """Returns the weighted mean of the entropies, in bits, of the text's bigrams and trigrams."""
    weighted = []
    for n, weight in _WEIGHTS.items():
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        frequencies = np.array(list(counts.values()), dtype=np.float64)
        frequencies /= frequencies.sum() if len(frequencies) else 1.0
        weighted.append(weight * -np.sum(frequencies * np.log(frequencies) / np.log(2)))
    return float(np.mean(weighted))


@torch.no_grad()
def fluency_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    *,
    words: Callable[[str], list[str]],
    progress: bool = False,
) -> list[dict[str, float]]:
    """Returns `ngram_entropy` of each record, as EasyEdit's `test_generation_quality`.

    A text of 100 tokens, prompt included, is sampled from the five likeliest tokens at each step.
    The draws come from PyTorch's global random state in EasyEdit's order, one record after the
    other; `batched_fluency` is for many records.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        records: Requests with `prompt`.
        words: Splits a text into words (see `word_tokenizer`).
        progress: Show a progress bar.
    """
    with evaluation_mode(model):
        return [
            {"ngram_entropy": ngram_entropy(words(_sample(model, tokenizer, record["prompt"])))}
            for record in progress_bar(records, desc="fluency", unit="text", show=progress)
        ]


def batched_fluency(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    *,
    words: Callable[[str], list[str]],
    batch_size: int = 64,
    numbers: Sequence[int] | None = None,
    progress: bool = False,
) -> list[dict[str, float]]:
    """Returns what `fluency_of` does, in distribution; the same, up to rounding, in any batch.

    Each record has random numbers of its own, so that neither the batch nor what else is measured
    plays a part; PyTorch's random state is left alone.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        records: Requests with `prompt`.
        words: Splits a text into words (see `word_tokenizer`).
        batch_size: Texts at a time.
        numbers: The records' numbers, which seed their draws; counted from 0 if `None`.
        progress: Show a progress bar.
    """
    if not records:
        return []
    sequences = tokenizer([r["prompt"] for r in records], padding=False)["input_ids"]
    numbers = range(len(records)) if numbers is None else numbers
    draws = [np.random.default_rng((0, i)).random(_TOTAL_TOKENS) for i in numbers]

    def pick(logits: torch.Tensor, texts: np.ndarray, so_far: list[list[int]]) -> torch.Tensor:
        top = torch.softmax(logits.float(), dim=1).topk(_TOP_K, dim=1)
        shares = (top.values / top.values.sum(1, keepdim=True)).cumsum(1)  # [B, 5]
        drawn = torch.tensor(
            [draws[i][len(ids)] for i, ids in zip(texts, so_far, strict=True)], device=logits.device
        )
        chosen = (shares < drawn[:, None]).sum(1, keepdim=True).clamp(max=_TOP_K - 1)
        return top.indices.gather(1, chosen)[:, 0]

    short = [ids for ids in sequences if len(ids) < _TOTAL_TOKENS]  # lists are shared
    places = np.array([i for i, ids in enumerate(sequences) if len(ids) < _TOTAL_TOKENS], np.int64)
    decode_(
        model,
        np.array([len(ids) for ids in short], np.int64),
        lambda i: list(short[i]),
        lambda i, ids: short[i].__setitem__(slice(None), ids),
        pick=lambda logits, texts, so_far: pick(logits, places[texts], so_far),
        done=lambda _, ids: len(ids) >= _TOTAL_TOKENS,
        batch_size=batch_size,
        description="fluency",
        progress=progress,
    )
    return [{"ngram_entropy": ngram_entropy(words(_text(tokenizer, ids)))} for ids in sequences]


def _sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=input_device(model))
    new, cache = ids, None
    while ids.shape[1] < _TOTAL_TOKENS:
        output, cache = run_cached(model, cache, input_ids=new)
        top = torch.softmax(output.logits[:, -1, :], dim=1).topk(_TOP_K, dim=1)
        drawn = torch.multinomial(top.values / top.values.sum(1, keepdim=True), 1)
        new = top.indices.gather(1, drawn).to(ids.device)
        ids = torch.cat([ids, new], dim=1)
        new = ids if cache is None else new
    return _text(tokenizer, ids[0].tolist())


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    decoded = str(tokenizer.decode(ids, skip_special_tokens=True))
    text = unicodedata.normalize("NFKD", decoded)
    return text.replace("\n\n", " ").replace("<|endoftext|>", "")
