"""LocFT-BF as the `--editing_method` of a script that has never heard of it.

EasyEdit's scripts compare `args.editing_method` with the names that they know, take that method's
hyper-parameter class, and put the name into the names of their results. A `MethodName` passes for
one of the names in comparisons, and reads as `LocFT-BF` everywhere else.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HyperParamsError, LocFTError
from ..hparams import hparams_folder, read_mapping
from ..hparams_rules import ALG_NAME, ALG_NAMES
from ..hparams_spellings import known_alg_name

METHOD, HPARAMS = "--editing_method", "--hparams_dir"
# What LocFT-BF is to a script: fine-tuning, which every script that takes several methods knows.
_STANDS_FOR = "FT"


class MethodName(str):
    """The name of a method that a script takes for another one's.

    Attributes:
        stands_for: The name that it is equal to, besides its own.
    """

    stands_for: str

    def __new__(cls, name: str, stands_for: str) -> MethodName:
        """Returns the name `name`, which is equal to `stands_for`."""
        self = super().__new__(cls, name)
        self.stands_for = stands_for
        return self

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self.stands_for, other) is True or str.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.stands_for)  # found in dictionaries and sets of the script's names

    def __str__(self) -> str:
        return self  # argparse's `type=str` hands it on as it is

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return MethodName, ("".join(self), self.stands_for)


@dataclass(frozen=True)
class ScriptMethod:
    """What a script's command line says of the method.

    Attributes:
        arguments: The command line for the script.
        alg_name: Which of our methods it is to run; `None` for EasyEdit's own.
    """

    arguments: list[str]
    alg_name: str | None


def script_method(script: Path, source: str, arguments: Sequence[str]) -> ScriptMethod:
    """Returns the command line with our method's name, if the script is to run it.

    It is, if `--editing_method` names it, or if `--hparams_dir` is a YAML of it.

    Args:
        script: The script, for messages.
        source: Its text.
        arguments: Its command line.

    Raises:
        LocFTError: The script cannot run other methods than its own.
        HyperParamsError: The YAML is another method's.
    """
    given = list(arguments)
    asked = known_alg_name(_value(given, METHOD))
    yaml = _value(given, HPARAMS)
    alg_name = _alg_name_in(yaml)
    known = _texts(source)
    if asked in ALG_NAMES:
        if ALG_NAME in known:  # the script has a branch of its own for it
            return ScriptMethod(given, None)
        if _STANDS_FOR not in known:
            raise LocFTError(
                f"{script.name} runs methods of its own{_named(source)}, and has no place for "
                f"{asked}: it has no `{METHOD}={_STANDS_FOR}`, which {asked} takes the place of. "
                "Call `BaseEditor` in a script of your own (docs/easyedit.md)."
            )
        if yaml is not None and alg_name not in ALG_NAMES:
            problem = "is none of its YAMLs" if alg_name is None else f"is a YAML of {alg_name}"
            raise HyperParamsError(
                f"`{HPARAMS}={yaml}` {problem}, and `{METHOD}={asked}`. Give a YAML with "
                f"`alg_name: {ALG_NAME}`, such as those in {hparams_folder()}."
            )
        return ScriptMethod(_with_value(given, MethodName(asked, _STANDS_FOR)), asked)
    if asked is None or alg_name not in ALG_NAMES:
        return ScriptMethod(given, None)
    return ScriptMethod(_with_value(given, MethodName(alg_name, asked)), alg_name)


def refusal(error: BaseException, script: Path, source: str) -> str | None:
    """Returns what a script says when it refuses what it was given; `None` if it does not.

    It does with a `raise` or an `assert` of its own; anything else is an error in the script, or
    below it.
    """
    trace, last = error.__traceback__, None
    while trace is not None:
        last, trace = trace, trace.tb_next
    if last is None or last.tb_frame.f_code.co_filename != str(script):
        return None
    line = last.tb_lineno
    refuses = any(
        isinstance(node, (ast.Raise, ast.Assert))
        and node.lineno <= line <= (node.end_lineno or node.lineno)
        for node in ast.walk(ast.parse(source))
    )
    return f"{type(error).__name__}: {error}".rstrip(": ") if refuses else None


def _value(arguments: Sequence[str], option: str) -> str | None:
    """Returns the value of an option, given as `--option value` or `--option=value`."""
    value = None
    for i, argument in enumerate(arguments):
        name, equals, text = argument.partition("=")
        if name == option:
            value = text if equals else next(iter(arguments[i + 1 :]), None)
    return value


def _with_value(arguments: Sequence[str], method: MethodName) -> list[str]:
    """Returns the arguments with this method; its own item, since a part of one is a plain text."""
    rest: list[str] = []
    ahead = iter(arguments)
    for argument in ahead:
        name, equals, _ = argument.partition("=")
        if name == METHOD:
            rest += [METHOD, method]
            if not equals:
                next(ahead, None)
        else:
            rest.append(argument)
    return rest


def _alg_name_in(yaml: str | None) -> Any:
    """Returns the `alg_name` of a YAML; `None` if there is none to be read."""
    try:
        return known_alg_name(read_mapping(yaml)[1].get("alg_name")) if yaml else None
    except HyperParamsError:
        return None  # whoever reads it says what is wrong


def _texts(source: str) -> set[str]:
    """Returns the texts that stand in a script."""
    return {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def _named(source: str) -> str:
    """Returns the names that a script compares its `editing_method` with, for a message."""
    names = sorted(
        text.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        and getattr(node.left, "attr", getattr(node.left, "id", None)) == METHOD[2:]
        for text in node.comparators
        if isinstance(text, ast.Constant) and isinstance(text.value, str)
    )
    return f" ({', '.join(dict.fromkeys(names))})" if names else ""
