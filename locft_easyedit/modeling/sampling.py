"""Text drawn from a model's own distribution: ancestral sampling at temperature 1.

It is sampled in rounds that are kept in files: what was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..errors import ModelError
from ..utils.files import output_errors, write_atomically
from ..utils.hashing import json_sha256, model_fingerprint
from ..utils.parsing import is_file
from .devices import context_length, input_device
from .forward import head_sees
from .modes import evaluation_mode

logger = logging.getLogger(__name__)

_FORMAT = 3


@dataclass(frozen=True)
class TextKind:
    """Texts that a round has.

    Attributes:
        name: What they are called.
        beginnings: Token ids that they begin with, in turn; never empty ones.
        n_texts: Texts of a round.
        n_tokens: Tokens that the model adds to each at most.
    """

    name: str
    beginnings: Sequence[list[int]]
    n_texts: int
    n_tokens: int

    def begun(self, number: int) -> list[list[int]]:
        """Returns what the texts of a round begin with."""
        first = number * self.n_texts
        return [
            self.beginnings[i % len(self.beginnings)] for i in range(first, first + self.n_texts)
        ]


class TextSampler:
    """Samples text round by round.

    A round depends on the seed and its number alone, so that asking for more of them gives the same
    text and more. Random states are left as they were.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        kinds: What each round has.
        cache: A folder where rounds are kept; `None` keeps nothing.
        seed: Seed of the sampling.
        cache_errors: Makes a context manager for writing a file, which turns errors of the disk
            into an `OutputError`.
        on_step: Called after each forward pass, which adds a token to every text of a kind.

    Raises:
        ModelError: The tokenizer has neither BOS nor EOS.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        kinds: Sequence[TextKind],
        *,
        cache: Path | None,
        seed: int = 0,
        cache_errors: Callable[[Path], AbstractContextManager[None]] = output_errors,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        self._model, self._tokenizer, self._seed = model, tokenizer, seed
        self._kinds, self._cache_errors, self._on_step = kinds, cache_errors, on_step
        self._padding = first_token(tokenizer)  # decoding leaves it out
        words = [len(tokenizer), self._padding, tokenizer.eos_token_id]
        texts = [dataclasses.asdict(kind) for kind in kinds]
        self._key = json_sha256([_FORMAT, model_fingerprint(model), seed, words, texts])
        self._folder = None if cache is None else cache / f"sampled-{self._key[:10]}"

    def round(self, number: int) -> dict[str, list[str]]:
        """Returns the texts of a round by their kind, beginnings included; new ones are kept first.

        Raises:
            OutputError: They cannot be kept.
        """
        file = None if self._folder is None else self._folder / f"{number:05}.json"
        texts = None if file is None else self._read(file, number)
        if texts is None:
            texts = {kind.name: self._sampled(kind, number) for kind in self._kinds}
            if file is not None:
                with self._cache_errors(file):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(file, json.dumps(self._content(number, texts)).encode())
        return texts

    def _sampled(self, kind: TextKind, number: int) -> list[str]:
        ids, mask = padded_left(kind.begun(number), self._padding)
        n_tokens, context = kind.n_tokens, context_length(self._model)
        if context is not None:
            n_tokens = max(1, min(n_tokens, context - ids.shape[1]))
        device = input_device(self._model)
        name = f"{self._seed} {kind.name} {number}".encode()
        with seeded(self._model, int.from_bytes(hashlib.sha256(name).digest()[:7], "little")):
            return continuations(
                self._model,
                self._tokenizer,
                ids.to(device),
                mask.to(device),
                n_tokens,
                on_step=self._on_step,
            )

    def _content(self, number: int, texts: dict[str, list[str]]) -> dict[str, Any]:
        return {"of": self._key, "round": number, **texts, "sha256": json_sha256(texts)}

    def _read(self, file: Path, number: int) -> dict[str, list[str]] | None:
        """Returns the round in a file; one that is of no use is reported."""
        if not is_file(file):
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            texts = {kind.name: content[kind.name] for kind in self._kinds}
            if content == self._content(number, texts):
                return texts
            other = content["of"] != self._key or content["round"] != number
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            other = False
        what = "is of another model or sampling" if other else "is damaged"
        logger.warning("%s %s and is made anew.", file, what)
        return None


def padded_left(
    begun: Sequence[list[int]], padding: int, width: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns beginnings that end in the same column, and which of their tokens are real, [B, T].

    Args:
        begun: Token ids; never empty ones.
        padding: The id that fills up.
        width: T at least.
    """
    width = max(width, *map(len, begun))
    ids = torch.full((len(begun), width), padding)
    mask = torch.zeros_like(ids)
    for row, real, start in zip(ids, mask, begun, strict=True):
        row[width - len(start) :] = torch.tensor(start)
        real[width - len(start) :] = 1
    return ids, mask


@contextmanager
def seeded(model: Any, seed: int) -> Iterator[None]:
    """Seeds torch for a while; its random states and the model's settings are put back after."""
    device = input_device(model)
    # `torch.manual_seed` seeds all GPUs' generators.
    devices = list(range(torch.cuda.device_count())) if device.type == "cuda" else []
    settings = model.generation_config
    # A model's own top_k or repetition penalty would make its text unlike what it was trained on.
    model.generation_config = GenerationConfig()
    try:
        with torch.random.fork_rng(devices=devices), evaluation_mode(model), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        model.generation_config = settings


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token that a document begins with: BOS, or EOS where there is no BOS.

    Raises:
        ModelError: The tokenizer has neither.
    """
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ModelError(
            "The tokenizer has neither BOS nor EOS for the model to begin text of its own with. "
            "Set `bos_token`, or give text in place of what the model would sample."
        )
    return int(first)


class _Watched(StoppingCriteria):
    """Stops nothing: tells of each step of `generate`."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self._on_step = on_step

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._on_step()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def continuations(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    mask: torch.Tensor,
    n_tokens: int,
    *,
    on_step: Callable[[], None] | None = None,
) -> list[str]:
    """Returns texts with what the model goes on with, until EOS; use it within `seeded`.

    Beginnings are included: many tokenizers leave out the space that a text begins with, so that
    what was added alone could not be put behind its beginning.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        ids: What each text begins with, padded on the left, [B, T].
        mask: Which of these tokens are real, [B, T].
        n_tokens: Tokens to add at most.
        on_step: Called after each forward pass, which adds a token to every text.

    Raises:
        ModelError: The tokenizer has neither BOS nor EOS.
    """
    watched = [] if on_step is None else [_Watched(on_step)]
    end = tokenizer.eos_token_id
    end = first_token(tokenizer) if end is None else end
    # As they are, but contiguous: `generate` gives it a slice, the beginnings' last column.
    with head_sees(model, lambda hidden: hidden):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=n_tokens,
            eos_token_id=end,
            pad_token_id=end,
            stopping_criteria=StoppingCriteriaList(watched),
        )
    texts: list[str] = tokenizer.batch_decode(output, skip_special_tokens=True)
    return texts
