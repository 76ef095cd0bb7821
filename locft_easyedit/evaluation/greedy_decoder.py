"""Greedy answers, each the one that its prompt would get alone.

In float32, where the two best tokens are so close that rounding could decide, that prompt is run
alone, without a cache. In half precision texts run in fixed shapes instead (see `decoding`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenization import CHUNK, Asked, GrowingTexts, TokenizedTexts, asked_ids, ids_of
from ..modeling.devices import input_device
from ..modeling.modes import evaluation_mode
from ..modeling.near_ties import too_close
from ..utils.progress import progress_bar
from .answers import STOPS, up_to_stop
from .decoding import decode_, end_tokens, stop_tokens
from .growing_texts import Done
from .predictions import ArgmaxPredictions, ArgmaxPredictor, EvalConfig, Wrapper, fixed_cells


class GreedyDecoder:
    """Greedy answers to a fixed set of prompts, to be taken before and after an edit.

    An answer that is expected (an edit's target, say) is checked in one forward pass over prompt
    and answer, as a draft in speculative decoding is. Only where the model's own first choice
    differs is the rest generated token by token. The answers are those of plain greedy decoding.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Plain prompts; or texts with the answers that are expected of them (`Asked`), which
            may be those of a chat, and whose own end ends an answer as well as the model's.
        drafts: The answer that is expected of each plain prompt.
        how: How prompts are run.
        max_new_tokens: Tokens of an answer, at most.
        still_open: Says of prompt i whether the rest of an answer that begins so is wanted; `None`
            wants all answers whole.
        inner_stops: How many stops the answer to each prompt may have before it ends at one; 0 if
            `None`.

    Attributes:
        not_finite: Prompts for which the last measurement met logits that are NaN or infinite;
            their answers are meaningless.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str] | Sequence[Asked],
        drafts: Sequence[str] | None,
        how: EvalConfig,
        *,
        max_new_tokens: int,
        still_open: Callable[[int, str], bool] | None = None,
        inner_stops: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.how = how
        self._still_open = still_open
        self._inner_stops = inner_stops or [0] * len(prompts)
        self.max_new_tokens = max_new_tokens
        self.ends = end_tokens(model, tokenizer)
        self.stops = stop_tokens(tokenizer)
        self.not_finite: set[int] = set()
        asked = [prompt for prompt in prompts if isinstance(prompt, Asked)]
        self._own_ends = [one.end for one in asked] or [None] * len(prompts)
        self._texts = self._tokenized(prompts, drafts)
        self._choices = ArgmaxPredictor(model, self._texts, how)

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each prompt, [N]."""
        return self._texts.target_start

    def _tokenized(self, prompts: Sequence[Any], drafts: Sequence[str] | None) -> TokenizedTexts:
        """Returns each prompt with its draft and an end token after it: at least one token."""
        growing = GrowingTexts()
        for first in range(0, len(prompts), CHUNK):
            part = prompts[first : first + CHUNK]
            if drafts is None:
                alone = asked_ids(self.tokenizer, part)
                whole = [replace(one, text=one.text + one.answer) for one in part]
                both = asked_ids(self.tokenizer, whole)
            else:
                alone = ids_of(self.tokenizer, part)
                expected = drafts[first : first + CHUNK]
                texts = [f"{p} {d.strip()}" for p, d in zip(part, expected, strict=True)]
                both = ids_of(self.tokenizer, texts)
            for i, (ids, with_answer) in enumerate(zip(alone, both, strict=True), first):
                growing.add(ids + self._draft(i, ids, with_answer), len(ids))
        return growing.finished()

    def _draft(self, i: int, prompt: list[int], whole: list[int]) -> list[int]:
        """Returns the tokens of prompt i's expected answer, with an end token: at least one.

        Args:
            i: Number of the prompt.
            prompt: Its tokens.
            whole: Those of prompt and answer.
        """
        own = self._own_ends[i]
        end = self.ends[:1] or [0] if own is None else [own]
        # Where a token reaches over the end of the prompt there is no draft to be had.
        follows = whole[: len(prompt)] == prompt
        draft = [t for t in whole[len(prompt) :] if not self._ends(i, t)] if follows else []
        return (draft + end)[: self.max_new_tokens]

    def _ends(self, i: int, token: int) -> bool:
        """Returns whether a token ends the answer to prompt i."""
        return token in self.ends or token == self._own_ends[i]

    def answers(self, description: str, only: np.ndarray | None = None) -> list[str]:
        """Returns the answer to each prompt, up to its end token or a stop ("." or a line's end).

        Args:
            description: Label of the progress bar.
            only: Indices of the prompts that are asked; the others' answers are empty.
        """
        indices = range(len(self._texts)) if only is None else only.tolist()
        if self.how.wrapper is not None:
            return self._through(self.how.wrapper, indices, description)
        chosen = self._choices.take(description, only)
        self.not_finite = set(self._choices.not_finite)
        description = f"{description}, word by word"
        answers = [""] * len(self._texts)
        open_, lengths = array("q"), array("q")
        for i in indices:
            if i in self.not_finite:
                continue
            ids = self._begun(i, chosen)
            if self._complete(i, ids):
                answers[i] = self._text(i, ids)
            else:
                open_.append(i)
                lengths.append(len(ids))

        def done(j: int, ids: list[int]) -> bool:
            if ids[-1] < 0:
                self.not_finite.add(open_[j])
            return ids[-1] < 0 or self._complete(open_[j], ids)

        def end(j: int, ids: list[int]) -> None:
            if open_[j] not in self.not_finite:
                answers[open_[j]] = self._text(open_[j], ids)

        if self.how.stream is not None:
            sequences = [self._begun(i, chosen) for i in open_]
            decode_streamed_(self.model, sequences, done, self.how, description)
            for j, ids in enumerate(sequences):
                end(j, ids)
        else:
            decode_(
                self.model,
                np.array(lengths, np.int64),
                lambda j: self._begun(open_[j], chosen),
                end,
                pick=self._pick,
                done=done,
                batch_size=self.how.batch_size,
                description=description,
                progress=self.how.progress and only is None and bool(open_),
            )
        return answers

    def _through(self, wrapper: Wrapper, indices: Sequence[int], description: str) -> list[str]:
        """Returns the answers that what is around the model gives, one after the other."""
        answers = [""] * len(self._texts)
        with evaluation_mode(self.model):
            for i in progress_bar(indices, desc=description, show=self.how.progress):
                first = int(self._texts.offsets[i])
                ids = self._texts.ids[first : first + int(self.prompt_lengths[i])].tolist()
                whole = wrapper.generate(ids, self.max_new_tokens, partial(self._complete, i))
                answers[i] = self._text(i, whole)
        return answers

    def _begun(self, i: int, chosen: ArgmaxPredictions) -> list[int]:
        """Returns prompt i with as much of its answer as the draft has shown."""
        first = int(self._texts.offsets[i])
        prompt: list[int] = self._texts.ids[first : first + int(self.prompt_lengths[i])].tolist()
        return prompt + self._accepted(i, chosen[i])

    def _accepted(self, i: int, choices: list[int]) -> list[int]:
        """Returns the first choices as far as they followed from the draft."""
        draft = self._texts.target(i)
        agreed = next((k for k, c in enumerate(choices) if c != draft[k]), len(choices) - 1)
        answer = choices[: agreed + 1]
        for k, token in enumerate(answer):
            if self._ends(i, token) or self._stops(i, answer[: k + 1]):
                return answer[: k + 1]
        return answer

    def _alone(self, ids: list[int]) -> int:
        """Returns the first choice after one text, run by itself."""
        inputs = torch.tensor([ids], device=input_device(self.model))
        return int(self.model(input_ids=inputs, use_cache=False).logits[0, -1].argmax())

    def _pick(
        self, logits: torch.Tensor, texts: np.ndarray, sequences: list[list[int]]
    ) -> torch.Tensor:
        best = logits.topk(2, dim=-1)
        tokens = best.indices[:, 0].clone()
        if fixed_cells(self.model):
            near = torch.zeros_like(tokens, dtype=torch.bool)
        else:
            near = too_close(best.values, self.model)
        for row in near.nonzero().flatten().tolist():
            tokens[row] = self._alone(sequences[row])
        return torch.where(torch.isfinite(best.values[:, 0]), tokens, -1)

    def _complete(self, i: int, ids: list[int]) -> bool:
        n_new = len(ids) - int(self.prompt_lengths[i])
        if n_new <= 0:
            return False
        if n_new >= self.max_new_tokens or self._ends(i, ids[-1]):
            return True
        if self._stops(i, ids[int(self.prompt_lengths[i]) :]):
            return True
        return self._still_open is not None and not self._still_open(i, self._text(i, ids))

    def _text(self, i: int, ids: list[int]) -> str:
        """Returns the answer in the ids of prompt i and what follows, up to the first stop."""
        ids = ids[int(self.prompt_lengths[i]) :]
        end = next((k for k, token in enumerate(ids) if self._ends(i, token)), len(ids))
        text = str(self.tokenizer.decode(ids[:end], skip_special_tokens=True))
        return up_to_stop(text, self._inner_stops[i])

    def _stops(self, i: int, answer: list[int]) -> bool:
        """Returns whether the last token of what was answered to prompt i holds its last stop."""
        if answer[-1] not in self.stops:
            return False
        if not self._inner_stops[i]:
            return True
        text = str(self.tokenizer.decode(answer, skip_special_tokens=True))
        return sum(map(text.count, STOPS)) > self._inner_stops[i]


def decode_streamed_(
    model: PreTrainedModel,
    sequences: list[list[int]],
    done: Done,
    how: EvalConfig,
    description: str,
) -> None:
    """Appends a token to every open sequence in each pass over frozen layers on disk.

    Args:
        model: A causal language model.
        sequences: The tokens of each text, changed in place; -1 is appended where logits are no
            finite numbers.
        done: Called after each token; a text is asked for at least one.
        how: How texts are run, with the stream of frozen layers.
        description: Label of the progress bars.
    """
    open_ = list(range(len(sequences)))
    while open_:
        # What comes last is only predicted: any token holds its place.
        texts = TokenizedTexts.from_lists(
            [[*sequences[i], 0] for i in open_], [len(sequences[i]) for i in open_]
        )
        choices = ArgmaxPredictor(model, texts, how)
        taken = choices.take(description)
        for k, i in enumerate(open_):
            sequences[i].append(-1 if k in choices.not_finite else taken[k][0])
        choices.close()
        open_ = [i for i in open_ if not done(i, sequences[i])]
