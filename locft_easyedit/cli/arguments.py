"""A command's `key=value` arguments, read strictly into a dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import HyperParamsError, one_message
from ..hparams import typed_values
from ..hparams_rules import AUTO, OR_AUTO
from ..utils.parsing import did_you_mean, yaml_of

T = TypeVar("T")

# A path such as ./lr=1e-3/model is no pair: its first part is not a name.
PAIR = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
# What YAML raises besides its own errors.
_BAD_VALUES = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)
_NULL = ("null", "~", "")


def read_arguments(
    config_class: type[T],
    arguments: Sequence[str],
    *,
    command: str,
    positional: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> T:
    """Returns the dataclass that a command's arguments describe.

    `NAME` arguments fill the fields named in `positional`, in order; `key=value` pairs any other
    field. A text is taken as it stands, with its spaces, `=` and `#`; everything else is read as
    YAML: `limit=100`, `lr=1e-4`, `tasks=[mmlu,gsm8k]`, `device=null`. Fields without a default
    must be given. A field with an underscore at its end is a key without it: `as`, say, cannot be
    the name of a field.

    Args:
        config_class: A dataclass whose annotations OmegaConf knows.
        arguments: What follows the command.
        command: Its name, for messages.
        positional: Fields that are given by place; all of them must be.
        defaults: Values from elsewhere, a file say, that the arguments override.

    Raises:
        HyperParamsError: Lists every argument that is unknown, missing, repeated or ill-typed.
    """
    own = [f for f in dataclasses.fields(config_class) if f.init]  # type: ignore[arg-type]
    missing = dataclasses.MISSING
    field_of = {f.name.removesuffix("_"): f.name for f in own}
    required = {f.name for f in own if f.default is missing and f.default_factory is missing}
    named = [key for key, name in field_of.items() if name not in positional]
    typed: dict[str, Any] = {}
    problems = []
    places = list(positional)
    given: set[str] = set()
    for argument in arguments:
        pair = PAIR.fullmatch(argument)
        if argument.startswith("-") and argument != "-":
            problems.append(not_an_option(argument, named))
            continue
        if pair is None and not places:
            problems.append(f"`{argument}` is one too many. Quote values with spaces.")
            continue
        key, text = pair.groups() if pair else (places.pop(0), argument)
        if pair and key not in named:
            problems.append(unknown_key(key, named, positional))
        elif key in given:
            problems.append(f"`{key}` is given twice. Keep one of them.")
        else:
            given.add(key)
            try:
                typed[field_of[key]] = value_of(config_class, field_of[key], text)
            except HyperParamsError as error:
                problems.append(str(error))
    problems += [f"{name.upper()} is missing; it comes before the keys." for name in places]
    problems += [
        f"`{name}` is missing. Add {name}=VALUE."
        for name in named
        if field_of[name] in required and name not in {*given, *(defaults or {})}
    ]
    if problems:
        keys = f"Keys: {', '.join(named)}. `locft {command} --help` explains them."
        raise HyperParamsError(one_message("The arguments cannot be used:", problems) + f"\n{keys}")
    return config_class(**{**(defaults or {}), **typed})


def words_and_keys(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns what is given by place, files say, and the options and `key=value` pairs."""
    words = [a for a in arguments if not a.startswith("-") and not PAIR.fullmatch(a)]
    return words, [a for a in arguments if a not in words]


def run_action(
    actions: Mapping[str, Callable[[Sequence[str]], int]],
    arguments: Sequence[str],
    *,
    command: str,
    what: str,
) -> int:
    """Runs the action that a command's first argument names; returns the exit status.

    Args:
        actions: Each takes what follows its name.
        arguments: What follows the command.
        command: Its name, for messages.
        what: What the actions are done with.

    Raises:
        HyperParamsError: There is no such action.
    """
    if arguments[0] not in actions:
        raise HyperParamsError(
            f"`{arguments[0]}` is nothing that can be done with {what}. Use one of "
            f"{', '.join(actions)} (locft {command} --help)."
        )
    return actions[arguments[0]](arguments[1:])


def value_of(config_class: type, key: str, text: str) -> Any:
    """Returns `text` as the type of a field of `config_class`.

    A list may be given without its brackets.

    Raises:
        HyperParamsError: It is not of that type.
    """
    try:
        return _value(config_class, key, text)
    except (OmegaConfBaseException, yaml.YAMLError, *_BAD_VALUES) as error:
        raise HyperParamsError(
            f"`{key}={text[:200]}` must be {_type_name(config_class, key)}."
        ) from error


def is_list(config_class: type, key: str) -> bool:
    """Returns whether a field of `config_class` holds a list."""
    return any(get_origin(kind) is list for kind in _alternatives(_annotation(config_class, key)))


def _annotation(config_class: type, key: str) -> Any:
    """Returns the type of a field; OmegaConf knows none for what may be `auto` as well."""
    annotation = get_type_hints(config_class)[key]
    return OR_AUTO.get(key, annotation) if annotation is Any else annotation


def _value(config_class: type, key: str, text: str) -> Any:
    """Returns `text` as the type of its field.

    Raises:
        OmegaConfBaseException, YAMLError, ValueError: It is not of that type.
    """
    hint, kinds = get_type_hints(config_class)[key], _alternatives(_annotation(config_class, key))
    if text in _NULL and kinds & {type(None), Any}:
        return None
    if Any in kinds and text.startswith("[") and text.endswith("]"):
        return _list_in(text)
    if Any in kinds or (str in kinds and len(kinds - {type(None)}) == 1):
        if not text.strip():
            raise ValueError(key)
        return text
    or_auto = hint is Any
    if is_list(config_class, key) and not text.lstrip().startswith("["):
        text = text if or_auto and text == AUTO else f"[{text}]"
    if or_auto:
        typed, problems = typed_values({key: yaml_of(text)})
        if problems:
            raise ValueError(key)
        return typed[key]
    if any(get_origin(kind) is list and get_args(kind) == (str,) for kind in kinds):
        values = yaml.load(text, Loader=yaml.BaseLoader)  # names stay texts: `no`, 1e3
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise ValueError(key)
        return values
    schema = OmegaConf.structured(config_class)
    parsed: Any = OmegaConf.from_dotlist([f"{key}={text}"])
    merged = OmegaConf.merge(schema, parsed)[key]  # type: ignore[index]
    return OmegaConf.to_container(merged) if OmegaConf.is_config(merged) else merged


def _list_in(text: str) -> Any:
    """Returns the list in brackets; its texts may hold braces, as templates of modules do."""
    try:
        return yaml_of(text)
    except ValueError:
        return [one.strip().strip("'\"") for one in text[1:-1].split(",")]


def _alternatives(annotation: Any) -> set[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return set(get_args(annotation))
    return {annotation}


def not_an_option(argument: str, named: Sequence[str]) -> str:
    """Returns what to say of `--key` where `key=value` is wanted."""
    name, _, value = argument.lstrip("-").replace("-", "_").partition("=")
    close = difflib.get_close_matches(name, named, n=1)
    hint = f"{close[0]}={value or 'VALUE'}" if close else "key=value"
    return f"`{argument}` is no option here. Write {hint}."


def unknown_key(key: str, named: Sequence[str], positional: Sequence[str] = ()) -> str:
    """Returns what to say of a key that is none of `named`."""
    if key in positional:
        return f"`{key}=` is given by its place, without a key. Write its value first."
    return f"`{key}` is not a key. {did_you_mean(key, named, 'See the keys below.')}"


def _type_name(config_class: type, key: str) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
    }
    kinds = _alternatives(_annotation(config_class, key))
    parts = []
    for kind in sorted(kinds - {type(None)}, key=str):
        if get_origin(kind) is list:
            of = "whole numbers, such as [1,2]" if get_args(kind) == (int,) else "names: [a,b]"
            parts.append(f"a list of {of}")
        else:
            parts.append(names.get(kind, "a value of its kind"))
    parts += ["null"] * (type(None) in kinds)
    parts += [AUTO] * (Any not in kinds and get_type_hints(config_class)[key] is Any)
    return " or ".join(parts)
