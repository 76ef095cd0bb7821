"""Nouns and verbs that the rules of grammar for questions treat in a way of their own."""

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
