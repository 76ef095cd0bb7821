"""When an answer counts: normalisation, exact match, containment, and the accepted answers."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .prompts import Metrics, Question, Questions

STOPS = (".", "\n")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Thai, Lao, Burmese, Khmer, kana and Chinese characters: written without spaces between words.
_UNSPACED = re.compile(
    r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff])"
)

_PART_OF_ARTICLE = re.compile(r"\bth?\W*$", re.IGNORECASE)
_CUT_CHARACTER = "\ufffd"  # what a tokenizer makes of the first bytes of a character


def inner_stops(accepted: Iterable[str]) -> int:
    """Returns how many stops the accepted answers have before their ends, at most.

    A target like "J. R. R. Tolkien" could never be the answer if the answer ended at its first ".".
    """
    inner = (text.strip().rstrip("".join(STOPS)) for text in accepted)
    return max((sum(map(text.count, STOPS)) for text in inner), default=0)


def up_to_stop(text: str, n_stops: int = 0) -> str:
    """Returns the text up to its first stop, or to the one after `n_stops` others."""
    places = [i for i, character in enumerate(text) if character in STOPS]
    return (text[: places[n_stops]] if len(places) > n_stops else text).strip()


def settled_answer(answer: str, accepted: Sequence[str]) -> str:
    """Returns an answer up to its first stop, or up to the later one with which it is accepted."""
    cuts = [up_to_stop(answer, n) for n in range(inner_stops(accepted) + 1)]
    normal = {normalize_answer(text) for text in accepted}
    return next((cut for cut in cuts if normalize_answer(cut) in normal), cuts[0])


def normalize_answer(text: str) -> str:
    """Returns `text` in lower case, without punctuation, articles and repeated spaces.

    The normalisation of SQuAD (arXiv 1606.05250), which EasyEdit and the paper (arXiv 2509.22072)
    use: only ASCII punctuation and English articles are known to it.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def matches_any(answer: str, accepted: Sequence[str]) -> bool:
    """Returns whether the answer is the same as one of the accepted after normalisation.

    With each it is compared up to the stop that this one's own stops allow. That is EasyEdit's
    exact match, also where it is odd: "The" normalises to nothing, and so an empty answer matches
    it.
    """
    return any(
        normalize_answer(up_to_stop(answer, inner_stops([text]))) == normalize_answer(text)
        for text in accepted
    )


def matches_at_first_stop(answer: str, accepted: Sequence[str]) -> bool:
    """Returns the same as the paper has it: every answer ends at its first stop."""
    return normalize_answer(up_to_stop(answer)) in map(normalize_answer, accepted)


def contains_any(answer: str, accepted: Sequence[str]) -> bool:
    """Returns whether an accepted answer's words stand in the answer, whole and in a row.

    The words are those of the normalised texts; other punctuation than ASCII separates them as
    well. Where a script puts no spaces between words, every character counts as a word.
    An accepted answer without any word ("The", "?") would stand in every answer: it counts only if
    it is the whole answer, spaces around it and case aside.
    """
    said = _words(answer)
    for text in accepted:
        words = _words(text)
        if words in said if words else text.strip().lower() == answer.strip().lower():
            return True
    return False


def accepted_targets(request: Mapping[str, Any]) -> list[str]:
    """Returns all accepted forms of a request's new answer, `target_new` first."""
    return _distinct([request["target_new"], *(request.get("target_aliases") or ())])


def accepted_old(request: Mapping[str, Any]) -> list[str]:
    """Returns a request's former answers; empty if none is known.

    Without those that are accepted as new: a model that gives them may have learned the edit.
    """
    truth = request.get("ground_truth")
    truths = truth if isinstance(truth, (list, tuple)) else [truth]
    new = {_key(text) for text in accepted_targets(request)}
    former = _distinct([*truths, *(request.get("ground_truth_aliases") or ())])
    return [text for text in former if _key(text) not in new]


def accepted_answers(question: Question, record: Mapping[str, Any]) -> list[list[str]]:
    """Returns, for each prompt of a question about the new fact, all accepted answers.

    Args:
        question: A question; what counts as right for locality is no text, so there are none.
        record: The request that it is of.
    """
    if question.part == "locality":
        return [[] for _ in question.prompts]
    if question.part != "portability":
        return [accepted_targets(record) for _ in question.prompts]
    aliases = record["portability"][question.name].get("aliases")
    return [
        _distinct([answer, *(aliases[i] if aliases else ())])
        for i, answer in enumerate(question.answers)
    ]


def _words(text: str) -> str:
    """Returns the words of a text, a space around each; empty if it has none."""
    normal = normalize_answer(text)
    if not normal.isascii():
        plain = (" " if unicodedata.category(c).startswith("P") else c for c in normal)
        normal = _UNSPACED.sub(r" \1 ", "".join(plain))
    words = normal.split()
    return f" {' '.join(words)} " if words else ""


def _key(text: str) -> str:
    """Returns what makes two answers the same; "A" and "The" differ."""
    return normalize_answer(text) or text.strip().lower()


def _distinct(texts: Iterable[Any]) -> list[str]:
    """Returns the texts that are neither blank nor repeated, in their order."""
    found: dict[str, str] = {}
    for text in texts:
        if isinstance(text, str) and text.strip():
            found.setdefault(text.strip(), text)
    return list(found.values())


class Verdicts:
    """What the answer to each prompt is compared with, word by word.

    Args:
        questions: The questions.
        records: The records they are of.
        before: Each record's metrics before the edit: locality compares with the answers there.

    Raises:
        ValueError: The answers before the edit are not there for every locality prompt.
    """

    def __init__(
        self,
        questions: Questions,
        records: Sequence[Mapping[str, Any]],
        before: Sequence[Metrics],
    ) -> None:
        if len(before) != len(records):
            raise ValueError(f"{len(records)} records, {len(before)} measured before the edit.")
        accepted = [
            texts
            for i, record in enumerate(records)
            for question in questions.of(i)
            for texts in (
                _answers_before(question, before[i])
                if question.part == "locality"
                else accepted_answers(question, record)
            )
        ]
        self.drafts = [texts[0] for texts in accepted]
        self._accepted = [{_squeezed(text) for text in texts} for texts in accepted]

    def open(self, prompt: int, text: str) -> bool:
        """Returns whether an answer that begins with `text` may still count.

        Args:
            prompt: Number of the prompt.
            text: The answer so far; the last word may be a part of one.
        """
        if text.endswith(_CUT_CHARACTER):
            return True
        # "th" may become an article, which does not count.
        begun = {_squeezed(text), _squeezed(_PART_OF_ARTICLE.sub("", text))}
        return any(full.startswith(tuple(begun)) for full in self._accepted[prompt])


def _answers_before(question: Question, before: Metrics) -> list[list[str]]:
    """Returns, for each prompt of a locality question, the answer before the edit."""
    found = before.get("generated", {}).get("locality_answers", {}).get(question.name)
    if found is None or len(found) != len(question.prompts):
        raise ValueError(f"{question.where}: its answers before the edit are missing.")
    return [[answer] for answer in found]


def _squeezed(text: str) -> str:
    """Returns the normalised text without spaces.

    The beginning of an answer gives the beginning of what the whole gives: a tokenizer may yet
    take a space away, and a sigma that ends the text may not end its word.
    """
    return normalize_answer(text).replace(" ", "").replace("ς", "σ")
