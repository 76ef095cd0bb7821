"""The rewordings of edits that a language model writes: asked for, filtered, kept, and handed on.

Nothing here looks at the rephrase prompts of the data, which are for evaluation.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.requests import Edit, EditSet, gives_away
from ...distributed.world import World
from ...errors import ModelError, RewordingsError
from ...hparams import LocFTBFHyperParams
from ...modeling.fsdp import sharded_layers
from ...utils.hashing import model_fingerprint
from ...utils.progress import progress_bar
from .answer_filter import MOST_NATS, AnswerFilter
from .instruction import Prompt, rewordings_in
from .rewording_cache import Key, Line, RewordingCache, cache_file
from .text_filter import REASONS, SAME, TARGET, objection
from .writers import Writer, opened_writer, writer_name

logger = logging.getLogger(__name__)

ANSWER = "answer"  # the reason of the answer filter
_BATCH = 16  # prompts asked for together, after which they are kept
_LONG = 120.0  # seconds that are worth a word beforehand


def with_written_rewordings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: EditSet,
    subjects: Sequence[str | None],
    hparams: LocFTBFHyperParams,
    *,
    world: World,
    progress: bool = False,
) -> tuple[EditSet, dict[str, Any]]:
    """Returns the edits with the rewordings that `augment_model` writes, and figures for JSON.

    They stand after those that a request brings. Rank 0 asks, for all.

    Args:
        model: The model, before the edit.
        tokenizer: Its tokenizer.
        edits: The edits.
        subjects: The subject of each; `None` where it is not known.
        hparams: `augment_model`, `augment_cache`, `seed`, and what `AnswerFilter` needs.
        world: The processes that train together.
        progress: Show a progress bar.

    Raises:
        ModelError: This process has only a part of the model.
        RewordingsError: The cache cannot be used, or an endpoint fails; what was written until then
            is in the cache.
        OutputError: The cache cannot be written to.
    """
    with world.sharing_errors():
        _check_whole(model)

    def find() -> tuple[list[list[str]], dict[str, Any]]:
        desk = _Desk(model, tokenizer, hparams, progress)
        return desk.rewordings_of(edits.edits, subjects)

    texts, summary = world.broadcast_from_main(find)
    more = [
        replace(edit, rewordings=tuple(dict.fromkeys([*edit.rewordings, *written])))
        for edit, written in zip(edits.edits, texts, strict=True)
    ]
    return replace(edits, edits=more), summary


class _Desk:
    """Where what is in the cache and what is missing come together."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        hparams: LocFTBFHyperParams,
        progress: bool,
    ) -> None:
        self._model, self._tokenizer, self._hparams = model, tokenizer, hparams
        self._progress = progress
        self._cache = RewordingCache(cache_file(hparams))
        self._filter = AnswerFilter(model, tokenizer, hparams)
        self._writer = writer_name(hparams, model)
        self._judge = model_fingerprint(model)

    def rewordings_of(
        self, edits: Sequence[Edit], subjects: Sequence[str | None]
    ) -> tuple[list[list[str]], dict[str, Any]]:
        """Returns each edit's rewordings, and what became of all that was written."""
        keys: list[Key] = [
            (edit.prompt, subject, self._writer)
            for edit, subject in zip(edits, subjects, strict=True)
        ]
        targets: dict[Key, list[str]] = {}
        for key, edit in zip(keys, edits, strict=True):
            targets.setdefault(key, []).append(edit.target)
        missing = [key for key in targets if self._cache.find(key) is None]
        self._judge_again(targets)
        self._ask(missing, targets)

        dropped: Counter[str] = Counter()
        kept: list[list[str]] = []
        for key, edit in zip(keys, edits, strict=True):
            line = self._line(key)
            dropped.update(one["reason"] for one in line.dropped)
            kept.append([])
            # A user may have changed the line, and an earlier run had other targets.
            for text in line.rewordings:
                if gives_away(text, edit.prompt, edit.target):
                    dropped[TARGET] += 1
                elif objection(text, edit.prompt, None, (), kept[-1]) == SAME:
                    dropped[SAME] += 1
                else:
                    kept[-1].append(text)
        n_kept = sum(map(len, kept))
        return kept, {
            "writer": self._writer,
            "asked": len(missing),
            "from_cache": len(targets) - len(missing),
            "changed_by_hand": sum(self._line(key).by_hand for key in targets),
            "written": n_kept + dropped.total(),
            "kept": n_kept,
            "dropped": {reason: dropped.pop(reason, 0) for reason in (*REASONS, ANSWER)}
            | dict(dropped),
            "edits_without": sum(not texts for texts in kept),
        }

    def _line(self, key: Key) -> Line:
        line = self._cache.find(key)
        assert line is not None
        return line

    def _judge_again(self, targets: Mapping[Key, Sequence[str]]) -> None:
        """Compares anew what another model has judged; what a user has changed stays."""
        found = [line for line in map(self._cache.find, targets) if line is not None]
        others = [one for one in found if not one.by_hand and one.judged_by != self._judge]
        for start in range(0, len(others), _BATCH):
            texts, dropped = [], []
            for line in others[start : start + _BATCH]:
                again = [one["text"] for one in line.dropped if one["reason"] == ANSWER]
                texts.append([*line.rewordings, *again])
                dropped.append([dict(one) for one in line.dropped if one["reason"] != ANSWER])
            keys = [line.key for line in others[start : start + _BATCH]]
            self._cache.add(self._judged(keys, texts, dropped))

    def _ask(self, missing: Sequence[Key], targets: Mapping[Key, Sequence[str]]) -> None:
        """Has the writer reword prompts, and adds what comes of it to the cache batch by batch."""
        if not missing:
            return
        start = time.perf_counter()
        with (
            opened_writer(self._hparams, self._model, self._tokenizer) as writer,
            progress_bar(
                total=len(missing), desc="rewording", unit="prompt", show=self._progress
            ) as bar,
        ):
            loaded = time.perf_counter()
            for first in range(0, len(missing), _BATCH):
                batch = missing[first : first + _BATCH]
                answers, failure = _asked(writer, batch)
                self._keep(batch[: len(answers)], answers, targets)
                bar.update(len(answers))
                if failure is not None:
                    done = first + len(answers)
                    raise RewordingsError(
                        f"{failure} {done} of {len(missing)} prompts are reworded and kept in "
                        f"{self._cache.path}: the same command goes on there."
                    ) from failure
                if first == 0:
                    each = (time.perf_counter() - loaded) / len(batch)
                    self._announce(len(missing), each * len(missing))
        seconds = time.perf_counter() - start
        logger.info("%s reworded %d prompts in %.0f s.", self._writer, len(missing), seconds)

    def _announce(self, n_prompts: int, expected: float) -> None:
        """Says how many seconds all prompts will take, once the first batch has shown it."""
        if self._progress and expected > _LONG:
            logger.warning(
                "Having %d prompts reworded by %s will take about %.0f minutes. What is done is "
                "kept in %s; the same command goes on there.",
                n_prompts,
                self._writer,
                expected / 60,
                self._cache.path,
            )

    def _keep(
        self,
        keys: Sequence[Key],
        answers: Sequence[tuple[str, bool]],
        targets: Mapping[Key, Sequence[str]],
    ) -> None:
        """Filters what was written for some prompts, and adds it to the cache."""
        texts: list[list[str]] = []
        dropped: list[list[dict[str, str]]] = []
        for key, (answer, complete) in zip(keys, answers, strict=True):
            prompt, subject, _ = key
            texts.append([])
            dropped.append([])
            for text in rewordings_in(answer, prompt, complete=complete):
                reason = objection(text, prompt, subject, targets[key], texts[-1])
                if reason is None:
                    texts[-1].append(text)
                else:
                    dropped[-1].append({"text": text, "reason": reason})
        self._cache.add(self._judged(keys, texts, dropped))

    def _judged(
        self,
        keys: Sequence[Key],
        texts: Sequence[Sequence[str]],
        dropped: Sequence[list[dict[str, str]]],
    ) -> list[Line]:
        """Returns lines whose texts the model takes for the same question."""
        groups = [(key[0], list(own)) for key, own in zip(keys, texts, strict=True)]
        lines = []
        for key, own, others, nats in zip(
            keys, texts, dropped, self._filter.divergences(groups), strict=True
        ):
            close = [nat <= MOST_NATS for nat in nats]
            others += [
                {"text": text, "reason": ANSWER, "nats": f"{nat:.2f}"}
                for text, nat, near in zip(own, nats, close, strict=True)
                if not near
            ]
            kept = [text for text, near in zip(own, close, strict=True) if near]
            lines.append(Line.of(key, kept, others, self._judge))
        return lines


def _asked(
    writer: Writer, keys: Sequence[Key]
) -> tuple[list[tuple[str, bool]], RewordingsError | None]:
    """Returns a writer's answers for some prompts, and the failure that ended them, if any."""
    answers: list[tuple[str, bool]] = []
    try:
        for answer in writer.answers([Prompt(text, subject) for text, subject, _ in keys]):
            answers.append(answer)
    except RewordingsError as error:
        return answers, error
    return answers, None


def _check_whole(model: PreTrainedModel) -> None:
    """Checks that this process can run the whole model.

    Raises:
        ModelError: It cannot.
    """
    if sharded_layers(model) is not None or any(p.is_meta for p in model.parameters()):
        raise ModelError(
            "`augment_model` compares what the whole model answers, and `shard_frozen` or "
            "`stream_frozen` leaves this process a part of it. Set both to false, or write the "
            "rewordings where the model fits and bring them with the data."
        )
