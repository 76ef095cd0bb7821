"""Rewordings of edits: what a training may show in place of an edit's own prompt.

Everything is made from the prompt alone. The rewordings that come with data are for evaluation, and
the frames that places are chosen with (`locate.rewordings`) are not used either.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from ...utils.text import as_word
from ..requests import Edit
from .grammar import IN_PARENTHESES, SLOT, SMALL_WORDS, small, tidy
from .questions import questions
from .statements import statements
from .templates import CLAUSE_FRAMES, CONTEXTS, QUESTION_FRAMES, STATEMENT_FRAMES, surface_changes

MOST = 12  # rewordings of an edit
# What a pool is filled with, in this order; then what is left over, in turn. Most are true
# paraphrases where the rules find as many: the others leave the question's own words as they are.
_FIRST = ("paraphrase",) * 6 + ("context", "frame")
_THEN = ("surface", "frame", "paraphrase", "context")
_APART = re.compile(IN_PARENTHESES)
# A name, where no subject is given: words with capitals and what may stand between them.
_NAME = re.compile(r"[A-Z0-9][\w.'’&-]*(?:,? (?:(?:of|the|de|and|for|in) )*[A-Z0-9][\w.'’&-]*)*")


@dataclass(frozen=True)
class Wordings:
    """The rewordings of N edits.

    Attributes:
        prompts: For each edit its rewordings: at most 12, distinct, never the prompt. An edit
            may have none. Those that change most come first.
        n_with_target: Rewordings left out because they hold the target (in any case, as whole
            words) although the prompt does not.
        n_without_subject: Rewordings left out because the prompt has the subject and they do not.
    """

    prompts: list[list[str]]
    n_with_target: int
    n_without_subject: int

    def summary(self) -> dict[str, Any]:
        """Returns the figures for JSON: edits, their rewordings, and what was left out."""
        sizes = [len(prompts) for prompts in self.prompts]
        return {
            "edits": len(sizes),
            "rewordings": sum(sizes),
            "fewest": min(sizes, default=0),
            "most": max(sizes, default=0),
            "edits_without": sizes.count(0),
            "dropped_with_target": self.n_with_target,
            "dropped_without_subject": self.n_without_subject,
        }


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt apart from its name.

    Attributes:
        text: The prompt without blanks around it.
        masked: The same, with `SLOT` in place of the name.
        name: The subject as the prompt writes it, with what is in parentheses after it; or what
            looks like a name, or "".
    """

    text: str
    masked: str
    name: str

    def filled(self, masked: str) -> str:
        return masked.replace(SLOT, self.name) if self.name else masked


def reword_edits(
    edits: Sequence[Edit],
    subjects: Sequence[str | None],
    *,
    seed: int,
) -> Wordings:
    """Returns up to 12 rewordings of each edit's prompt; each still leads to the edit's target.

    Prompts that end in "?" are treated as questions, all others as beginnings of statements. What
    an edit gets depends on `seed` and its own prompt, target and subject: not on the other
    edits or their order.

    Args:
        edits: N edits.
        subjects: N subjects; `None`, or one that the prompt lacks, leaves nothing to check.
        seed: Number of the choice.
    """
    contexts = [(text, text.casefold()) for text in CONTEXTS]
    prompts = []
    n_with_target = n_without_subject = 0
    for edit, given in zip(edits, subjects, strict=True):
        subject = (given or "").strip()
        subject = subject if subject in edit.prompt else ""
        target = edit.target.strip().casefold()
        may_hold = holds(edit.prompt.casefold(), target)
        kept: dict[str, None] = {}
        rng = _generator(seed, edit.prompt)
        avoid = (target, subject.casefold())
        before = _drawn(contexts, avoid, random.Random(rng.getrandbits(64)))
        prompt = _taken_apart(edit.prompt, (given or "").strip())
        for text in _candidates(prompt, rng, before):
            if text == edit.prompt or text in kept:
                continue
            if subject not in text:
                n_without_subject += 1
            elif not may_hold and holds(text.casefold(), target):
                n_with_target += 1
            else:
                kept[text] = None
                if len(kept) == MOST:
                    break
        prompts.append(list(kept))
    return Wordings(prompts, n_with_target, n_without_subject)


def holds(text: str, target: str) -> bool:
    """Returns whether a text holds the target as whole words; both are case-folded."""
    start = text.find(target) if target else -1
    while start >= 0:
        end = start + len(target)
        if not (_in_word(text[start - 1 : start]) or _in_word(text[end : end + 1])):
            return True
        start = text.find(target, start + 1)
    return False


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _generator(seed: int, prompt: str) -> random.Random:
    """Returns a generator of the prompt's own: the same in every process and every list."""
    digest = blake2b(f"{seed}\n{prompt}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def _drawn(
    contexts: Sequence[tuple[str, str]], avoid: Sequence[str], rng: random.Random
) -> Iterator[str]:
    """Yields contexts in random order, without those that speak of what is to be avoided.

    Args:
        contexts: Contexts, each with its case-folded text.
        avoid: Case-folded texts; empty ones do not count.
        rng: A generator for these alone: what is skipped here changes no other choice.
    """
    for i in rng.sample(range(len(contexts)), min(len(contexts), 2 * MOST)):
        text, folded = contexts[i]
        if not any(holds(folded, each) for each in avoid):
            yield text


def _taken_apart(prompt: str, subject: str) -> _Prompt:
    """Returns the prompt with a slot for its subject, or for what looks like a name."""
    text = prompt.strip()
    if SLOT in text:  # a character of the prompt's own, which stays one
        return _Prompt(text, text, "")
    start = text.find(subject)
    if subject and start < 0 and len(text.lower()) == len(text):
        start = text.lower().find(subject.lower())
    if subject and start >= 0:
        name = _with_parentheses(text, start, start + len(subject))
        if text.count(name) > 1:
            alone = re.sub(as_word(name), SLOT, text)
            return _Prompt(text, alone if SLOT in alone else text.replace(name, SLOT), name)
        return _Prompt(text, text.replace(name, SLOT), name)
    for match in _NAME.finditer(text):
        name = re.sub(r"['’]s?$", "", match[0])
        if match.start() or name.split()[0].lower() not in SMALL_WORDS:
            masked = text[: match.start()] + SLOT + text[match.start() + len(name) :]
            return _Prompt(text, masked, name)
    return _Prompt(text, text, "")


def _with_parentheses(text: str, start: int, end: int) -> str:
    """Returns a name and what is in parentheses after it."""
    apart = _APART.match(text, end)
    return text[start : apart.end() if apart else end]


def _candidates(prompt: _Prompt, rng: random.Random, contexts: Iterator[str]) -> Iterator[str]:
    """Yields rewordings until there is no more of any kind; some may be alike."""
    plain = tidy(prompt.masked)
    paraphrases = [prompt.filled(text) for text in _paraphrases(plain)]
    rng.shuffle(paraphrases)
    surface = [prompt.filled(text) for text in surface_changes(prompt.masked)]
    rng.shuffle(surface)
    frames = _frames(prompt.masked)
    rng.shuffle(frames)
    lowered = prompt.filled(small(prompt.masked))
    # A context says less new than a paraphrase, so half of them stand before one.
    n_alone = _FIRST.count("paraphrase")
    bodies = [prompt.text, *paraphrases[n_alone : n_alone + 1]]
    rng.shuffle(bodies)
    kinds: dict[str, Iterator[str]] = {
        "paraphrase": iter(paraphrases),
        "surface": iter(surface),
        "frame": (frame.format(prompt=prompt.text, small=lowered) for frame in frames),
        "context": (f"{text} {bodies[i % len(bodies)]}" for i, text in enumerate(contexts)),
    }
    for kind in _FIRST:
        yield from _one(kinds[kind])
    while True:
        found = [text for kind in _THEN for text in _one(kinds[kind])]
        if not found:
            return
        yield from found


def _one(texts: Iterator[str]) -> list[str]:
    text = next(texts, None)
    return [] if text is None else [text]


def _frames(masked: str) -> list[str]:
    """Returns the frames that a prompt fits into."""
    if masked.endswith("?"):
        return list(QUESTION_FRAMES)
    if re.search(r"[.?!:\n]", masked):  # more than one sentence does not follow "that"
        return list(STATEMENT_FRAMES)
    return [*CLAUSE_FRAMES, *STATEMENT_FRAMES]


@lru_cache(maxsize=2**14)
def _paraphrases(masked: str) -> tuple[str, ...]:
    """Returns what the rules make of a prompt; edits share forms, so that few are worked out."""
    if masked.count(SLOT) != 1:
        return ()
    return tuple(questions(masked) if masked.endswith("?") else statements(masked))
