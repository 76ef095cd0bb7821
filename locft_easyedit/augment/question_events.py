"""Families of questions for the day or the year of an event."""

from __future__ import annotations

from collections.abc import Iterator

# An event a line: what X did or was in other words, then nouns for it. Those after ">" are given
# and never found, because they say less: what was founded was created, not the other way round.
_EVENTS = """
was born, came into the world | birth
died, passed away | death, >passing
was founded, was established, was set up, was formed, >was created, >came into being | foundation, formation, establishment, founding
was created, was made, >came into being | creation
first existed, came into being, came into existence, originated, was incepted, >was created, >had its beginning | inception, origin
was dissolved, dissolved, >ceased to exist, >came to an end | dissolution
ended, came to an end, >was over, >drew to a close | end
ceased to exist, >came to an end | end
occurred, happened, took place |
was launched, launched | launch
was opened, opened, >opened its doors | opening
was released, came out | release
was published, >came out | publication
was discovered, was found, >was first detected | discovery
was invented, >was devised | invention
was built, was constructed | construction
was written, >was penned | writing
was approved, >was given approval | approval
was commissioned, >was put into commission | commissioning
entered service, went into service, >was put into service | entry into service
premiered, debuted, >was first shown | premiere, debut
first aired, was first broadcast, >was first shown |
started, began, >got under way | start, beginning
expired |
came into use, >was first used, >was put into use |
was found or made, was discovered or made |
was discontinued, >was brought to an end | discontinuation
"""  # noqa: E501 - an event is one line
_INFINITIVES = {
    "came": "come", "died": "die", "passed": "pass", "lost": "lose", "existed": "exist",
    "expired": "expire", "originated": "originate", "had": "have", "dissolved": "dissolve",
    "ceased": "cease", "ended": "end", "drew": "draw", "occurred": "occur", "happened": "happen",
    "took": "take", "launched": "launch", "opened": "open", "entered": "enter", "went": "go",
    "aired": "air", "premiered": "premiere", "debuted": "debut", "started": "start",
    "began": "begin", "got": "get",
}  # fmt: skip


def event_families() -> Iterator[list[str]]:
    """Yields families as `question_relations` reads them.

    "When" fits every answer, and so does "the date of". "On what date" and "in what year" ask for
    more than that, so that "when" may replace them and not the other way round.
    """
    for line in _EVENTS.strip().splitlines():
        verbs, nouns = ([part.strip() for part in half.split(",")] for half in line.split("|"))
        events = [(verb.startswith(">"), verb.lstrip(">")) for verb in verbs]
        named = [(noun.startswith(">"), noun.lstrip(">")) for noun in nouns if noun]
        yield list(_when(events, named))
        yield list(_on_date(events, named))
        yield list(_in_year(events, named))
    yield ["@date", "<@point in time", "<What date is associated with X?", ">When did X happen?",
           ">When did X take place?", ">When did X occur?"]  # fmt: skip
    yield [
        "@final year",
        "@last year",
        "<@ending year",
        "<@end year",
        ">In what year did X end?",
        ">In what year was X over?",
    ]
    for date in ("date of birth", "birth date", "birthday"):
        yield [
            f"<@{date}",
            f"<When was the {date} of X?",
            ">When was X born?",
            ">The date when X was born is",
        ]
        yield [f"<@{date}", ">@date of birth", ">@birth date", ">When was X's birth?"]
    for date in ("date of death", "death date"):
        yield [
            f"<@{date}",
            f"<When was the {date} of X?",
            ">When did X die?",
            ">When did X pass away?",
            ">@date of death",
        ]
        yield [f"<@{date}", ">When was X's death?", ">@day of death", ">The date X died was"]
    yield ["<When did X die?", ">@date of death"]
    yield [f"<The death of X {occurred} on what date?" for occurred in ("occurred", "occured")] + [
        ">When did X die?", ">On what date did X die?", ">When did X pass away?",
        ">What was the date of X's death?", ">@date of death", ">The date X died was",
    ]  # fmt: skip
    yield ["<When was X born?", ">@date of birth", ">@birth date"]
    yield from _places()


def _when(events: list[tuple[bool, str]], nouns: list[tuple[bool, str]]) -> Iterator[str]:
    for only_given, verb in events:
        mark = ">" * only_given
        yield f"{mark}When {_asked(verb)}?"
        yield f"<At what time {_asked(verb)}?"
        yield f">The date when X {verb} is"
    for only_given, noun in nouns:
        mark = ">" * only_given
        yield f"{mark}When was X's {noun}?"
        yield f"{mark}When was the {noun} of X?"
        yield f"{mark}What was the date of X's {noun}?"
        yield f"{mark}What was the date of the {noun} of X?"
        yield f">The date of X's {noun} was"
        yield from (f"<@{noun} date", f"<@date of {noun}")


def _on_date(events: list[tuple[bool, str]], nouns: list[tuple[bool, str]]) -> Iterator[str]:
    for only_given, verb in events:
        if not only_given:
            yield f"On what date {_asked(verb)}?"
        yield f">When {_asked(verb)}?"
        yield f">The date when X {verb} is"
    for _, noun in nouns:
        yield f">When was the {noun} of X?"
        yield f">What was the date of X's {noun}?"
        yield f">X's {noun} was on"


def _in_year(events: list[tuple[bool, str]], nouns: list[tuple[bool, str]]) -> Iterator[str]:
    for only_given, verb in events:
        yield f"{'>' * only_given}In what year {_asked(verb)}?"
        yield f">When {_asked(verb)}?"
        yield f">X {verb} in"
    for i, (_, noun) in enumerate(nouns):
        mark = "<" * (i > 0)  # one of them is enough among the many forms
        yield f"{mark}What was the year of X's {noun}?"
        yield f"<What was the year of the {noun} of X?"
        yield f"<@{noun} year"
        yield f"<What year was the {noun} of X?"
        yield f"<What year witnessed the {noun} of X?"
        yield f"<What is the official year for the {noun} of X?"
        yield f"{'<' * (i > 0) or '>'}The year of X's {noun} was"


def _asked(verb: str) -> str:
    """Returns "did X pass away" for "passed away", and "was X born" for "was born"."""
    first, *rest = verb.split()
    if first == "was":
        return " ".join(["was X", *rest])
    if first == "first":
        return " ".join(["did X first", _INFINITIVES[rest[0]], *rest[1:]])
    return " ".join(["did X", _INFINITIVES[first], *rest])


def _places() -> Iterator[list[str]]:
    """Yields families for where somebody was born or died; "where" may replace "in what city"."""
    for asked, told, noun, place, others in (
        ("was X born", "X was born", "birth", "birthplace", ["did X come into the world"]),
        ("did X die", "X died", "death", "place of death", ["did X pass away"]),
    ):
        where = [f"Where {each}?" for each in (asked, *others)]
        where += [f"@{place}", f"@place of {noun}", f"{told} in", f"In what place {asked}?"]
        where += [f"<At what location {asked}?", f"<@{noun} place", f"The place where {told} was"]
        where += [f"What was the place of X's {noun}?"]
        yield where
        for kind in ("city", "town", "country", "state"):
            yield [
                *(f"In what {kind} {each}?" for each in (asked, *others)),
                f"<What {kind} {asked}?",
                f"<What {kind} was the {place} of X?",
                f"@{kind} of {noun}",
                f"<@{noun} {kind}",
                f"<What was X {noun} {kind}?",
                f"What {kind} saw the {noun} of X?",
                *(f">{form}" for form in where if not form.startswith("<")),
                f"{told} in the {kind} of",
            ]
