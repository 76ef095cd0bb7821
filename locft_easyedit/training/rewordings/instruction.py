"""What a writer is told, and what is read out of its answer."""

from __future__ import annotations

import re
from typing import NamedTuple

from ...data.forms import Turn
from ...utils.parsing import encodable

N_ASKED = 8  # rewordings of a prompt
QUESTION_MARKS = ("?", "？", "؟", ";")  # the last is Greek

_QUESTION = (
    "Ask the question below in {n} other ways, one a line, and write nothing else. {keep}Use the "
    "language of the question. Do not answer it.\n\n{prompt}"
)
_STATEMENT = (
    "Below is the beginning of a sentence. Write {n} other beginnings, one a line, and nothing "
    "else. {keep}Use the language of the sentence. Leave each unfinished, so that the same words "
    "would complete it.\n\n{prompt}"
)
_KEEP = 'Keep "{subject}" as it stands. '


class Prompt(NamedTuple):
    """What is to be reworded.

    Attributes:
        text: The prompt.
        subject: What a rewording has to keep; `None` where nothing is known.
    """

    text: str
    subject: str | None


# Small models do not know what is meant until they see it.
_EXAMPLES = {
    _QUESTION: (
        Prompt("Which country is Lima the capital of?", "Lima"),
        (
            "What country has Lima as its capital?",
            "Lima is the capital of which country?",
            "Of which nation is Lima the capital city?",
            "Lima serves as the capital of what country?",
            "What is the country whose capital is Lima?",
            "In which country is Lima the seat of government?",
            "The capital city Lima belongs to what country?",
            "Do you know which country has its capital in Lima?",
        ),
    ),
    _STATEMENT: (
        Prompt("The author of the novel Emma is", "Emma"),
        (
            "The novel Emma was written by",
            "Emma is a novel by",
            "The person who wrote the novel Emma is",
            "The writer of Emma was",
            "Emma is the work of the novelist",
            "The one who wrote Emma is called",
            "Readers of Emma know that its author is",
            "The book with the title Emma comes from the pen of",
        ),
    ),
}

_THOUGHTS = "</think>"
# "1. ", "(2) ", "3) ", "4: ", "- ", "• "; a year or "24 hours" at the beginning of a line is none.
_MARKER = re.compile(r"(?:\(?\d{1,2}[.):](?=\s|$)|[-*•–—·](?=\s))\s*")
_QUOTES = {'"': '"', "'": "'", "“": "”", "„": "“", "‘": "’", "«": "»", "「": "」", "`": "`"}
_OPEN_END = re.compile(r"(?:\s*(?:\.\.\.|…|_{2,}|\[[^\]]*\]))+$")


def is_question(prompt: str) -> bool:
    """Returns whether a prompt ends with a question mark, of any script that is known here."""
    return prompt.rstrip().endswith(QUESTION_MARKS)


def instruction(prompt: Prompt) -> tuple[Turn, str]:
    """Returns an example of what is wanted, as an earlier turn, and the user's message."""
    kind = _QUESTION if is_question(prompt.text) else _STATEMENT
    example, answers = _EXAMPLES[kind]
    return Turn(_filled(kind, example), "\n".join(answers)), _filled(kind, prompt)


def _filled(kind: str, prompt: Prompt) -> str:
    kept = prompt.subject and prompt.subject in prompt.text
    keep = _KEEP.format(subject=prompt.subject) if kept else ""
    return kind.format(n=N_ASKED, keep=keep, prompt=prompt.text.strip())


def rewordings_in(answer: str, prompt: str, *, complete: bool = True) -> list[str]:
    """Returns the lines of a writer's answer, without numbers, bullets, quotes and headings.

    Args:
        answer: The answer.
        prompt: What was to be reworded.
        complete: Whether the answer came to its end; else its last line is left out.
    """
    lines = answer.rpartition(_THOUGHTS)[2].splitlines()
    found = []
    for line in lines if complete else lines[:-1]:
        text = _bare(line)
        heading = text.endswith((":", "：")) and not prompt.rstrip().endswith((":", "："))
        if any(map(str.isalnum, text)) and not heading and encodable(text):
            found.append(text)
    return found


def _bare(line: str) -> str:
    """Returns a line without what a list puts around its items, and without dots at its end."""
    text = line.strip()
    before = None
    while text != before:
        before = text
        text = _MARKER.sub("", text, count=1) if _MARKER.match(text) else text
        if text.startswith("**") and text.endswith("**") and len(text) > 4:
            text = text[2:-2].strip()
        end = _QUOTES.get(text[:1])
        if end and len(text) > 2 and text.endswith(end) and end not in text[1:-1]:
            text = text[1:-1].strip()
    return _OPEN_END.sub("", text).rstrip()
