"""What a writer is told, and what is read out of its answer."""

import pytest

from locft_easyedit.training.rewordings.instruction import (
    N_ASKED,
    Prompt,
    instruction,
    is_question,
    rewordings_in,
)


def test_a_question_stays_one():
    example, message = instruction(Prompt("Who wrote Emma?", "Emma"))
    assert message.endswith("\n\nWho wrote Emma?")
    assert 'Keep "Emma" as it stands.' in message
    assert "language of the question" in message
    assert all(map(is_question, example.answer.splitlines()))


def test_a_statement_stays_unfinished():
    example, message = instruction(Prompt(" The author of Emma is ", "Emma"))
    assert message.endswith("\n\nThe author of Emma is")
    assert "unfinished" in message
    assert not any(map(is_question, example.answer.splitlines()))


@pytest.mark.parametrize("prompt", ["Who wrote Emma?", "The author of Emma is"])
def test_the_example_is_what_is_asked_for(prompt):
    example, _ = instruction(Prompt(prompt, None))
    lines = rewordings_in(example.answer, example.question)
    assert len(set(lines)) == N_ASKED
    name = "Lima" if is_question(prompt) else "Emma"
    assert f'Keep "{name}"' in example.question
    assert all(name in line for line in lines)


def test_a_subject_that_the_prompt_lacks_is_not_asked_for():
    for subject in (None, "", "Persuasion"):
        assert "Keep" not in instruction(Prompt("Who wrote Emma?", subject))[1]


@pytest.mark.parametrize("text", ["エマの作者は誰ですか？", "من كتب إيما؟", "Who wrote Emma? "])
def test_question_marks_of_other_scripts(text):
    assert is_question(text)
    assert not is_question(text.rstrip()[:-1])


@pytest.mark.parametrize(
    "line",
    [
        "1. Who wrote Emma?", "(2) Who wrote Emma?", "3) Who wrote Emma?", "- Who wrote Emma?",
        "* **Who wrote Emma?**", "•\tWho wrote Emma?", '"Who wrote Emma?"', "“Who wrote Emma?”",
        '4. "Who wrote Emma?"', "  Who wrote Emma?  ", "`Who wrote Emma?`", "«Who wrote Emma?»",
    ],
)  # fmt: skip
def test_numbers_bullets_and_quotes_go(line):
    assert rewordings_in(f"Here are some:\n\n{line}\n", "Who wrote Emma?") == ["Who wrote Emma?"]


@pytest.mark.parametrize(
    "line",
    [
        "1984 was written by",
        "24 hours after it began, the war of",
        '"Emma" and "Persuasion"',
        "9.5",
    ],
)
def test_what_belongs_to_the_text_stays(line):
    assert rewordings_in(line, "It was written by") == [line]


@pytest.mark.parametrize("end", ["...", "…", " ___", " [blank]", " ... "])
def test_dots_that_stand_for_what_is_to_come_go(end):
    assert rewordings_in(f"Emma is by{end}", "The author of Emma is") == ["Emma is by"]


def test_a_prompt_that_ends_with_a_colon_has_no_headings():
    assert rewordings_in("Emma's author:", "Author of Emma:") == ["Emma's author:"]
    assert rewordings_in("Emma's author:", "The author of Emma is") == []


def test_what_was_cut_off_is_left_out():
    assert rewordings_in("one way\nanother w", "a way", complete=False) == ["one way"]
    assert rewordings_in("another w", "a way", complete=False) == []


def test_thoughts_are_no_rewordings():
    assert rewordings_in("<think>\nHow about this\n</think>\n\none way", "a way") == ["one way"]


@pytest.mark.parametrize("answer", ["", "\n \n", "1.", "---", '""', "a\ud800"])
def test_nothing_in_it(answer):
    assert rewordings_in(answer, "a way") == []
