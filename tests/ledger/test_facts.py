"""What a log says of facts: which are in, what became of the others, and when."""

import pytest

from locft_easyedit.errors import LedgerError
from locft_easyedit.ledger.facts import Book, event_at
from locft_easyedit.ledger.log import ADD, INIT, RETRACT, Event

DAYS = ["2030-01-01T10:00:00Z", "2030-01-02T10:00:00Z", "2030-01-02T11:00:00Z",
        "2030-01-05T08:30:00Z", "2030-01-06T00:00:00Z"]  # fmt: skip


def added(numbers, superseded=(), source=None):
    facts = [
        {"fact": n, "prompt": f"p{n % 10}", "target_new": f"t{n}", "subject": f"s{n % 2}"}
        for n in numbers
    ]
    return {"source": source, "facts": facts, "superseded": [list(pair) for pair in superseded]}


EVENTS = [
    Event(0, DAYS[0], INIT, {}, ""),
    Event(1, DAYS[1], ADD, added([1, 2, 3], source="a"), ""),
    Event(2, DAYS[2], ADD, added([4, 11], [(1, 11)], "b"), ""),
    Event(3, DAYS[3], RETRACT, {"facts": [2], "exact": False}, ""),
]


def numbers(facts):
    return [fact.number for fact in facts]


def test_the_book():
    book = Book.of(EVENTS)
    assert numbers(book.active) == [3, 4, 11]
    assert (book.facts[1].why, book.facts[1].by, book.facts[1].ended) == ("superseded", 11, 2)
    assert (book.facts[2].why, book.facts[2].ended) == ("retracted", 3)
    assert book.at_prompt("p1").number == 11
    assert book.at_prompt("p2") is None
    assert book.groups == [(1, 2, 3), (4, 11)]
    assert book.first == (1, 2, 3)
    assert numbers(Book.of(EVENTS[:2]).active) == [1, 2, 3]


def test_groups_after_an_exact_retraction_and_of_an_empty_ledger():
    exact = Event(4, DAYS[4], RETRACT, {"facts": [4], "exact": True}, "")
    book = Book.of([*EVENTS, exact])
    assert book.groups == [(3,), (11,)]
    assert book.first == (3,)
    rest = Event(5, DAYS[4], RETRACT, {"facts": [3, 11], "exact": False}, "")
    book = Book.of([*EVENTS, exact, rest])
    assert (book.groups, book.first, book.active) == ([], (), [])
    again = Event(6, DAYS[4], ADD, added([12]), "")
    assert Book.of([*EVENTS, exact, rest, again]).first == (12,)


def test_a_group_without_active_facts_goes():
    gone = Event(4, DAYS[4], RETRACT, {"facts": [3], "exact": False}, "")
    book = Book.of([*EVENTS, gone])
    assert book.groups == [(4, 11)]
    assert book.first == (1, 2, 3)  # what was measured with them stays


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"numbers": [4, 3]}, [4, 3]),
        ({"subject": "s1"}, [3, 11]),
        ({"source": "b"}, [4, 11]),
        ({"source": "b", "subject": "s0"}, [4]),
        ({"since": "2030-01-02T11"}, None),
        ({"since": "2030-01-02T10:30"}, [4, 11]),
        ({"since": "2030-01-02"}, [3, 4, 11]),
        ({"since": "2030-01-03"}, None),
    ],
)
def test_chosen(chosen, expected):
    book = Book.of(EVENTS)
    if expected is None:
        with pytest.raises(LedgerError, match="since"):
            book.chosen(**chosen)
    else:
        assert numbers(book.chosen(**chosen)) == expected


@pytest.mark.parametrize(
    ("chosen", "match"),
    [
        ({"numbers": [2]}, r"fact 2 is not in any more: retracted in event 3"),
        ({"numbers": [1]}, r"fact 1 is not in any more: superseded by fact 11 in event 2"),
        ({"numbers": [99]}, r"fact 99 was never there"),
        ({"numbers": [3, 3]}, r"fact 3 is named twice"),
        ({}, r"Name facts by their numbers, or by"),
        ({"numbers": [3], "source": "a"}, r"one of the two"),
        ({"source": "c"}, r"No active fact is of `source='c'`"),
    ],
)
def test_facts_that_cannot_be_taken_out(chosen, match):
    with pytest.raises(LedgerError, match=match):
        Book.of(EVENTS).chosen(**chosen)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (None, 3),
        (0, 0),
        ("2", 2),
        ("2030-01-01", 0),
        ("2030-01-02", 2),
        ("2030-01-02T10:00", 1),
        ("2030-01-02 10:59:59", 1),
        ("2030-01-04", 2),
        ("2031-01-01", 3),
    ],
)
def test_event_at(at, expected):
    assert event_at(EVENTS, at) == expected


@pytest.mark.parametrize(
    ("at", "match"),
    [("4", "no event; the last one is 3"), ("2029-12-31", "before the ledger began"),
     ("yesterday", "neither an event's number nor a day"), ("2030-02-31", "nor a day")],
)  # fmt: skip
def test_no_such_event(at, match):
    with pytest.raises(LedgerError, match=match):
        event_at(EVENTS, at)
