"""The little English that the rewording rules need: slots, first letters, forms of verbs."""

from __future__ import annotations

import re
from functools import cache

# Stands for the subject while a prompt is reworded: a character of the private-use area, so that no
# rule can change a letter of the subject.
SLOT = "\ue000"

# May be written small in the middle of a sentence; anything else may be a name.
SMALL_WORDS = frozenset(
    {
        "a", "an", "the", "in", "on", "at", "of", "by", "for", "from", "to", "over", "under",
        "with", "after", "what", "which", "who", "whom", "whose", "where", "when", "why",
        "how", "is", "was", "are", "were", "do", "does", "did", "can", "could", "has", "have",
        "had", "it", "its", "they", "this", "that", "player",
    }
)  # fmt: skip
PREPOSITIONS = "out of|by|in|on|at|of|for|from|to|with|after|upon|near|over|as|under"
BE = "is|was|are|were"
# What tells a name from others: "USS Bermuda (1861)", "Dune (film)"; not "Dune (and when)".
IN_PARENTHESES = r" \((?:[A-Z0-9][^()]*|\w+)\)"
# A noun phrase without a name in it, and the subject with what may stand before it ("the film X").
NOUN = r"[a-z][a-z -]*?"
_NOT_IN_NAMED = rf"(?!(?:that|which|where|when|who|whose|has|had|{BE}|{PREPOSITIONS})\b)"
NAMED = rf"(?:[Tt]he (?:{_NOT_IN_NAMED}[a-z]+ ){{0,2}}?)?{SLOT}"
PARTICIPLES = (
    r"[a-z]+ed|built|broadcast|cast|drawn|found|given|held|made|known|led|run|set|shown|sold|"
    r"spoken|sung|taught|told|won|worn|written"
)

_PAST = {
    "be": "was", "become": "became", "begin": "began", "broadcast": "broadcast", "build": "built",
    "come": "came", "draw": "drew", "fight": "fought", "find": "found", "give": "gave",
    "go": "went", "have": "had", "hold": "held", "lead": "led", "make": "made",
    "run": "ran", "say": "said", "sell": "sold", "sing": "sang", "speak": "spoke", "take": "took",
    "teach": "taught", "win": "won", "write": "wrote",
}  # fmt: skip
_REGULAR = frozenset(
    {
        "affect", "air", "appear", "associate", "attend", "base", "belong", "cease", "celebrate",
        "compete", "compose", "connect", "contract", "create", "cross", "design", "develop",
        "die", "direct", "discontinue", "discover", "dissolve", "drain", "employ", "end", "enter",
        "establish", "exist", "expire", "feature", "flow", "form", "found", "graduate", "hail",
        "happen", "host", "inhabit", "invent", "join", "land", "launch", "license", "lift",
        "live", "locate", "manage", "manufacture", "marry", "move", "name", "occupy", "occur",
        "open", "operate", "originate", "own", "paint", "participate", "pass", "perform", "play",
        "premiere", "produce", "publish", "receive", "record", "release", "represent", "reside",
        "retire", "serve", "span", "specialize", "star", "start", "study", "suffer", "train",
        "turn", "use", "work",
    }
)  # fmt: skip
_DOUBLED = {"occur": "occurred", "span": "spanned", "star": "starred"}
_PARTICIPLE = {
    "became": "become", "began": "begun", "drew": "drawn", "gave": "given", "ran": "run",
    "sang": "sung", "spoke": "spoken", "took": "taken", "wrote": "written",
}  # fmt: skip
_PERSONS = frozenset(
    {
        "architect", "artist", "assassin", "author", "brother", "child", "cinematographer", "coach",
        "composer", "creator", "dad", "daughter", "designer", "developer", "director",
        "discoverer", "doctor", "editor", "father", "founder", "husband", "illustrator",
        "inventor", "killer", "mom", "mother", "murderer", "owner", "painter", "parent", "partner",
        "performer", "predecessor", "producer", "screenwriter", "scriptwriter", "sibling",
        "singer", "sister", "son", "spouse", "star", "successor", "wife", "writer",
    }
)  # fmt: skip


def capital(text: str) -> str:
    """Returns the text with a capital first letter."""
    return text[:1].upper() + text[1:]


def small(text: str) -> str:
    """Returns the text as it stands in the middle of a sentence; what may be a name stays."""
    first = re.split(r"[ '’]", text, maxsplit=1)[0]
    return text[:1].lower() + text[1:] if first.lower() in SMALL_WORDS else text


def tidy(text: str) -> str:
    """Returns the text with single spaces, none around it and none before a comma or a point."""
    return re.sub(r" +([,.?])", r"\1", " ".join(text.split()))


def finite(auxiliary: str, verb: str) -> str | None:
    """Returns what "does live" or "did live" is without its auxiliary, if the verb is known."""
    if verb not in _PAST and verb not in _REGULAR:
        return None
    if auxiliary == "did":
        return past(verb)
    if auxiliary == "do":
        return verb
    if verb == "have":
        return "has"
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "go")) else "s")


def past(verb: str) -> str:
    """Returns the past tense of an infinitive."""
    if verb in _PAST:
        return _PAST[verb]
    if verb in _DOUBLED:
        return _DOUBLED[verb]
    if verb.endswith("e"):
        return verb + "d"
    ends_in_y = verb.endswith("y") and verb[-2:-1] not in "aeou"
    return verb[:-1] + "ied" if ends_in_y else verb + "ed"


def participle(verb: str) -> tuple[str, str] | None:
    """Returns the auxiliary and the participle that turn an active verb into a passive one.

    Args:
        verb: A finite form: "directed" gives "was", "directed", and "makes" gives "is", "made".
    """
    for infinitive in (verb[:-1], verb[:-2]):
        if verb.endswith("s") and (infinitive in _PAST or infinitive in _REGULAR):
            form = past(infinitive)
            return "is", _PARTICIPLE.get(form, form)
    if verb.endswith("ed") or verb in _PAST.values():
        return "was", _PARTICIPLE.get(verb, verb)
    return None


def asks_who(noun: str) -> bool:
    """Returns whether a noun phrase means a person, so that one asks for it with "who"."""
    head = re.split(r" (?:of|for|that|which|who) ", noun)[0]
    last = head.rsplit(" ", 1)[-1]
    return last in _PERSONS or last.removesuffix("s") in _PERSONS


def infinitive(verb: str) -> str | None:
    """Returns the infinitive of a finite form of a verb that is known."""
    return _infinitives().get(verb)


def is_past_form(word: str) -> bool:
    """Returns whether a word looks like a past tense."""
    return (word.endswith("ed") and word != "located") or word in _PAST.values()


@cache
def _infinitives() -> dict[str, str]:
    found = {}
    for verb in sorted({*_PAST, *_REGULAR}):
        found.update({str(finite(how, verb)): verb for how in ("do", "does", "did")})
    return found
