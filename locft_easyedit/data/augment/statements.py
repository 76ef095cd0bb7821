"""Other wordings of the beginning of a statement, by rules of grammar."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .grammar import BE, NAMED, NOUN, PARTICIPLES, SLOT, asks_who, capital
from .statement_phrases import same

_X = rf"(?P<x>{NAMED})"
_RELATIVE = re.compile(rf"{_X},? (?:which|who|that) (?P<rest>.+)")
_WHOSE = re.compile(rf"{_X}, whose (?P<noun>{NOUN}) (?P<be>{BE})(?P<rest>.*)")
_PASSIVE = re.compile(rf"{_X}, (?P<rest>(?P<verb>{PARTICIPLES}) .+)")
_APPOSITION = re.compile(rf"{_X},? (?P<rest>(?:(?:an?|the)(?: .+)?|in|from|by|[a-z]+ing .+))")
_BARE_NOUN = re.compile(rf"{_X}, (?P<rest>[a-z]+e?r of)")
_OF = re.compile(rf"The (?P<noun>{NOUN}) (?:of|for) {_X} (?P<be>{BE})(?P<rest>.*)")
_POSSESSIVE = re.compile(rf"(?P<x>{SLOT})'s (?P<noun>{NOUN}) (?P<be>{BE})(?P<rest>.*)")
_NAME_OF = re.compile(rf"The name of (?P<phrase>(?:the|an?) .*{SLOT}.*)")
_AFTER_QUESTION = re.compile(
    rf"[^?]*?{_X}[^?]*\? (?P<pronoun>It|They) (?P<verb>[a-z]+)(?P<rest>.*)"
)
# States of a thing; other participles tell of an event.
_STATES = ("located", "situated", "based", "headquartered", "called", "named", "found", "known")
_OF_A_PERSON = (
    r"(?:plays|speaks|spoke|works|died|passed away|writes|is a citizen|is employed|is a native)\b.*"
)
_OF_A_THING = rf"(?:is|was) (?!known)(?:{PARTICIPLES}) (?:by|in|on|after|for)\b.*"


def statements(masked: str) -> list[str]:
    """Returns other wordings of a beginning of a statement, in a fixed order.

    Args:
        masked: The prompt, with `english.SLOT` where its subject stands (once), single spaces.
    """
    found: dict[str, None] = {}
    for form in _untangled(masked):
        found[form] = None
        found.update((other, None) for other in same(form))
        found.update((other, None) for other in _possessives(form))
        found.update((other, None) for other in _with_relative(form))
    found.pop(masked, None)
    return list(found)


def possessive_forms(noun: str, x: str, end: str) -> list[str]:
    """Returns how one says that the noun of X has some property.

    Args:
        noun: "mother tongue".
        x: The subject's slot, perhaps with an article and a noun before it.
        end: What follows: "is".
    """
    forms = [f"The {noun} of {x} {end}"]
    if x == SLOT:
        forms.append(f"{x}'s {noun} {end}")
    return [*forms, f"As for {x}, the {noun} {end}"]


def possessive_questions(noun: str, x: str, be: str) -> list[str]:
    """Returns how one asks for the noun of X."""
    wh = "Who" if asks_who(noun) else "What"
    forms = [f"{wh} {be} the {noun} of {x}?"]
    if x == SLOT:
        forms.append(f"{wh} {be} {x}'s {noun}?")
    return forms


def _untangled(masked: str) -> Iterator[str]:
    """Yields the prompt, and whole sentences in place of a clause that hangs on the subject."""
    yield masked
    if match := _RELATIVE.fullmatch(masked):
        yield capital(f"{match['x']} {match['rest']}")
    elif match := _WHOSE.fullmatch(masked):
        yield f"{match['x']}'s {match['noun']} {match['be']}{match['rest']}"
    elif match := _PASSIVE.fullmatch(masked):
        be = "is" if match["verb"] in _STATES else "was"
        yield capital(f"{match['x']} {be} {match['rest']}")
    elif match := _APPOSITION.fullmatch(masked):
        yield capital(f"{match['x']} is {match['rest']}")
    elif match := _BARE_NOUN.fullmatch(masked):
        yield capital(f"{match['x']} is a {match['rest']}")
    elif match := _AFTER_QUESTION.fullmatch(masked):
        verb = match["verb"]
        if match["pronoun"] == "They":
            verb = {"are": "is", "have": "has", "were": "was"}.get(verb, verb + "s")
        yield capital(f"{match['x']} {verb}{match['rest']}")
        yield from _answered(masked, match)
    if match := _NAME_OF.fullmatch(masked):
        phrase = match["phrase"]
        yield capital(phrase)
        yield capital(re.sub(r"\b(?:which|that) ", "", phrase, count=1))
        yield capital(re.sub(r"\bwhich ", "that ", phrase, count=1))


def _answered(masked: str, match: re.Match[str]) -> Iterator[str]:
    """Yields "The N of X is" for "What is the N of X? It is"."""
    asked = re.match(rf"(?:What|Who|Which) (?P<be>{BE}) (?P<phrase>the {NOUN} of {SLOT})\?", masked)
    if asked and match["verb"] in BE.split("|"):
        yield f"{capital(asked['phrase'])} {match['verb']}{match['rest']}"


def _possessives(form: str) -> Iterator[str]:
    match = _OF.fullmatch(form) or _POSSESSIVE.fullmatch(form)
    if match is None or re.search(r" (?:which|that|who|where) ", match["noun"]):
        return
    noun, x, be, rest = match["noun"], match["x"], match["be"], match["rest"]
    noun = re.sub(r"^names? of (?:the )?", "", noun)
    yield from possessive_forms(noun, x, be + rest)
    if not rest:
        yield from possessive_questions(noun, x, be)
    if x == SLOT:
        yield f"{x}, whose {noun} {be}{rest}"


def _with_relative(form: str) -> Iterator[str]:
    """Yields a sentence as a clause that hangs on its subject, where "who" or "which" is clear."""
    if not form.startswith(SLOT + " "):
        return
    rest = form[len(SLOT) + 1 :]
    if re.fullmatch(_OF_A_PERSON, rest):
        yield f"{SLOT}, who {rest}"
    elif re.fullmatch(_OF_A_THING, rest):
        yield f"{SLOT}, which {rest}"
