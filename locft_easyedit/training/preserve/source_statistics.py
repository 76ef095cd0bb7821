"""Statistics of what enters the trained matrices ("keys"): their second moments.

A change T A S of a matrix leaves its output for a key k as it was where S k = 0. The second moment,
the mean of k k^T over the tokens of a text, says how much of the text lies in which direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...data.forms import ChatTemplate, Forms
from ...data.tokenization import Asked, asked_ids, ids_of, tokenize_asked
from ...errors import PreserveError
from ...hparams_rules import SAMPLED
from ...modeling.devices import context_length
from ...utils.hashing import json_sha256, model_fingerprint
from ...utils.parsing import pieces_of
from .chat_text import chat_text
from .input_moments import (
    BATCH_TOKENS,
    check_finite,
    check_modules,
    input_width,
    second_moments,
    within_context,
)
from .moment_cache import Origin, read_moments, write_moments
from .sampled_text import asked_prompts, sampled_text
from .sources import Source

# Fewer keys than directions say nothing of some directions; twice as many is the least to go by.
_LEAST_FACTOR = 2
_SAMPLED_FACTOR = 4
# Of a text: a longer passage is divided where a line or a word ends.
_PIECE_CHARS = 2000


@dataclass(frozen=True)
class Moments:
    """Second moments of keys.

    Attributes:
        second: By module, the mean of k k^T over tokens, [D, D] float32 on the host.
        n_tokens: Over how many tokens.
        digest: Hash of the tokens.
        parts: The token sequences, of each kind of text.
    """

    second: dict[str, torch.Tensor]
    n_tokens: int
    digest: str
    parts: Sequence[list[list[int]]] = ()


def text_moments(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    modules: Sequence[str],
    source: Source,
    *,
    cache: Path | None,
    seed: int = 0,
    progress: bool,
) -> Moments:
    """Returns the second moments of the modules' inputs over a text, computed once and kept.

    Of sampled text the result is the mean of two: of documents, and of what follows short openings
    (see `sampled_text`). All tokens count, special ones included, as the tokenizer gives them.

    Args:
        model: A causal language model, as it is before an edit.
        tokenizer: Its tokenizer.
        modules: Full names of linear modules.
        source: A text, or `sampled`.
        cache: A folder where statistics and sampled text are kept; `None` keeps nothing.
        seed: Seed of the sampling.
        progress: Show progress bars.

    Raises:
        ModelError: A module does not exist, is not linear or not run, or gets a NaN or an infinite
            number; or the model hardly writes anything by itself.
        PreserveError: There are fewer than 2 D tokens.
        OutputError: Something cannot be kept.
    """
    modules = list(dict.fromkeys(modules))
    widths = _widths(model, modules)
    widest = max(modules, key=widths.__getitem__)
    parts = _parts(model, tokenizer, source, widths[widest], cache, seed, progress)
    n_tokens = sum(len(sequence) for part in parts for sequence in part)
    _check_enough(source, n_tokens, widths[widest], widest)
    return _kept(model, widths, parts, cache, last_only=False, title=source.name, progress=progress)


def asked_moments(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    modules: Sequence[str],
    forms: Forms,
    *,
    cache: Path | None,
    seed: int = 0,
    progress: bool,
) -> Moments | None:
    """Returns the second moments of the modules' inputs where a model's own prompts end.

    The prompts are those of the sampled text that `text_moments` measures (see `asked_prompts`);
    what is asked for their last tokens alone. Computed once and kept, as that is.

    Args:
        model: A causal language model, as it is before an edit.
        tokenizer: Its tokenizer.
        modules: Full names of linear modules.
        forms: The forms in which prompts count (see `prompt_ids`).
        cache: As for `text_moments`, whose sampled text is read there.
        seed: Seed of the sampling.
        progress: Show progress bars.

    Returns:
        The moments; `None` if the model has asked itself nothing.

    Raises:
        LocFTError: As for `text_moments`.
    """
    modules = list(dict.fromkeys(modules))
    widths = _widths(model, modules)
    n_tokens = _SAMPLED_FACTOR * max(widths.values())
    text = sampled_text(model, tokenizer, n_tokens, cache=cache, seed=seed, progress=progress)
    parts = [prompt_ids(model, tokenizer, asked_prompts(text.asked), forms)]
    if not parts[0]:
        return None
    return _kept(
        model, widths, parts, cache, last_only=True, title="sampled prompts", progress=progress
    )


def chat_moments(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    modules: Sequence[str],
    template: ChatTemplate,
    *,
    cache: Path | None,
    seed: int = 0,
    progress: bool,
) -> Moments:
    """Returns the second moments of the modules' inputs over conversations of the model's own.

    Computed once and kept, as `text_moments` are; see `chat_text`.

    Args:
        model: A causal language model, as it is before an edit.
        tokenizer: Its tokenizer.
        modules: Full names of linear modules.
        template: Its chat template.
        cache: As for `text_moments`.
        seed: Seed of the sampling.
        progress: Show progress bars.

    Raises:
        LocFTError: As for `text_moments` and `chat_text`.
    """
    modules = list(dict.fromkeys(modules))
    widths = _widths(model, modules)
    n_tokens = _SAMPLED_FACTOR * max(widths.values())
    sequences = chat_text(
        model, tokenizer, template, n_tokens, cache=cache, seed=seed, progress=progress
    )
    parts = [within_context(model, sequences)]
    return _kept(
        model, widths, parts, cache, last_only=False, title="sampled chats", progress=progress
    )


def prompt_ids(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], forms: Forms
) -> list[list[int]]:
    """Returns prompts as tokens up to where an answer is to begin.

    Each in its plain form, and in one other by turns: all forms of all prompts would take minutes
    and say little more. Of a prompt beyond the model's context the end is kept.
    """
    context, n_others = context_length(model) or 0, len(forms) - 1
    asked = []
    for i, prompt in enumerate(prompts):
        asked.append(forms.ask(0, prompt, "", i))
        if n_others:
            asked.append(forms.ask(1 + i % n_others, prompt, "", i))
    return [ids[-context:] for ids in asked_ids(tokenizer, asked)]


def answered_ids(
    model: Any, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked]
) -> list[tuple[list[int], int]]:
    """Returns each text with its answer, up to the token that the answer's last one follows.

    With it, how many of its last tokens predict one of the target. Of what is beyond the model's
    context the end is kept.
    """
    context, eos = context_length(model) or 0, tokenizer.eos_token_id
    texts = tokenize_asked(tokenizer, asked, append_end=False)
    found = []
    for i, target_start in enumerate(texts.target_start.tolist()):
        ids = texts.ids[texts.offsets[i] : texts.offsets[i + 1]].tolist()
        if ids[-1] == eos:  # some tokenizers add one by themselves
            ids.pop()
        read = ids[:-1][-context:]
        found.append((read, min(len(ids) - target_start, len(read))))
    return found


def _widths(model: Any, modules: Sequence[str]) -> dict[str, int]:
    """Returns each module's D.

    Raises:
        ModelError: A module does not exist or is not linear.
    """
    check_modules(model, modules)
    return {module: input_width(model.get_submodule(module)) for module in modules}


def _kept(
    model: Any,
    widths: Mapping[str, int],
    parts: Sequence[list[list[int]]],
    cache: Path | None,
    *,
    last_only: bool,
    title: str,
    progress: bool,
) -> Moments:
    """Returns the mean of the parts' moments; what is not in the cache yet is computed and kept.

    Args:
        model: The model.
        widths: Each module's D.
        parts: Token sequences of each part.
        cache: The folder; `None` keeps nothing.
        last_only: Only the last token of each sequence counts.
        title: What is measured, for the progress bar.
        progress: Show a progress bar.
    """
    n_tokens = sum(1 if last_only else len(sequence) for part in parts for sequence in part)
    text = json_sha256(["last tokens", parts] if last_only else parts)
    origin = Origin(model_fingerprint(model), text, n_tokens)
    second = {} if cache is None else read_moments(cache, widths, origin)
    missing = [module for module in widths if module not in second]
    if missing:
        measured = [
            moments_of(
                model,
                part,
                missing,
                last_only=last_only,
                description=f"keys of {title}",
                progress=progress,
            )
            for part in parts
        ]
        for module in missing:
            mean = torch.stack([moments.second[module] for moments in measured]).mean(dim=0)
            second[module] = mean
            if cache is not None:
                write_moments(cache, module, mean, origin)
    return Moments({module: second[module] for module in widths}, n_tokens, origin.text, parts)


def moments_of(
    model: Any,
    sequences: Sequence[list[int]],
    modules: Sequence[str],
    *,
    last_only: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    description: str,
    progress: bool,
) -> Moments:
    """Returns the second moments of the modules' inputs over token sequences.

    Args:
        model: A causal language model.
        sequences: Token ids, in any order; cut to the model's context. Empty ones do not count.
        modules: Full names of linear modules.
        last_only: Only the last token of each sequence counts.
        batch_tokens: Tokens of a batch, padding included; a longer sequence is a batch by itself.
        description: What the progress bar says.
        progress: Show a progress bar.

    Raises:
        ModelError: A module does not exist, is not linear or not run, or gets a NaN or an infinite
            number.
        DataError: There is no token.
    """
    modules = list(dict.fromkeys(modules))
    check_modules(model, modules)
    sums, n_tokens = second_moments(
        model,
        within_context(model, sequences),
        modules,
        last_only=last_only,
        batch_tokens=batch_tokens,
        description=description,
        progress=progress,
    )
    second = {}
    for module in modules:
        second[module] = sums.pop(module).div_(n_tokens).to("cpu", torch.float32)
        check_finite(second[module], module)
    return Moments(second, n_tokens, json_sha256(sequences))


def _parts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    width: int,
    cache: Path | None,
    seed: int,
    progress: bool,
) -> list[list[list[int]]]:
    """Returns the token sequences of each kind of text that `source` stands for."""
    if source.kind == SAMPLED:
        text = sampled_text(
            model, tokenizer, _SAMPLED_FACTOR * width, cache=cache, seed=seed, progress=progress
        )
        kinds = [text.documents, text.opened]
        return [within_context(model, ids_of(tokenizer, texts)) for texts in kinds if texts]
    pieces = [piece for passage in source.texts for piece in pieces_of(passage, _PIECE_CHARS)]
    sequences = ids_of(tokenizer, pieces)
    context = context_length(model) or max(map(len, sequences), default=1)
    # Of scripts with several tokens a letter a piece may be longer than the context.
    return [[ids[i : i + context] for ids in sequences for i in range(0, len(ids), context)]]


def _check_enough(source: Source, n_tokens: int, width: int, module: str) -> None:
    needed = _LEAST_FACTOR * width
    if n_tokens < needed:
        raise PreserveError(
            f"`preserve: {source.name}` has {n_tokens} tokens; at least {needed} are needed, "
            f"{_LEAST_FACTOR} x the {width} inputs of `{module}`: fewer tokens than inputs leave "
            f"directions that the text says nothing of. Give more text, or `{SAMPLED}`."
        )
