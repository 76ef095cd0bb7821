"""`locft` and `python -m locft_easyedit`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .cli.messages import debugging, say_interrupted, take_debug, tell
from .distributed.launch import is_launched
from .errors import LocFTError

USAGE = """LocFT-BF for EasyEdit: edit facts by localized, breadth-first fine-tuning.

Usage:
  locft edit --config-name NAME data=FILE ...   edit a model, measure before and after
  locft ask MODEL [delta=FILE] [prompt=TEXT]    try an edit: the same question before and after
  locft plan --config-name NAME n=N gpu=80GiB   what an edit will take, before a model is loaded
  locft locate --config-name NAME data=FILE     find the place to edit: layers, modules, rates
  locft compare --config-name NAME data=FILE    several editing methods side by side
  locft evaluate MODEL data=FILE ...            measure any model, edited by whatever method
  locft delta show|verify|apply|revert|export   an edit as a file: look at it, undo it, pass it on
  locft ledger init|add|retract|show|...        facts that come and go: a log, and its model
  locft capability MODEL ...                    what else the model can do (lm-evaluation-harness)
  locft run SCRIPT ...                          run one of EasyEdit's scripts with LocFT-BF
  locft demo [OPTION ...]                       edit 50 facts into SmolLM2-135M on this machine

Several GPUs: `accelerate launch --multi_gpu -m locft_easyedit COMMAND ...`, or torchrun.
`locft COMMAND --help` says more, `locft --version` which release this is. A mistake is told in one
message; with --debug, anywhere among the arguments (before SCRIPT for `locft run`), the traceback
comes first.
"""

_SCRIPTS = "run"
# Imported when asked for: each needs seconds.
_APPLICATIONS = {
    "edit": ".cli.edit",
    "ask": ".cli.ask",
    "plan": ".cli.plan",
    "locate": ".cli.locate",
    "compare": ".cli.compare",
    "evaluate": ".cli.evaluate",
    "capability": ".cli.capability",
    "delta": ".cli.delta",
    "ledger": ".cli.ledger",
    "demo": ".cli.demo",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2 for a user's mistake)."""
    arguments, debug = take_debug(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if arguments[0] in ("-V", "--version"):
        sys.stdout.write(f"locft_easyedit {sys.modules[__package__].__version__}\n")
        return 0
    command, rest = arguments[0], arguments[1:]
    if not sys.stderr.isatty():  # bars of transformers, as those of this package
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with debugging(debug):
        if not is_launched():
            return _told(command, rest)
        from .cli.launched import end, run_in_world

        try:
            status = run_in_world(command, lambda given: _told(command, given), rest)
        except LocFTError as error:  # the processes do not find each other, or lose each other
            status = tell(command, error)
        except KeyboardInterrupt as error:
            status = say_interrupted(command, error)
        if status != 0:
            end(status)
        return status


def _told(command: str, rest: Sequence[str]) -> int:
    """Runs a command; what goes wrong for a reason is told in one message."""
    try:
        return _run(command, rest)
    except LocFTError as error:
        return tell(command, error)
    except KeyboardInterrupt as error:
        return say_interrupted(command, error)


def _run(command: str, rest: Sequence[str]) -> int:
    if command not in (*_APPLICATIONS, _SCRIPTS):
        close = difflib.get_close_matches(command, (*_APPLICATIONS, _SCRIPTS), n=1)
        hint = f"Did you mean `{close[0]}`? " if close else ""
        names = ", ".join([*_APPLICATIONS, _SCRIPTS])
        raise LocFTError(f"`{command}` is no command. {hint}Use one of {names} (locft --help).")
    help_: Any = importlib.import_module(".cli.help", __package__)
    if help_.wants_help(command, rest):
        sys.stdout.write(help_.help_of(command))
        return 0
    if command in _APPLICATIONS:
        main_of: Callable[[Sequence[str]], int] = importlib.import_module(
            _APPLICATIONS[command], __package__
        ).main
        from tqdm.contrib.logging import logging_redirect_tqdm

        with logging_redirect_tqdm():  # a line of the log does not land on a bar
            return main_of(rest)
    if not rest:
        raise LocFTError("`locft run` needs the path of a script. See locft run --help.")
    from .easyedit.script import run_script

    run_script(rest[0], list(rest[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
