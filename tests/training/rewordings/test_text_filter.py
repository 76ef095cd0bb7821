"""What speaks against a rewording before any model looks at it."""

import pytest

from locft_easyedit.training.rewordings.text_filter import objection

PROMPT, SUBJECT, TARGET = "Who wrote the novel Emma?", "Emma", "Charles Dickens"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Emma was written by whom?", None),
        (PROMPT, "same"),
        ("who wrote  the novel EMMA?", "same"),
        ("By whom is Emma?", "same"),  # kept already
        ("Who wrote the novel?", "subject"),
        ("Who wrote emma, the novel?", "subject"),
        ("Did charles dickens write Emma?", "target"),
        ("Emma was written by", "form"),
        ("Emma was written by somebody.", "form"),
        ("Who, " + "as everybody would like to know, " * 5 + "wrote Emma?", "long"),
    ],
)
def test_of_a_question(text, reason):
    assert objection(text, PROMPT, SUBJECT, [TARGET], ["By whom is Emma?"]) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Emma is a novel by", None),
        ("Emma is a novel by her.", "form"),
        ("エマの作者です。", "form"),
        ("Who wrote Emma?", "form"),
    ],
)
def test_of_a_statement(text, reason):
    assert objection(text, "The author of Emma is", None, [TARGET]) == reason


def test_a_finished_prompt_may_be_reworded_by_one():
    assert objection("Say who wrote Emma.", "Tell me who wrote Emma.", "Emma", [TARGET]) is None


def test_a_subject_that_the_prompt_lacks_asks_for_nothing():
    assert objection("By whom is it?", "Who wrote it?", "Emma", [TARGET]) is None


def test_a_target_that_the_prompt_holds_gives_nothing_away():
    assert objection("Is Emma by Austen or Scott?", "Austen or Scott, who wrote Emma?", "Emma",
                     ["Austen"]) is None  # fmt: skip


def test_a_part_of_a_word_is_no_target():
    assert objection("Who ever wrote Emma?", PROMPT, SUBJECT, ["eve"]) is None


def test_targets_of_all_edits_of_a_prompt_count():
    assert objection("Is Emma by Scott?", PROMPT, SUBJECT, [TARGET, "Scott"]) == "target"
