"""The renderer of tables: what is given is what is shown, on the terminal and in Markdown."""

import io
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from locft_easyedit.utils.tables import (
    Bold,
    Row,
    markdown_code,
    markdown_table,
    markdown_text,
    number_text,
    one_line,
    terminal_table,
)

# What a reason, a name or an answer can hold, and each table has a meaning for.
NASTY = "[bold red]x[/] | a\n`b` *c* _d_ <b>e</b> $f$ ~~g~~ \\| &amp; \x1b[31mh\x1b[0m [i](j)"


def printed(table, width=80, color=None):
    console = Console(width=width, file=io.StringIO(), color_system=color, force_terminal=True)
    console.print(table)
    return console.file.getvalue()


def test_the_terminal_takes_nothing_for_markup():
    text = "[red]a[/] [/b]"
    table = terminal_table([text, "n"], [Row([text, text])], title=text, caption=text)
    assert printed(table).count(text) == 5


def test_numbers_stand_at_the_right_and_are_never_broken():
    table = terminal_table(["what", "n"], [Row(["word " * 40, "1234567890"]), Row(["a", "1"])])
    lines = printed(table, width=30).splitlines()
    assert max(map(len, lines)) <= 30
    assert any("│ 1234567890 │" in line for line in lines)
    assert any(" 1 │" in line for line in lines)


def test_bold_cells_sections_and_missing_cells():
    rows = [Row(["a", Bold("1")]), Row(["b"], section=True)]
    text = printed(terminal_table(["what", "n"], rows), color="standard")
    assert "\x1b[1m1\x1b[0m" in text
    assert len([line for line in text.splitlines() if line.startswith("├")]) == 1
    assert markdown_table(["what", "n"], rows) == [
        "| what | n |", "| :-- | --: |", "| a | **1** |", "| b |  |",
    ]  # fmt: skip


def test_markdown_cells_hold_any_text():
    rows = [Row([NASTY, Bold(NASTY)])]
    tokens = (
        MarkdownIt("commonmark")
        .enable("table")
        .parse("\n".join(markdown_table(["a", NASTY], rows)))
    )
    cells = [token for token in tokens if token.type == "inline"]
    texts = ["".join(part.content for part in cell.children) for cell in cells]
    assert texts == ["a", one_line(NASTY), one_line(NASTY), one_line(NASTY)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.5, "0.500"), (0, "0.000"), (math.nan, "NaN"), (-math.inf, "-inf")],
)
def test_a_number_as_text(value, text):
    assert number_text(value) == text


def inline(markdown):
    """The text that a Markdown parser finds in one line, and the kinds of its parts."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(f"x{markdown}x")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    parts = tokens[1].children
    return "".join(part.content for part in parts)[1:-1], {part.type for part in parts}


def test_one_line():
    assert (
        one_line(" a\r\n\x1b[1;31mb\x1b[0m\tc\x1b]0;title\x07 \udc80d\u2028e\x9b ") == "a b c d e"
    )


characters = st.text(st.sampled_from("ab _*`\\|[]()<>#~$&;!:-\n\r\x1b\x00é日\ud800\u2028"))


@settings(max_examples=300, deadline=None)
@given(characters)
def test_markdown_text_says_what_it_was_given(text):
    found, kinds = inline(markdown_text(text))
    assert found == one_line(text)
    assert kinds <= {"text", "text_special"}
    assert not one_line(text).isspace()
    assert one_line(text).isprintable()


@settings(max_examples=300, deadline=None)
@given(characters)
def test_markdown_code_says_what_it_was_given(text):
    if one_line(text):
        found, kinds = inline(" " + markdown_code(text) + " ")
        assert found.strip() == one_line(text)
        assert "code_inline" in kinds


def test_words_with_underscores_stay_readable():
    assert markdown_text("rewrite_acc of __init__") == r"rewrite_acc of \_\_init\_\_"
