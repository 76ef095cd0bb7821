"""One form for a question's many: its words stay, while their order and tense are evened out."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .grammar import BE, PREPOSITIONS, SLOT, infinitive, is_past_form

# What may stand before a subject and does not change what is asked of it.
_KINDS = (
    "film|movie|song|album|song or album|single|show|episode|series|book|novel|band|star|genus|"
    "species|character|ship|battle|person|company|river|painting|opera|player"
)
_NAMED = re.compile(rf"(?:\b[Tt]he (?:(?:{_KINDS}) )?|\b[Pp]layer )?{SLOT}")
_PRESENT = re.compile(r"\b(?:is|are|do|does|has|have|can)\b")
_PAST = re.compile(r"\b(?:was|were|did|had)\b")
_WORDS = {
    "which": "what", "whom": "who", "was": "is", "are": "is", "were": "is", "did": "does",
    "do": "does", "had": "has", "kind": "type", "sort": "type", "day": "date",
}  # fmt: skip
_TIME = "(?:year|date|time)"
_N = "[a-z][a-z -]*?"
_ALL = PREPOSITIONS + "|into|upon"
_IN_FRONT = re.compile(rf"(?P<prep>{_ALL}) (?P<rest>(?:what|who)\b.*)")
_OF = re.compile(rf"(?:what|who) is (?:the|an?) (?P<n>{_N}) (?:of|for) {SLOT}")
# "What is X's home city?", "Who is listed as X father?"
_POSSESSIVE = re.compile(
    rf"(?:what|who) is (?:{SLOT}'s|(?:the name of|listed as) {SLOT}(?:'s)?) (?P<n>{_N})(?:'s name)?"
)
_POSSESSED = re.compile(rf"{SLOT}'s (?P<n>{_N}) is (?:what|who)")
_KNOWN_AS = re.compile(rf"({SLOT} .*) the ({_N}) (?:known as|named|called) what")
_AGENT = re.compile(rf"(?:what|who) is the (?P<n>{_N}) (?:that|what|who) (?P<rest>[a-z ]+ {SLOT})")
# "In which year X ceased to exist?"
_NOT_INVERTED = re.compile(rf"(?P<asked>what {_TIME}) {SLOT} (?P<verb>[a-z]+)(?P<rest>.*)")
_PHRASE = re.compile(rf"(?P<phrase>the [^?]*{SLOT}.*?)(?: is)?(?: (?:what|who|when|where))?")
_LAST = re.compile(
    rf"{SLOT} (?:originally )?(?P<verb>[a-z]+)(?P<rest>.*?) (?P<prep>{_ALL}) (?:a )?"
    rf"(?P<wh>what|who)(?P<n> {_N})?"
)
_CLAUSE = re.compile(
    rf"what is the (?P<n>{_N})"
    rf"(?: (?:that|what|(?P<where>where|when)|(?P<prep>{PREPOSITIONS}) what))? "
    rf"{SLOT} (?P<verb>[a-z]+)(?P<rest>.*)"
)
_TIMED = re.compile(rf"(?P<asked>what (?:[a-z]+ )?{_TIME}\b.*?)(?: (?:in|on|at))?")
_IT = re.compile(rf"what (?P<n>{_TIME}) is it (?:when|that) {SLOT} is (?P<rest>.*)")


@dataclass(frozen=True, slots=True)
class Canonical:
    """What a question asks.

    Attributes:
        key: The question in small letters, without its question mark, and always in the present;
            a preposition ends it and does not begin it, and no article or noun goes with the slot.
        named: The subject's slot with the article and the noun that were before it.
        is_past: Whether it was asked in the past.
    """

    key: str
    named: str
    is_past: bool


def canonical(masked: str) -> Canonical:
    """Returns what a question asks apart from how it is built.

    Args:
        masked: The question, with `english.SLOT` where its subject stands (once), single spaces.
    """
    text = masked.rstrip(" ?")
    match = _NAMED.search(text)
    named = match[0] if match else SLOT
    text = text.replace(named, SLOT).lower()
    is_past = bool(_PAST.search(text))
    if not is_past and not _PRESENT.search(text):
        is_past = any(is_past_form(word) for word in text.split())
    elif is_past and (present := _PRESENT.search(text)):
        is_past = _PAST.search(text).start() < present.start()  # type: ignore[union-attr]
    text = " ".join(_WORDS.get(word, word) for word in text.split())
    return Canonical(_evened(text), named, is_past)


def plain_question(masked: str) -> str | None:
    """Returns "What college did X attend?" for "The college X attended was what?", if it is so."""
    asked = canonical(masked)
    parts = re.fullmatch(rf"(what {_N}) (is|does) ({SLOT}.*)", asked.key)
    if parts is None or not masked[1:-1].islower() or parts[3] == SLOT:
        return None
    auxiliary = {"is": ("is", "was"), "does": ("does", "did")}[parts[2]][asked.is_past]
    rest = parts[3].replace(SLOT, asked.named[:1].lower() + asked.named[1:])
    return f"{parts[1].capitalize()} {auxiliary} {rest}?"


def _evened(text: str) -> str:
    text = re.sub(r"\bname of the\b", "", text).replace("the  ", "the ")
    if match := _IN_FRONT.fullmatch(text):
        prep, rest = match["prep"], match["rest"]
        text = rest if rest.endswith(f" {prep}") or _ends_in_preposition(rest) else f"{rest} {prep}"
    text = _KNOWN_AS.sub(r"\1 what \2", text)
    if match := _PHRASE.fullmatch(text):
        text = f"what is {match['phrase']}"
    elif match := _LAST.fullmatch(text):
        asked = _inverted(match["verb"], match["rest"])
        text = f"{match['wh']}{match['n'] or ''} {asked} {match['prep']}" if asked else text
    if match := _IT.fullmatch(text):
        text = f"what {match['n']} is {SLOT} {match['rest']}"
    elif match := _of_it(text):
        return f"what is the {match['n']} of {SLOT}"
    elif (match := _CLAUSE.fullmatch(text)) and not _ends_in_preposition(f" {match['n']}"):
        asked = _inverted(match["verb"], match["rest"])
        end = match["prep"] or ""
        if match["where"]:
            end = "to" if match["verb"] in ("went", "goes") else "in"
        text = f"what {match['n']} {asked} {end}".rstrip() if asked else text
    elif match := _AGENT.fullmatch(text):
        text = f"what {match['n']} {match['rest']}"
    elif match := _NOT_INVERTED.fullmatch(text):
        asked = _inverted(match["verb"], match["rest"])
        text = f"{match['asked']} {asked}" if asked else text
    if match := _TIMED.fullmatch(text):
        text = match["asked"]
    return text


def _of_it(text: str) -> re.Match[str] | None:
    patterns = (_POSSESSIVE, _OF, _POSSESSED)
    return next((match for each in patterns if (match := each.fullmatch(text))), None)


def _ends_in_preposition(text: str) -> bool:
    return bool(re.search(rf" (?:{_ALL})$", text))


def _inverted(verb: str, rest: str) -> str | None:
    """Returns "does X attend" for the verb of "X attended"; `None` for one that is not known."""
    if verb in BE.split("|"):
        return f"is {SLOT}{rest}"
    known = infinitive(verb)
    return f"does {SLOT} {known}{rest}" if known else None
