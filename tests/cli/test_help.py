"""`locft COMMAND --help`, `--version` and what is said of a command that is none."""

import dataclasses
import subprocess
import sys

import pytest
from helpers.toys import REPOSITORY

import locft_easyedit
from locft_easyedit.__main__ import main
from locft_easyedit.cli import ask, capability, compare, edit, evaluate, locate, plan
from locft_easyedit.cli.help import COMMANDS, MODULES, help_of, wants_help
from locft_easyedit.evaluation.metric_names import METRICS
from locft_easyedit.modeling.locations import MODULES as MODULES_OF_MODELS

CONFIGS = {
    "edit": edit.EditConfig,
    "ask": ask.AskConfig,
    "plan": plan.PlanConfig,
    "locate": locate.LocateConfig,
    "compare": compare.CompareConfig,
    "evaluate": evaluate.EvaluateConfig,
    "capability": capability.CapabilityConfig,
}
# What a user has no need of: told apart by the jobs of a cluster, or of tests.
UNSAID = {"worker", "row_tokens"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"Usage: locft {command} " in printed
    assert max(map(len, printed.split("\n"))) <= 100


@pytest.mark.parametrize("command", CONFIGS)
def test_every_key_is_named(command):
    text = help_of(command)
    keys = {field.name for field in dataclasses.fields(CONFIGS[command])} - {"model"} - UNSAID
    assert [key for key in sorted(keys) if key not in text] == []


def test_names_are_those_of_the_code():
    assert MODULES == MODULES_OF_MODELS
    assert all(name in help_of("edit") for name in METRICS)
    assert "LocFT-BF+/smollm2-135m" in help_of("edit")


def test_help_needs_no_torch():
    code = "import sys; from locft_easyedit.__main__ import main; status = main(sys.argv[1:]); "
    code += "assert not {'torch', 'transformers', 'hydra'} & set(sys.modules); sys.exit(status)"
    for arguments, status in ((["edit", "--help"], 0), (["edti"], 2), (["--version"], 0)):
        # A new interpreter: others in these tests have torch loaded before they begin.
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "wanted"),
    [
        ("edit", [], True),
        ("edit", ["n=1", "-h"], True),
        ("demo", [], False),
        ("run", ["--help"], True),
        ("run", ["script.py", "--help"], False),
        ("run", [], False),
    ],
)
def test_when_help_is_wanted(command, arguments, wanted):
    assert wants_help(command, arguments) == wanted


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"locft_easyedit {locft_easyedit.__version__}\n"


@pytest.mark.parametrize(("command", "hint"), [("edti", "`edit`"), ("asks", "`ask`"), ("x", None)])
def test_a_command_that_is_none(command, hint, capsys):
    assert main([command]) == 2
    told = capsys.readouterr().err
    assert f"`{command}` is no command. " in told
    assert ("Did you mean" in told) == (hint is not None)
    assert hint is None or f"Did you mean {hint}?" in told
