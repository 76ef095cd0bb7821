"""`locft ledger`: facts that come and go: added, superseded, taken out, looked up, exported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Optional, TypeVar

from ..data.readers import read_requests
from ..distributed.world import get_world
from ..errors import HyperParamsError
from ..hparams import LocFTBFHyperParams
from ..ledger.export import EXPORTS
from ..ledger.facts import Book, Fact, event_at
from ..ledger.ledger import Ledger
from ..ledger.report import as_json, facts_table, log_table
from ..utils.output import show, write_json
from ..utils.parsing import shown
from ..utils.tables import counted
from .application import take_config_file, values_of
from .arguments import read_arguments, run_action, words_and_keys

T = TypeVar("T")


@dataclass(kw_only=True)
class InitConfig(LocFTBFHyperParams):
    """The arguments of `locft ledger init`: the hyper-parameters."""


@dataclass(kw_only=True)
class LogConfig:
    """The arguments of `locft ledger log`."""

    json: Optional[str] = None  # noqa: UP045


@dataclass(kw_only=True)
class ShowConfig(LogConfig):
    """The arguments of `locft ledger show`."""

    at: Optional[str] = None  # noqa: UP045
    subject: Optional[str] = None  # noqa: UP045
    source: Optional[str] = None  # noqa: UP045
    all: bool = False


@dataclass(kw_only=True)
class ModelConfig:
    """Where the base model is: the arguments of `locft ledger diff`."""

    model_name: Optional[str] = None  # noqa: UP045
    device: Optional[str] = None  # noqa: UP045


@dataclass(kw_only=True)
class AddConfig(ModelConfig):
    """The arguments of `locft ledger add`."""

    data: str
    n: Optional[int] = None  # noqa: UP045
    source: Optional[str] = None  # noqa: UP045


@dataclass(kw_only=True)
class RetractConfig(ModelConfig):
    """The arguments of `locft ledger retract`."""

    subject: Optional[str] = None  # noqa: UP045
    source: Optional[str] = None  # noqa: UP045
    since: Optional[str] = None  # noqa: UP045
    exact: bool = False


@dataclass(kw_only=True)
class VerifyConfig(ModelConfig):
    """The arguments of `locft ledger verify`."""

    replay: bool = False


@dataclass(kw_only=True)
class ExportConfig(ModelConfig):
    """The arguments of `locft ledger export`."""

    output: str
    as_: str
    at: Optional[str] = None  # noqa: UP045
    model: Optional[str] = None  # noqa: UP045


def main(arguments: Sequence[str]) -> int:
    """Runs `locft ledger`; returns the exit status: 1 if `verify` finds something wrong.

    Raises:
        LocFTError: The arguments, the ledger, the data or the model cannot be used.
    """
    return run_action(_ACTIONS, arguments, command="ledger", what="a ledger")


def _init(arguments: Sequence[str]) -> int:
    rest, _, file = take_config_file(list(arguments))
    [path], config = _read(InitConfig, rest, "init", defaults=values_of(file))
    values = {field.name: getattr(config, field.name) for field in fields(LocFTBFHyperParams)}
    ledger = Ledger.init(path, LocFTBFHyperParams(**values))
    place = ledger.hparams
    where = (
        "the first facts choose the place"
        if place.chooses
        else f"layers {place.layers}, {place.rewrite_module_tmp}, lr {place.lr:g}"
    )
    _say(f"{path}: a ledger of {place.model_name} ({where}).")
    return 0


def _add(arguments: Sequence[str]) -> int:
    [path], config = _read(AddConfig, arguments, "add")
    with get_world().sharing_errors():
        requests = read_requests(config.data, config.n)
    with_model = _opened(path, config)
    added = with_model.add(requests, source=config.source)
    if added.event is None:
        _say(f"Nothing happened: all {counted(added.already, 'fact')} are in already.")
        return 0
    for old, new in added.superseded[:10]:
        fact, by = with_model.book.facts[old], with_model.book.facts[new]
        _say(
            f"fact {old} is superseded by {new}: {shown(fact.prompt)} -> {shown(by.target)} "
            f"(was {shown(fact.target)})"
        )
    if len(added.superseded) > 10:
        _say(f"... and {len(added.superseded) - 10} more are superseded.")
    already = f"; {added.already} were in already" if added.already else ""
    numbers = f"{added.facts[0].number} to {added.facts[-1].number}"
    _say(
        f"event {added.event.number}: {counted(len(added.facts), 'fact')} ({numbers}) added"
        f"{already}. {_active(with_model.book)}"
    )
    _say_lost(added.lost)
    return 0


def _retract(arguments: Sequence[str]) -> int:
    words, config = _read(RetractConfig, arguments, "retract", more="numbers of facts")
    wrong = [word for word in words[1:] if not word.isdecimal()]
    if wrong:
        raise HyperParamsError(
            f"`{wrong[0]}` is no fact's number. `locft ledger show {words[0]}` lists them; "
            "subject=, source= and since= choose facts as well."
        )
    ledger = _opened(words[0], config)
    gone = ledger.retract(
        [*map(int, words[1:])],
        subject=config.subject,
        source=config.source,
        since=config.since,
        exact=config.exact,
    )
    how = ", exactly" * config.exact
    _say(
        f"event {gone.event.number}: {counted(len(gone.facts), 'fact')} taken out{how}. "
        f"{_active(ledger.book)}"
    )
    if gone.not_out:
        _say(
            f"{len(gone.not_out)} of them do not give the base model's answer yet: "
            f"{_some(gone.not_out)}. exact=true with any later retraction takes them out for good."
        )
    _say_lost(gone.lost)
    return 0


def _show(arguments: Sequence[str]) -> int:
    [path], config = _read(ShowConfig, arguments, "show")
    ledger = Ledger.open(path)
    number = event_at(ledger.log.events, config.at)
    book = Book.of(ledger.log.events[: number + 1])

    def wanted(fact: Fact) -> bool:
        return (
            (config.all or fact.active)
            and (config.subject is None or fact.subject == config.subject.strip())
            and (config.source is None or fact.source == config.source)
        )

    facts = [fact for fact in book.facts.values() if wanted(fact)]
    title = f"{path} after event {number}: {_active(book)}"
    show(facts_table(facts, title, everything=config.all))
    _write(config.json, as_json(facts))
    return 0


def _log(arguments: Sequence[str]) -> int:
    [path], config = _read(LogConfig, arguments, "log")
    events = Ledger.open(path).log.events
    show(log_table(events))
    _write(config.json, [vars(event) for event in events])
    return 0


def _diff(arguments: Sequence[str]) -> int:
    words, config = _read(ModelConfig, arguments, "diff", more="one or two events")
    if len(words) not in (2, 3):
        raise HyperParamsError(
            "`locft ledger diff` takes LEDGER and one or two events. See --help."
        )
    found = _opened(words[0], config).diff(*words[1:])
    between = f"between events {found.first} and {found.second}"
    for facts, what in ((found.came, "came"), (found.went, "went")):
        show(facts_table(facts, f"{counted(len(facts), 'fact')} {what} {between}", everything=True))
    for name, change in found.change.items():
        _say(f"{name} changed by {100 * change:.2f} % of its norm.")
    return 0


def _verify(arguments: Sequence[str]) -> int:
    [path], config = _read(VerifyConfig, arguments, "verify")
    ledger = _opened(path, config)
    found = ledger.verify(replay=config.replay)
    _say(f"{path}: the chain of {counted(found.n_events, 'event')} is whole.")
    _say(f"matrices are kept of events {_some(found.states) or 'none'}; others are made anew.")
    for problem in found.problems:
        _say(f"  - {problem}")
    _say(f"{found.n_facts - len(found.lost)} of {counted(found.n_facts, 'active fact')} hold.")
    _say_lost(found.lost)
    sys.stdout.flush()
    ledger.world.all_gather(None)  # a launcher ends the others once one has ended with a status
    return int(bool(found.problems or found.lost))


def _export(arguments: Sequence[str]) -> int:
    [path], config = _read(ExportConfig, arguments, "export")
    if config.as_ not in EXPORTS:
        raise HyperParamsError(f"`as={config.as_}` must be one of {', '.join(EXPORTS)}.")
    ledger = _opened(path, config)
    written = ledger.export(config.output, config.as_, config.at, model=config.model)
    _say(f"{config.as_}: {written}")
    return 0


def _opened(path: str, config: ModelConfig) -> Ledger:
    return Ledger.open(path, model_name=config.model_name, device=config.device)


def _read(
    config_class: type[T],
    arguments: Sequence[str],
    action: str,
    *,
    more: str | None = None,
    defaults: dict[str, Any] | None = None,
) -> tuple[list[str], T]:
    """Returns the ledger, with what follows it by place if `more` may, and the other arguments.

    Raises:
        HyperParamsError: There is no ledger, or an argument cannot be used.
    """
    words, rest = words_and_keys(arguments)
    if not words or (more is None and len(words) > 1):
        what = "LEDGER, a folder" if more is None else f"LEDGER, a folder, and then {more}"
        raise HyperParamsError(
            f"`locft ledger {action}` takes {what}; {len(words)} words were given."
        )
    return words, read_arguments(config_class, rest, command="ledger", defaults=defaults)


def _active(book: Book) -> str:
    return f"{counted(len(book.active), 'fact')} in."


def _say_lost(lost: Sequence[int]) -> None:
    if lost:
        _say(
            f"{counted(len(lost), 'fact')} could not be made to hold: {_some(lost)}. Retract them, "
            "or make a ledger with another place or rate."
        )


def _some(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return ", ".join(map(str, numbers[:10])) + more


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _write(path: str | None, value: Any) -> None:
    if path is not None and get_world().is_main_process:
        write_json(Path(path), value)


_ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {
    "init": _init,
    "add": _add,
    "retract": _retract,
    "show": _show,
    "log": _log,
    "diff": _diff,
    "verify": _verify,
    "export": _export,
}
