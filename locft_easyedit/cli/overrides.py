"""A command's `key=value` arguments for Hydra: checked first, and quoted as its grammar needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from ..errors import HyperParamsError, one_message
from .arguments import PAIR, is_list, not_an_option, unknown_key, value_of

# Hydra's own options.
_WITH_VALUE = (
    "--config-name", "-cn", "--config-dir", "-cd", "--config-path", "-cp", "--cfg", "-c", "--info",
    "-i", "--package", "-p", "--experimental-rerun",
)  # fmt: skip
_FLAGS = ("--multirun", "-m", "--run", "-r", "--resolve", "--hydra-help", "--shell-completion")


def hydra_overrides(
    config_class: type, arguments: Sequence[str], *, command: str, sweep: bool
) -> list[str]:
    """Returns the arguments with every value of a key of `config_class` in Hydra's grammar.

    A text is taken as it stands (with its spaces, commas, brackets, `=` and `%`), as by
    `read_arguments`. What is Hydra's own is left to it: options, keys with a dot, `+` or `~`,
    values with `${...}` or in quotes, and in a multirun the lists of values to go through.

    Args:
        config_class: The dataclass of the configuration.
        arguments: What follows the command.
        command: Its name, for messages.
        sweep: Whether several values of a key are several runs.

    Raises:
        HyperParamsError: Lists every key that is unknown and every value that is ill-typed.
    """
    fields = dataclasses.fields(config_class)
    names = [field.name for field in fields]
    open_keys = {field.name for field in fields if field.default_factory is dict}
    written: list[str] = []
    problems: list[str] = []
    for argument in arguments:
        key, text = _pair(argument)
        after_option = written[-1:] and written[-1] in _WITH_VALUE
        if key.partition(".")[0] in open_keys:
            # Hydra adds keys to a dictionary only where a + says so; a user should not have to.
            written.append(f"++{argument}" if "." in key else argument)
        elif not key or "." in key:
            problem = "" if after_option else _problem_of(argument, names)
            problems += [problem] if problem else []
            written.append(argument)
        elif key not in names:
            problems.append(unknown_key(key, names))
        elif _is_hydras(argument, text, sweep=sweep, lists=is_list(config_class, key)):
            written.append(argument)
        else:
            several = text.split(",") if sweep and text[:1] != "[" else [text]
            try:
                values = [_encoded(value_of(config_class, key, one)) for one in several]
                written.append(f"{key}={','.join(values)}")
            except HyperParamsError as error:
                problems.append(str(error))
    if problems:
        hint = f"`locft {command} --help` names all keys."
        raise HyperParamsError(one_message("The arguments cannot be used:", problems) + f"\n{hint}")
    return written


def _pair(argument: str) -> tuple[str, str]:
    """Returns key and value of `key=value`, the key with its dots; two empty texts of another."""
    key, equals, text = argument.partition("=")
    plain = bool(equals) and PAIR.fullmatch(f"{key.replace('.', '_')}=") is not None
    return (key, text) if plain else ("", "")


def _problem_of(argument: str, names: Sequence[str]) -> str:
    """Returns what is wrong with an argument that is no `key=value`, if anything is."""
    if argument.startswith("-"):
        known = argument.partition("=")[0] in (*_WITH_VALUE, *_FLAGS)
        return "" if known else not_an_option(argument, names)
    if "=" in argument or argument.startswith("~"):
        return ""
    return f"`{argument}` is no KEY=VALUE. Quote values with spaces."


def _is_hydras(argument: str, text: str, *, sweep: bool, lists: bool) -> bool:
    """Returns whether a value is for Hydra to read: computed, quoted, or one of several runs'."""
    quoted = len(text) > 1 and text[0] in "'\"" and text[0] == text[-1]
    if "${" in text or quoted or not sweep:
        return "${" in text or quoted
    return (text.startswith("[") or not lists) and _is_sweep(argument)


def _is_sweep(argument: str) -> bool:
    """Returns whether Hydra reads several values, or a range, in an argument."""
    try:
        [override] = OverridesParser.create().parse_overrides([argument])
    except HydraException:
        return False
    return bool(override.is_sweep_override())


def _encoded(value: Any) -> str:
    """Returns a value as Hydra reads it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, list):
        return f"[{','.join(map(_encoded, value))}]"
    return repr(value)
