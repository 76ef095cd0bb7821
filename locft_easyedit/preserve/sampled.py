"""Text of the model's own, sampled in batches that are kept: what was interrupted goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..devices import context_length, input_device
from ..errors import ModelError
from ..files import write_atomically
from ..hashes import json_sha256, model_fingerprint
from ..reading import is_file
from ..sampling import continuations, first_token, seeded
from ..tokens import ids_of, unended_ids
from .asked import BEGINNINGS
from .stored import cache_errors

logger = logging.getLogger(__name__)

# Questions and beginnings of statements, which text from BOS on seldom has.
OPENINGS = (
    "Question:", "Q:", "Who", "What", "When", "Where", "Which", "How", "In what year",
    "The name of the", "The", "In",
)  # fmt: skip
_DOCUMENTS = 128  # of each kind, at least
_BATCH = 32
_DOCUMENT_TOKENS, _OPENED_TOKENS = 128, 32
_ASKED_EACH, _ASKED_TOKENS = 7, 24  # of each beginning of `asked`, in a round
_FORMAT = 2
# A model that ends nearly every text at once would otherwise be sampled without end.
_MOST_ROUNDS = 10  # times what is expected


@dataclass(frozen=True)
class SampledText:
    """What a model writes.

    Attributes:
        documents: Begun with BOS, at most 128 tokens.
        opened: Begun with `OPENINGS` in turn, which go on with at most 32 tokens.
        asked: Begun with each of `asked.BEGINNINGS` 7 times a round, with at most 24 tokens more.
    """

    documents: list[str]
    opened: list[str]
    asked: list[str]


def sampled_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    n_tokens: int,
    *,
    cache: Path | None,
    seed: int = 0,
    progress: bool,
) -> SampledText:
    """Returns text sampled from the model: at least 128 documents and as many opened ones.

    Round by round, a batch of each kind, until documents and opened ones have `n_tokens`. A round
    depends on the seed and its number alone, so that asking for more tokens gives the same text and
    more, and what was interrupted goes on where it stopped. Random states are left as they were.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        n_tokens: Tokens of documents and opened ones at least.
        cache: A folder where each round is kept; `None` keeps nothing.
        seed: Seed of the sampling.
        progress: Show a progress bar.

    Raises:
        ModelError: There is no token to begin with, or the model hardly writes anything.
        OutputError: A round cannot be kept.
    """
    rounds = _Rounds(model, tokenizer, cache, seed)
    text = SampledText([], [], [])
    found = 0
    expected = max(_DOCUMENTS, -(-n_tokens // (_DOCUMENT_TOKENS + _OPENED_TOKENS)))
    most = _MOST_ROUNDS * -(-expected // _BATCH)
    bar = tqdm(desc="sampling text", total=2 * expected, unit="document", disable=not progress)
    with bar:
        for number in range(most):
            new = rounds.get(number)
            text.documents.extend(new.documents)
            text.opened.extend(new.opened)
            text.asked.extend(new.asked)
            found += sum(map(len, ids_of(tokenizer, [*new.documents, *new.opened])))
            bar.total = max(2 * expected, len(text.documents) + len(text.opened))
            bar.update(len(new.documents) + len(new.opened))
            if min(len(text.documents), len(text.opened)) >= _DOCUMENTS and found >= n_tokens:
                return text
    raise ModelError(
        f"The model hardly writes anything by itself: {len(text.documents)} documents that are not "
        f"blank, and {found} tokens of {n_tokens}, in {most * _BATCH} tries. Put a text file in "
        "place of `sampled`."
    )


class _Rounds:
    """The rounds of one model's text, from the cache where it has them."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, cache: Path | None, seed: int
    ) -> None:
        self._model, self._tokenizer, self._seed = model, tokenizer, seed
        self._starts = [[first_token(tokenizer)]] * _BATCH
        self._openings = unended_ids(tokenizer, OPENINGS)
        self._asked = unended_ids(tokenizer, BEGINNINGS) * _ASKED_EACH
        sizes = [_BATCH, _DOCUMENT_TOKENS, _OPENED_TOKENS, _ASKED_TOKENS]
        begun = [self._openings, self._asked]
        words = [len(tokenizer), self._starts[0], tokenizer.eos_token_id, *begun]
        texts = [OPENINGS, BEGINNINGS]
        self._key = json_sha256([_FORMAT, model_fingerprint(model), seed, sizes, texts, words])
        self._folder = None if cache is None else cache / f"sampled-{self._key[:10]}"

    def get(self, number: int) -> SampledText:
        """Returns a round; a new one is kept before it is given."""
        file = None if self._folder is None else self._folder / f"{number:05}.json"
        kept = None if file is None else self._read(file, number)
        if kept is not None:
            return kept
        drawn = self._draw("documents", number, self._starts, _DOCUMENT_TOKENS)
        turns = [(number * _BATCH + i) % len(OPENINGS) for i in range(_BATCH)]
        begun = [self._openings[i] for i in turns]
        opened = self._draw("opened", number, begun, _OPENED_TOKENS)
        asked = self._draw("asked", number, self._asked, _ASKED_TOKENS)
        text = SampledText([document for document in drawn if document.strip()], opened, asked)
        if file is not None:
            with cache_errors(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, json.dumps(self._content(number, text)).encode())
        return text

    def _draw(self, kind: str, number: int, begun: Sequence[list[int]], n_tokens: int) -> list[str]:
        """Returns each beginning with what the model adds to it."""
        device = input_device(self._model)
        width = max(len(start) for start in begun)
        # Padded on the left, with a token that decoding leaves out.
        ids = torch.full((len(begun), width), first_token(self._tokenizer))
        mask = torch.zeros_like(ids)
        for row, real, start in zip(ids, mask, begun, strict=True):
            row[width - len(start) :] = torch.tensor(start)
            real[width - len(start) :] = 1
        context = context_length(self._model)
        if context is not None:
            n_tokens = max(1, min(n_tokens, context - width))
        name = f"{self._seed} {kind} {number}".encode()
        with seeded(self._model, int.from_bytes(hashlib.sha256(name).digest()[:7], "little")):
            return continuations(
                self._model, self._tokenizer, ids.to(device), mask.to(device), n_tokens, whole=True
            )

    def _content(self, number: int, text: SampledText) -> dict[str, Any]:
        texts = dataclasses.asdict(text)
        return {"of": self._key, "round": number, **texts, "sha256": json_sha256(texts)}

    def _read(self, file: Path, number: int) -> SampledText | None:
        """Returns the round in a file; one that is of no use is reported."""
        if not is_file(file):
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            text = SampledText(*(content[field.name] for field in dataclasses.fields(SampledText)))
            texts = [*text.documents, *text.opened, *text.asked]
            if content == self._content(number, text) and all(isinstance(t, str) for t in texts):
                return text
            other = content["of"] != self._key or content["round"] != number
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            other = False
        what = "is of another model or sampling" if other else "is damaged"
        logger.warning("%s %s and is made anew.", file, what)
        return None
