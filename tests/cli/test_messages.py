"""`--debug`: where an error comes from, for every command."""

import pytest
from helpers.rank_pool import run_python

from locft_easyedit.__main__ import USAGE, main
from locft_easyedit.cli.messages import debugging, take_debug, tell
from locft_easyedit.errors import DataError


@pytest.mark.parametrize(
    ("arguments", "rest", "debug"),
    [
        ([], [], False),
        (["edit", "n=1"], ["edit", "n=1"], False),
        (["--debug", "edit", "n=1"], ["edit", "n=1"], True),
        (["edit", "--debug", "n=1"], ["edit", "n=1"], True),
        (["edit", "n=1", "--debug"], ["edit", "n=1"], True),
        (["edit", "--debug", "--debug"], ["edit"], True),
        (["run", "--debug", "s.py", "--a"], ["run", "s.py", "--a"], True),
        (["--debug", "run", "s.py"], ["run", "s.py"], True),
        (["run", "s.py", "--debug"], ["run", "s.py", "--debug"], False),
        (["--debug", "run", "s.py", "--debug"], ["run", "s.py", "--debug"], True),
        (["run", "--debug"], ["run"], True),
        (["evaluate", "run", "--debug"], ["evaluate", "run"], True),
    ],
)
def test_it_is_taken_out_wherever_it_is(arguments, rest, debug):
    assert take_debug(arguments) == (rest, debug)


WRONG = [
    ["frob"],
    ["run"],
    ["run", "none.py"],
    ["plan", "--config-name", "nobody"],
    ["edit", "--config-name=nobody"],
    ["evaluate", "model"],
    ["capability", "model", "limit=x"],
    ["compare", "--config-name=nobody"],
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_mistake_is_one_message_and_with_debug_the_traceback(arguments, capsys):
    assert main(arguments) == 2
    plain = capsys.readouterr().err
    assert plain.startswith(f"locft {arguments[0]}: ")
    assert "Traceback" not in plain
    for debug in (["--debug", *arguments], [arguments[0], "--debug", *arguments[1:]]):
        assert main(debug) == 2
        told = capsys.readouterr().err
        assert told.startswith("Traceback (most recent call last):")
        assert told.endswith(plain)


@pytest.mark.parametrize("debug", [False, True])
def test_an_application_of_hydra_does_the_same(tmp_path, debug, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--config-name=smollm2-135m", "data=none.json", "output=out"]
    done = run_python(["-m", "locft_easyedit", "edit", *arguments, *["--debug"] * debug])
    assert done.returncode == 2
    assert "locft edit: `data=none.json` is not a file" in done.stderr
    assert ("Traceback" in done.stderr) == debug
    assert ("read_requests" in done.stderr) == debug


def test_it_lasts_for_one_command(capsys):
    with debugging(True):
        tell("edit", DataError("wrong"))
    assert "DataError: wrong\n" in capsys.readouterr().err
    tell("edit", DataError("wrong"))
    assert capsys.readouterr().err == "locft edit: wrong\n"


def test_usage_says_so():
    assert "--debug" in USAGE
