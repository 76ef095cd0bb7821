"""The table of a comparison on the terminal and in Markdown."""

import io
import math

import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from utils.test_tables import NASTY

from locft_easyedit.compare.outcome import Comparison, Outcome
from locft_easyedit.compare.table import comparison_markdown, comparison_table
from locft_easyedit.utils.tables import one_line

HEADS = [
    "reliability ↑", "generalization ↑", "portability ↑", "locality ↑", "rewrite_acc ↑",
    "rephrase_acc ↑", "capability ↑", "s per edit ↓", "peak GiB ↓",
]  # fmt: skip


def means(reliability, rewrite=0.5, locality=0.25):
    return {
        "rewrite_acc": rewrite,
        "rephrase_acc": 0.375,
        "locality": {"neighborhood_acc": locality},
        "generated": {"reliability": reliability, "generalization": 0.125, "portability": 0.0625},
    }


def row(method="FT", reliability=0.5, cost=2.0, memory=4.0, **changes):
    values = {
        "n_edits": 100,
        "after_all": means(reliability),
        "capability": {"tasks": {"mmlu": 0.25, "sst2": 0.75}, "mean": 0.5},
        "seconds_per_edit": cost,
        "peak_memory_gib": memory,
        "peak_memory_of": "GPU",
    }
    return Outcome(method, **values | changes)


def comparison(*outcomes, **changes):
    values = {
        "model": "SmolLM2-135M-Instruct",
        "data": "CounterFact",
        "n": 100,
        "easyedit": "current source (14cea82)",
        "device": "CPU",
        "dtype": "float32",
        "before": {
            "rewrite_acc": 0.1875,
            "rephrase_acc": 0.1875,
            "generated": {"reliability": 0.0, "generalization": 0.0, "portability": 0.0},
        },
        "capability_before": {"tasks": {"mmlu": 0.5, "sst2": 0.625}, "mean": 0.5625},
    }
    return Comparison(**values | changes, outcomes=list(outcomes))


def parsed(markdown):
    """The rows of the table as a Markdown parser sees them: a list of (text, is bold) a row."""
    rows, cells = [], None
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "tr_open":
            cells = []
        elif token.type == "tr_close":
            rows.append(cells)
            cells = None
        elif token.type == "inline" and cells is not None:
            parts = token.children
            text = "".join(part.content for part in parts if part.type.startswith("text"))
            others = {part.type for part in parts} - {"text", "text_special"}
            assert others <= {"strong_open", "strong_close"}
            cells.append((text, bool(others)))
    return rows


def plain(markdown):
    return [[text for text, _ in cells] for cells in parsed(markdown)]


def bold(made, head):
    """The methods whose figure under `head` is bold."""
    heads, *rows = parsed(comparison_markdown(made))
    column = [text for text, _ in heads].index(head)
    return [cells[0][0] for cells in rows if cells[column][1]]


def printed(made, width=120, color=None):
    console = Console(width=width, file=io.StringIO(), color_system=color, force_terminal=True)
    console.print(comparison_table(made))
    return console.file.getvalue()


def test_markdown_table():
    one_by_one = {"rewrite_acc": 1.0, "generated": {"reliability": 0.875}}
    made = comparison(
        row("LocFT-BF", 1.0, cost=0.25, memory=8.0),
        row("FT", 0.5, right_after_each=one_by_one),
        Outcome("MEND", "unavailable", "no archive of the hypernetwork"),
    )
    assert plain(comparison_markdown(made)) == [
        ["method", *HEADS],
        ["before editing", "0.00", "0.00", "0.00", "-", "0.19", "0.19", "0.56", "-", "-"],
        ["LocFT-BF", "1.00", "0.12", "0.06", "0.25", "0.50", "0.38", "0.50", "0.250", "8.00"],
        ["FT", "0.50 (0.88 right after each edit)", "0.12", "0.06", "0.25",
         "0.50 (1.00 right after each edit)", "0.38", "0.50", "2.00", "4.00"],
        ["MEND", "unavailable: no archive of the hypernetwork", *[""] * 8],
    ]  # fmt: skip


def test_title_names_what_was_compared():
    title = comparison_markdown(comparison(row(), n=3000)).splitlines()[0]
    for part in (
        "SmolLM2-135M-Instruct", "CounterFact", "3,000 edits", "CPU", "float32",
        "current source (14cea82)",
    ):  # fmt: skip
        assert part in title
        assert part in printed(comparison(row(), n=3000))


def test_best_is_bold():
    made = comparison(row("A", 0.25, cost=9.0, memory=2.0), row("B", 0.75, cost=3.0, memory=6.0))
    assert bold(made, "reliability ↑") == ["B"]
    assert bold(made, "s per edit ↓") == ["B"]
    assert bold(made, "peak GiB ↓") == ["A"]


def test_ties_are_all_bold():
    made = comparison(row("A", 0.5), row("B", 0.501), row("C", 0.25))
    assert bold(made, "reliability ↑") == ["A", "B"]  # both are shown as 0.50
    assert bold(made, "generalization ↑") == ["A", "B", "C"]
    made.n = 1000  # three decimals
    assert bold(made, "reliability ↑") == ["B"]


def test_only_methods_that_finished_are_best():
    made = comparison(
        row("A", 0.25),
        row("B", 1.0, after_all=means(1.0, rewrite=math.nan), cost=0.1),
        row("C", 1.0, status="failed", reason="out of memory"),
    )
    assert bold(made, "reliability ↑") == ["A"]
    assert bold(made, "s per edit ↓") == ["A"]
    made.outcomes.pop(0)
    assert not any(cell for head in HEADS for cell in bold(made, head))


def test_figures_equal_to_the_best_of_a_broken_model_stay_plain():
    made = comparison(row("A", 0.5), row("B", after_all=means(0.5, rewrite=math.nan)))
    assert bold(made, "reliability ↑") == ["A"]


def test_the_model_before_is_never_best():
    made = comparison(row("A", 0.25))
    made.before["generated"]["reliability"] = 1.0
    assert bold(made, "reliability ↑") == ["A"]


def test_missing_figures_are_neither_best_nor_silent():
    made = comparison(row("A", cost=None, capability=None), row("B", cost=5.0))
    heads, _, first, _ = plain(comparison_markdown(made))
    assert first[heads.index("s per edit ↓")] == "?"
    assert first[heads.index("capability ↑")] == "?"
    assert bold(made, "s per edit ↓") == ["B"]
    assert "?: asked for" in comparison_markdown(made)
    assert "?: asked for" in printed(made)
    assert "?: asked for" not in comparison_markdown(comparison(row()))


def test_what_nobody_has_takes_no_column():
    after = {"rewrite_acc": 0.5}
    made = comparison(
        Outcome("FT", n_edits=100, after_all=after), before={}, capability_before=None
    )
    assert plain(comparison_markdown(made)) == [
        ["method", "rewrite_acc ↑"], ["before editing", "-"], ["FT", "0.50"],
    ]  # fmt: skip
    legend = "Measured for no method: reliability, contains, generalization, in wrappers, in chat"
    assert legend in comparison_markdown(made)
    assert legend in " ".join(printed(made, 200).split())


def test_figures_that_are_no_number_are_shown_and_named():
    made = comparison(row("A", after_all=means(0.5, rewrite=math.nan)), row("B"))
    heads, _, first, _ = plain(comparison_markdown(made))
    assert first[0] == "A (not finite)"
    assert first[heads.index("rewrite_acc ↑")] == "NaN"
    assert first[heads.index("reliability ↑")] == "0.50"
    assert "- **A**: Measured, but no finite number: after_all.rewrite_acc is nan." in (
        comparison_markdown(made)
    )
    text = printed(made, 80)
    assert "NaN" in text
    assert "after_all.rewrite_acc is nan" in text


def test_memory_of_two_kinds_does_not_compare():
    made = comparison(row("A", memory=2.0), row("B", memory=9.0, peak_memory_of="process"))
    assert bold(made, "peak GiB ↓") == []
    told = "peak memory of the GPU (A) or of the process (B)"
    assert told in comparison_markdown(made)
    assert told in printed(made)
    assert "peak memory of the GPU." in comparison_markdown(comparison(row()))


def test_notes():
    made = comparison(
        row(
            "ROME",
            corpus="WikiText, 400 documents",
            notes=["layer 5 by rule."],
            seconds={"statistics": 86.0, "edit": 200.0},
            hparams={"layers": [5], "mom2_dataset": "wiki`pedia"},
            log="out/ROME.log",
        ),
        row("FT", n_edits=7),
        row("MEMIT"),
        versions={"torch": "2.13"},
    )
    text = comparison_markdown(made)
    assert (
        "- **ROME**: key covariances from WikiText, 400 documents; layer 5 by rule; "
        "seconds: statistics 86.0, edit 200; log: `out/ROME.log`.\n"
    ) in text
    assert "- **ROME**: ``layers=[5], mom2_dataset='wiki`pedia'``\n" in text
    assert "- **FT**: 7 of 100 edits.\n" in text
    assert "- **MEMIT**" not in text
    assert "Versions: torch 2.13." in text
    assert "FT: 7 of 100 edits." in printed(made)


@pytest.mark.parametrize("width", [80, 120])
def test_no_figure_is_truncated(width):
    after = {"rewrite_acc": 0.901, "generated": {"reliability": 0.902, "generalization": 0.903}}
    made = comparison(
        row("LocFT-BF", 0.801, cost=0.0123, memory=71.36),
        row("a method with a long name", 0.802, cost=123456.0, right_after_each=after),
        row("AlphaEdit", 0.803, capability=None, after_all=means(0.803, rewrite=math.inf)),
        Outcome("MEND", "unavailable", "no archive"),
        n=3000,
    )
    text = printed(made, width)
    lines = text.splitlines()
    assert "…" not in text
    assert max(map(len, lines)) <= width
    figures = {cell for line in lines for cell in line.split()}
    expected = "0.801 0.802 0.803 0.901 0.902 0.903 0.500 0.562 inf ? 0.012 123456 71.4 2.00"
    assert set(expected.split()) <= figures
    assert [line.split()[0] for line in lines if line.startswith(("right", "un"))] == [
        "right", "unavailable", "right",  # the last one belongs to the legend
    ]  # fmt: skip
    (head,) = [line for line in lines if line.startswith("method")]
    assert head.split() == [
        "method", "rel.↑", "gen.↑", "port.↑", "loc.↑", "rewr.↑", "reph.↑", "cap.↑", "s/edit↓",
        "GiB↓",
    ]  # fmt: skip


def test_figures_in_chat_and_in_wrappers():
    measured = means(0.801)
    measured["generated"]["contains_target"] = 0.805
    measured["wrapped"] = {"reliability": 0.602, "chat_reliability": 0.403}
    made = comparison(row("LocFT-BF", after_all=measured), row("FT", 0.804), n=3000)
    text = printed(made, 80)
    assert "…" not in text
    assert {"0.602", "0.403", "wrap.↑", "chat↑"} <= {*text.split()}
    # Too many for one table: the methods' names stand in both.
    assert [line.split()[:1] for line in text.splitlines()].count(["method"]) == 2
    heads, _, first, second = plain(comparison_markdown(made))
    assert [first[heads.index(head)] for head in ("in wrappers ↑", "in chat ↑")] == [
        "0.602", "0.403",
    ]  # fmt: skip
    assert second[heads.index("in chat ↑")] == "?"


def test_terminal_bold():
    made = comparison(row("A", 0.25), row("B", 0.75), row("C", 0.75))
    rows = [line for line in printed(made, color="standard").splitlines() if line[:1] in set("ABC")]
    assert len(rows) == 3
    # Right-justified: the space before the figure has its style.
    assert ["\x1b[1m 0.75\x1b[0m" in line for line in rows] == [False, True, True]
    assert rows[0].split()[1] == "0.25"


def test_terminal_takes_nothing_for_markup():
    made = comparison(
        row(NASTY), Outcome("[blink]m", "failed", NASTY), model="[b]model", easyedit="[/]"
    )
    text = " ".join(printed(made, 200).split())
    assert "\x1b[31m" not in printed(made)
    assert "[b]model" in text
    assert one_line(NASTY) in text
    assert "[blink]m" in text


def test_names_in_the_terminal_are_text():
    for status in ("ok", "failed"):
        text = printed(comparison(row("[b]FT[/b]", status=status)))
        assert any(line.startswith("[b]FT[/b] ") for line in text.splitlines())


def test_all_failed():
    made = comparison(
        Outcome("ROME", "failed", "boom"),
        Outcome("MEND", "unavailable"),
        before={},
        capability_before=None,
    )
    assert plain(comparison_markdown(made)) == [
        ["method", "reliability ↑"],
        ["before editing", "-"],
        ["ROME", "failed: boom"],
        ["MEND", "unavailable: no reason was recorded"],
    ]
    text = printed(made, 80)
    assert "ROME failed: boom." in text
    assert "MEND unavailable: no reason was recorded." in text


def test_no_methods():
    assert len(plain(comparison_markdown(comparison()))) == 2
    assert "before" in printed(comparison())


def test_nasty_text_stays_in_its_cell():
    made = comparison(row(NASTY), Outcome("B", "failed", NASTY), data=NASTY)
    rows = plain(comparison_markdown(made))
    assert rows[2][0] == one_line(NASTY)
    assert rows[3][:2] == ["B", f"failed: {one_line(NASTY)}"]
    assert {len(cells) for cells in rows} == {10}


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "0"),
        (0.0004, "<0.001"),
        (0.0123, "0.012"),
        (0.25, "0.250"),
        (3.14159, "3.14"),
        (57.06, "57.1"),
        (99.96, "100.0"),
        (12345.6, "12346"),
    ],
)
def test_seconds(seconds, shown):
    heads, _, cells = plain(comparison_markdown(comparison(row(cost=seconds))))
    assert cells[heads.index("s per edit ↓")] == shown
