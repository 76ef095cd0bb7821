"""Bars where a person looks at them, and none in a file."""

import io

import pytest

from locft_easyedit.utils.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "show", "drawn"),
    [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)],
)
def test_a_bar_is_for_a_terminal(stream, show, drawn):
    file = stream()
    assert list(progress_bar(range(3), show=show, file=file, desc="steps")) == [0, 1, 2]
    assert ("steps" in file.getvalue()) == drawn
