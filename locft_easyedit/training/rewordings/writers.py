"""Who writes rewordings: the model being edited, another one from a folder, or an endpoint."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...data.batching import in_batches, length_sorted_batches
from ...data.forms import ChatTemplate
from ...data.tokenization import ids_of
from ...errors import ModelError, RewordingsError
from ...hparams import LocFTBFHyperParams
from ...hparams_rules import EDITED, ENDPOINT
from ...modeling.devices import context_length, input_device
from ...modeling.loading import load_causal_lm, load_tokenizer
from ...modeling.sampling import padded_left, seeded
from ...utils.memory import is_out_of_memory
from ...utils.parsing import shown
from .endpoint import Endpoint
from .instruction import N_ASKED, Prompt, instruction
from .rewording_cache import cache_file

# A small model that always takes the likeliest token soon repeats itself.
_TEMPERATURE = 0.7
_TOKENS_A_LINE = 8  # beside what the prompt has: most rewordings are a little longer


class Writer(Protocol):
    """Who answers instructions."""

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[str, bool]]:
        """Yields each answer in order, and whether it came to its end."""


class LocalWriter:
    """A model in memory, asked in its chat template, all prompts in one batch.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        template: Its chat template.
        seed: Seed of the sampling.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, seed: int
    ) -> None:
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._seed = seed

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[str, bool]]:
        """Yields the answers; a prompt that leaves no room for one in the context gets none."""
        texts = []
        for prompt in prompts:
            example, message = instruction(prompt)
            texts.append(self._template.ask(message, earlier=[example]) + self._template.lead)
        ids = ids_of(self._tokenizer, texts, special_tokens=False)
        own = ids_of(self._tokenizer, [prompt.text for prompt in prompts], special_tokens=False)
        n_tokens = N_ASKED * (max(map(len, own)) + _TOKENS_A_LINE)
        most = context_length(self._model) or math.inf
        fitting = [i for i, one in enumerate(ids) if len(one) + n_tokens <= most]
        found: dict[int, tuple[str, bool]] = {}

        def run(batch: np.ndarray) -> None:
            chosen = [fitting[i] for i in batch]
            written = self._written([ids[i] for i in chosen], n_tokens)
            found.update(zip(chosen, written, strict=True))

        lengths = np.array([len(ids[i]) for i in fitting], np.int64)
        batches = length_sorted_batches(lengths, max(1, len(fitting)))
        in_batches(batches, run, description="writing")
        for i in range(len(prompts)):
            yield found.get(i, ("", True))

    def _written(self, begun: list[list[int]], n_tokens: int) -> list[tuple[str, bool]]:
        """Returns what the model goes on with, and whether it ended its turn."""
        ends = {self._template.end_of_turn, self._tokenizer.eos_token_id} - {None}
        ids, mask = padded_left(begun, self._template.end_of_turn)
        device = input_device(self._model)
        with seeded(self._model, self._seed):
            output = self._model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                do_sample=True,
                temperature=_TEMPERATURE,
                top_k=0,
                top_p=1.0,
                max_new_tokens=n_tokens,
                eos_token_id=sorted(ends),
                pad_token_id=self._template.end_of_turn,
            )
        new = output[:, ids.shape[1] :].tolist()
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        return [(text, bool(ends & set(one))) for text, one in zip(texts, new, strict=True)]


def writer_name(hparams: LocFTBFHyperParams, model: Any) -> str:
    """Returns the name under which a writer's rewordings are kept.

    A local model is known by its folder's name, so that the file can be passed on.

    Args:
        hparams: `augment_model`.
        model: The model being edited.
    """
    value = str(hparams.augment_model)
    if value.startswith(ENDPOINT):
        return value
    folder = getattr(model, "name_or_path", "") if value == EDITED else value
    return Path(folder).expanduser().resolve().name if folder else type(model).__name__


def check_writer(
    hparams: LocFTBFHyperParams, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Checks, before any weights are loaded, that `augment_model` can write and be kept.

    Args:
        hparams: The hyper-parameters.
        tokenizer: That of the model being edited; `None` reads it from `model_name`.

    Raises:
        RewordingsError: The environment names no endpoint, a folder is none, a tokenizer has no
            chat template that can be used, or there is no place for the cache.
        ModelError: A tokenizer cannot be loaded.
    """
    value = hparams.augment_model
    if value is None:
        return
    cache_file(hparams)
    if value.startswith(ENDPOINT):
        Endpoint(value.removeprefix(ENDPOINT))
    elif value != EDITED:
        _template(hparams, load_tokenizer(_folder(value), hparams.trust_remote_code))
    elif tokenizer is not None or isinstance(hparams.model_name, (tuple, list)):
        _template(hparams, tokenizer or hparams.model_name[1])
    elif isinstance(hparams.model_name, str):
        _template(hparams, load_tokenizer(hparams.model_name, hparams.trust_remote_code))


@contextmanager
def opened_writer(
    hparams: LocFTBFHyperParams, model: Any, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Writer]:
    """Context manager that gives the writer; a model that was loaded for it goes afterwards.

    Args:
        hparams: `augment_model`, `seed`, `trust_remote_code`.
        model: The model being edited, on whose device another one is loaded.
        tokenizer: Its tokenizer.

    Raises:
        LocFTError: As for `check_writer`, or the other model cannot be loaded or has no room.
    """
    value = str(hparams.augment_model)
    if value.startswith(ENDPOINT):
        yield Endpoint(value.removeprefix(ENDPOINT))
        return
    if value == EDITED:
        yield LocalWriter(model, tokenizer, _template(hparams, tokenizer), hparams.seed)
        return
    device = input_device(model)
    other: Any = None
    own: Any = None
    try:
        other, own = load_causal_lm(
            _folder(value),
            device=str(device),
            dtype=model.dtype,
            trust_remote_code=hparams.trust_remote_code,
        )
        yield LocalWriter(other, own, _template(hparams, own), hparams.seed)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RewordingsError(
            f"`augment_model={value}`: {device} has no room for it beside the model being edited. "
            "Have it write with `device: cpu` first (the same `augment_cache` serves both), or "
            "serve it as an endpoint."
        ) from error
    finally:
        other = own = None
        gc.collect()
        torch.cuda.empty_cache()


def _folder(value: str) -> str:
    path = Path(value).expanduser()
    if not path.is_dir():
        raise RewordingsError(
            f"`augment_model={shown(value)}` is no folder. Give `{EDITED}`, `{ENDPOINT}NAME`, or "
            "the folder of a model."
        )
    # As a path: a name of one part would look like a hub's.
    return str(path.resolve())


def _template(hparams: LocFTBFHyperParams, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    try:
        return ChatTemplate(tokenizer)
    except ModelError as error:
        reason = str(error).partition(". ")[0]
        raise RewordingsError(
            f"`augment_model={shown(hparams.augment_model)}` is asked in its chat template. "
            f"{reason}. Name the folder of an instruction-tuned model, or an endpoint."
        ) from error
