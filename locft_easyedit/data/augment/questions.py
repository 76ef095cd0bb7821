"""Other wordings of a question, by rules of grammar: inversions, and statements that it ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from .canonical import plain_question
from .grammar import (
    BE,
    NAMED,
    NOUN,
    PREPOSITIONS,
    SLOT,
    asks_who,
    capital,
    finite,
    participle,
    small,
)
from .question_phrases import same_questions
from .statements import possessive_forms, possessive_questions

_X = rf"(?P<x>{NAMED})"
_WH = "(?P<wh>Who|Whom|What|Which)"
_DO = "(?:(?P<be>is|was|are|were)|(?P<do>do|does|did))"
_N = f"(?P<n>{NOUN})"
_VERBS = {"is", "was", "are", "were", "do", "does", "did", "has", "had", "that", "the"}

Rule = Callable[[re.Match[str]], Iterator[str]]

TIME = ("year", "date", "day", "time", "month")
PLACE = (
    "city", "continent", "country", "location", "place", "planet", "state", "town", "constellation",
    "language",
)  # fmt: skip
# Happen somewhere or some day: "in" is missing where a question leaves it out.
NEED_IN = (
    "located", "born", "found", "founded", "formed", "established", "created", "discovered", "made",
    "written", "opened", "launched", "commissioned", "incepted", "dissolved", "released", "die",
    "end", "live", "dissolve", "originate", "launch", "expire", "occur", "begin", "start", "exist",
)  # fmt: skip
# Verbs that go with another preposition, where it is missing.
NEED_OTHERS = {"belong": "to", "participate": "in"}
# Have names, so that one may ask for the name.
NAMED_NOUNS = {
    "airport", "city", "college", "company", "constellation", "continent", "corporation", "country",
    "family", "league", "network", "planet", "river", "school", "series", "show", "state", "team",
    "town", "universe", "university", "war", "work",
}  # fmt: skip


def questions(masked: str) -> list[str]:
    """Returns other wordings of a question, in a fixed order; some are beginnings of statements.

    Args:
        masked: The question, with `english.SLOT` where its subject stands (once), single spaces.
    """
    found = dict.fromkeys([*_by_grammar(masked), *same_questions(masked)])
    if (plain := plain_question(masked)) and plain != masked:
        others = _by_grammar(plain)
        if not plain.rstrip("?").endswith(NEED_IN):
            others.append(plain)
        found.update(dict.fromkeys(others))
    found.pop(masked, None)
    # "Which" and "what" are no news beside each other.
    unlike = {text.casefold().replace("which", "what"): text for text in reversed(found)}
    return list(unlike.values())


def _by_grammar(masked: str) -> list[str]:
    return [
        other
        for pattern, rule in _RULES
        if (match := pattern.fullmatch(masked))
        for other in rule(match)
    ]


def _of(match: re.Match[str]) -> Iterator[str]:
    """Who is the N of X? The N of X was whom? What is X's N?"""
    noun, x, be = match["n"], match["x"], match["be"]
    if re.search(r"\b(?:that|which|who|where|when|called)\b", noun):
        return
    short = re.sub(r"^names? of (?:the )?|(?:'s)? name$", "", noun)
    if " of the " in short:  # "the date of the opening"
        yield f"The {short} of {x} {be}"
        return
    if short != noun and not noun.endswith("'s name"):
        yield f"The {noun} of {x} {be}"
    yield from possessive_forms(short, x, be)[:-1]
    yield from possessive_questions(short, x, be)


def _noun_phrase(match: re.Match[str]) -> Iterator[str]:
    """What is the university where X went? The year X died was what?"""
    phrase, be = match["phrase"], match["be"]
    person = match["wh"].lower() in ("who", "whom")
    phrases = [phrase]
    if phrase.startswith(("the name of the ", "The name of the ")):
        phrases.append(phrase[len("the name of ") :])
    for each in phrases:
        wh = "Who" if person or asks_who(each) else "What"
        yield f"{capital(each)} {be}"
        yield f"{wh} {be} {small(each)}?"


def _ends_with_wh(match: re.Match[str]) -> Iterator[str]:
    """The film X was directed by who? The star X is part of what constellation?"""
    body, prep, n = match["body"], match["prep"], match["n"]
    yield f"{body} {prep}"
    if re.search(r" the [a-z ]+ known$", body):  # "X is part of the constellation known as what?"
        return
    if n and n.split()[-1] not in TIME:
        yield f"{body} {prep} the {n}"
    if parts := re.fullmatch(rf"{_X} (?P<be>{BE})(?P<rest>.*)", body):
        wh = f"What {n}" if n else "Who" if match["wh"].startswith("who") else "What"
        yield f"{wh} {parts['be']} {small(parts['x'])}{parts['rest']} {prep}?"
        if not n and prep == "by" and parts["rest"].strip().endswith("ed"):
            yield f"{wh} {parts['rest'].strip()} {small(parts['x'])}?"


def _asks_for_noun(match: re.Match[str]) -> Iterator[str]:
    """What university did X attend? In which state is X located? Who was X directed by?"""
    wh, n, x = match["wh"].capitalize(), match["n"], match["x"]
    rest, prep = (match["rest"] or "").strip(), match["before"].lower() or match["after"] or ""
    if match["before"] and (twice := re.search(rf"(?:^| )({PREPOSITIONS})$", rest)):
        # "In what city was X born in?"
        rest, prep = rest[: twice.start()], twice[1]
    words, head = rest.split(), n.split()[-1] if n else ""
    if not prep and words and words[-1] in NEED_IN and head in (*TIME, *PLACE):
        prep = "on" if head in ("date", "day") else "in"
    elif not prep and rest in NEED_OTHERS:
        prep = NEED_OTHERS[rest]
    elif n and not prep and head in (*TIME, *PLACE) and " when " in rest:
        yield f"In {wh.lower()} {n} {match['be'] or match['do']} {small(x)} {rest}?"
        return
    verb = match["be"] or finite(match["do"], words[0] if words else "")
    if verb is None or (match["do"] and " or " in rest) or (words and words[0] in _VERBS):
        return
    auxiliary = match["be"] or match["do"]
    told = f"{verb} {rest}" if match["be"] else " ".join([verb, *words[1:]])
    told = told.strip()
    other = {"What": "Which", "Which": "What"}.get(wh, "Who")
    vague = bool(n and re.match(r"(?:[a-z]+ )?(?:kind|type) of ", n))
    if n:
        yield from _stranded(f"{auxiliary} {small(x)} {rest}".strip(), n, prep, other)
    elif match["after"] and wh == "Whom":
        yield f"Who {auxiliary} {small(x)} {rest} {prep}?"
    if prep:
        yield f"{capital(x)} {told} {prep}"
        if head in TIME and n == head:
            yield f"When {auxiliary} {small(x)} {rest}?"
        if n and head not in TIME and not vague:
            yield f"{capital(x)} {told} {prep} the {n}"
        if (n and match["be"] is None) or rest:
            yield from _relative(n, f"{small(x)} {told}", prep, verb)
    elif n and match["do"]:
        if len(words) == 1 and not vague:
            yield f"{capital(x)} {told} the {n}"
        yield from _relative(n, f"{small(x)} {told}", "", verb)
    elif n and not rest and head in ("type", "nationality", "gender", "sex"):
        yield from possessive_forms(n, x, verb)[:-1]
        yield from possessive_questions(n, x, verb)
    if not n and prep == "by" and len(words) == 1 and rest.endswith("ed"):
        yield f"Who {rest} {small(x)}?"


def _stranded(asked: str, n: str, prep: str, wh: str) -> Iterator[str]:
    if prep:
        yield f"{capital(prep)} {wh.lower()} {n} {asked}?"
        if n.split()[-1] in TIME:
            yield from (f"{each} {n} {asked}?" for each in ("What", "Which"))
        else:
            yield f"{wh} {n} {asked} {prep}?"
    else:
        yield f"{wh} {n} {asked}?"


def _relative(n: str | None, told: str, prep: str, verb: str) -> Iterator[str]:
    be = "is" if verb in ("is", "are") or (verb.endswith("s") and verb != "was") else "was"
    if n is None:
        return
    if prep and n.split()[-1] in (*TIME, *PLACE):
        yield f"The {n} {prep} which {told} {be}"
        if n.split()[-1] in NAMED_NOUNS:
            yield f"What {be} the name of the {n} that {told} {prep}?"
    elif not n.startswith(("kind", "type")):
        yield (clause := f"The {n} that {told} {prep}".strip()) + f" {be}"
        if n.split()[-1] in NAMED_NOUNS:
            yield f"What {be} the name of {small(clause)}?"


def _where(match: re.Match[str]) -> Iterator[str]:
    """Where was X born? Where did X live when he died?"""
    rest = (match["rest"] or "").strip()
    words = rest.split()
    auxiliary = match["be"] or match["do"]
    verb = match["be"] or finite(match["do"], words[0] if words else "")
    if verb is None or (match["do"] and " or " in rest):
        return
    told = " ".join([verb, *(words if match["be"] else words[1:])])
    has_end = bool(re.search(rf" (?:{PREPOSITIONS})$", f" {told}"))
    end = "" if has_end else " in"
    if " when " not in told:
        yield f"{capital(match['x'])} {told}{end}"
    if not has_end:
        yield f"In what place {auxiliary} {small(match['x'])} {rest}?".replace(" ?", "?")
        yield f"What is the place where {small(match['x'])} {told}?"
        yield f"The place where {small(match['x'])} {told} is"


def _when(match: re.Match[str]) -> Iterator[str]:
    """When was X born? When was the birth of X?"""
    x, rest = small(match["x"]), (match["rest"] or "").strip()
    words = rest.split()
    verb = match["be"] or finite(match["do"], words[0] if words else "")
    if verb is None or not words:
        return
    told = " ".join([verb, *(words if match["be"] else words[1:])])
    yield f"What is the date when {x} {told}?"
    yield f"The date when {x} {told} is"
    yield f"At what time {match['be'] or match['do']} {x} {rest}?"


def _when_noun(match: re.Match[str]) -> Iterator[str]:
    if re.search(r"\bdate\b", match["phrase"]):  # "When is the date of birth of X?"
        return
    yield f"The date of {match['phrase']} {match['be']}"
    yield f"What {match['be']} the date of {match['phrase']}?"


def _agent(match: re.Match[str]) -> Iterator[str]:
    """Who directed X? What company produced X?"""
    n, x = match["n"], match["x"]
    passive = participle(match["verb"])
    if passive is None or _VERBS.intersection((n or "").split()) or match["verb"] in _VERBS:
        return
    be, verb = passive
    who = "whom" if n is None else f"what {n}"
    yield f"{capital(x)} {be} {verb} by"
    if n:
        yield f"{capital(x)} {be} {verb} by the {n}"
    yield f"By {who} {be} {small(x)} {verb}?"
    yield f"{'Who' if n is None else f'What {n}'} {be} {small(x)} {verb} by?"
    yield f"The {n or 'one'} {'that' if n else 'who'} {match['verb']} {small(x)} {be}"


def _subject(match: re.Match[str]) -> Iterator[str]:
    """What label was responsible for X? Which position was held by X?"""
    be = "is" if match["be"] in ("is", "has") else "was"
    be = "are" if match["be"] == "are" else be
    n, predicate = match["n"], match["predicate"]
    if _VERBS.intersection((n or "").split()):
        return
    if n is None:
        yield f"The one who {predicate} {be}"
        return
    yield f"The {n} that {predicate} {be}"
    yield f"What {be} the {n} that {predicate}?"
    if held := re.fullmatch(rf"(?P<be>is|was) (?P<verb>held|made) by {_X}", predicate):
        present = {"held": "holds", "made": "makes"}[held["verb"]]
        active = present if held["be"] == "is" else held["verb"]
        yield f"The {n} that {small(held['x'])} {active} {be}"


def _which(match: re.Match[str]) -> Iterator[str]:
    yield f"{'What' if match['wh'] == 'Which' else 'Which'} {match['rest']}?"


def _rules() -> list[tuple[str, Rule]]:
    clause = r"(?:of|for|that|which|where|when|who|to|in|on|by|behind|from|at)"
    with_clause = rf"[Tt]he {NOUN} {clause} .*{SLOT}.*(?<!called)(?<!made of)"
    bare_clause = rf"[Tt]he {NOUN} {SLOT} (?:{BE}|has|had|[a-z]+ed|[a-z]+ [a-z]+|went|plays).*"
    return [
        (rf"{_WH} (?P<be>{BE}) (?:the|an?) {_N} (?:of|for) {_X}\?", _of),
        (rf"{_WH} (?P<be>{BE}) (?P<x>{SLOT})'s (?P<n>{NOUN}(?:'s name)?)\?", _of),
        (rf"The {_N} (?:of|for) {_X} (?P<be>{BE})(?: (?:a )?(?:what|whom?|which))?\?", _of),
        (rf"{_WH} (?P<be>{BE}) (?P<phrase>{with_clause})\?", _noun_phrase),
        (rf"(?P<wh>What|Which) (?P<be>{BE}) (?P<phrase>the year {SLOT} [a-z].*)\?", _noun_phrase),
        (
            rf"(?P<phrase>{with_clause}|{bare_clause}) (?P<be>{BE}) (?P<wh>what|whom?)\?",
            _noun_phrase,
        ),
        (
            rf"(?P<body>.*{SLOT}.*?) (?P<prep>{PREPOSITIONS}) (?:a )?"
            rf"(?P<wh>what|which|whom?)(?: (?P<n>[a-z][a-z -]*))?\?",
            _ends_with_wh,
        ),
        (
            rf"(?P<before>){_WH}(?: {_N})? {_DO} (?P<x>{NAMED}|the [a-z]+ of {SLOT})"
            rf"(?P<rest> [^?]*?)??(?: (?P<after>{PREPOSITIONS}))?\?",
            _asks_for_noun,
        ),
        (
            rf"(?P<before>{_capitals()}) (?P<wh>what|which|whom) (?:{_N} )?{_DO} {_X}"
            r"(?P<rest> [^?]*)?(?P<after>)\?",
            _asks_for_noun,
        ),
        (rf"Where {_DO} {_X}(?P<rest> [^?]*)?\?", _where),
        (rf"When {_DO} {_X}(?P<rest> [^?]*)?\?", _when),
        (rf"When (?P<be>{BE}) (?P<phrase>(?:the {NOUN} of {SLOT}|{SLOT}'s {NOUN}))\?", _when_noun),
        (rf"(?:Who|(?:What|Which) {_N}) (?P<verb>[a-z]+) {_X}\?", _agent),
        (
            rf"(?:Who|(?:What|Which) {_N}) (?P<predicate>(?P<be>{BE}|has|had) "
            rf"(?!it\b|where\b|the [a-z]*|{NAMED})[a-z][^?]*{SLOT}[^?]*)\?",
            _subject,
        ),
        (rf"(?P<wh>What|Which) (?P<rest>(?!(?:{BE}|do|does|did)\b|[a-z]+ed\b)[^?]*)\?", _which),
    ]


def _capitals() -> str:
    return "|".join(capital(word) for word in PREPOSITIONS.split("|"))


_RULES = [(re.compile(pattern), rule) for pattern, rule in _rules()]
