"""`locft delta`: an edit as a file: shown, put into a model's folder, taken out, exported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, TypeVar

from ..delta.delta import Delta
from ..delta.description import delta_tables, description
from ..delta.folder import write_changed_folder
from ..errors import HyperParamsError
from ..utils.output import show, write_json
from .arguments import read_arguments, run_action, words_and_keys

T = TypeVar("T")


@dataclass(kw_only=True)
class ShowConfig:
    """The arguments of `locft delta show`."""

    json: Optional[str] = None  # noqa: UP045


@dataclass(kw_only=True)
class VerifyConfig:
    """The arguments of `locft delta verify`."""

    model: Optional[str] = None  # noqa: UP045
    trust_remote_code: bool = False


@dataclass(kw_only=True)
class ApplyConfig:
    """The arguments of `locft delta apply`."""

    model: str
    output: str
    trust_remote_code: bool = False


@dataclass(kw_only=True)
class RevertConfig(ApplyConfig):
    """The arguments of `locft delta revert`."""

    base: Optional[str] = None  # noqa: UP045


@dataclass(kw_only=True)
class ExportConfig(ApplyConfig):
    """The arguments of `locft delta export`."""

    as_: str
    rank: Optional[int] = None  # noqa: UP045


def main(arguments: Sequence[str]) -> int:
    """Runs `locft delta`; returns the exit status: 1 if an edit does not fit the model.

    Raises:
        LocFTError: The arguments, an edit or a model cannot be used.
    """
    return run_action(_ACTIONS, arguments, command="delta", what="an edit")


def _show(arguments: Sequence[str]) -> int:
    [path], config = _read(ShowConfig, arguments, "show", one=True)
    delta = Delta.load(path)
    show(*delta_tables(delta))
    if config.json is not None:
        write_json(Path(config.json), description(delta))
        sys.stdout.write(f"description: {config.json}\n")
    return 0


def _verify(arguments: Sequence[str]) -> int:
    [path], config = _read(VerifyConfig, arguments, "verify", one=True)
    delta = Delta.load(path)
    sys.stdout.write(f"{path}: edit {delta.short_id} is whole; all hashes are right.\n")
    if config.model is None:
        return 0
    report = delta.verify_folder(config.model, trust_remote_code=config.trust_remote_code)
    meaning = {
        "base": "the model is as before the edit, which can be applied",
        "applied": "the edit is in the model, and can be reverted",
        "neither": "the edit can neither be applied nor reverted",
    }
    sys.stdout.write(f"{config.model}: {report.state}: {meaning[report.state]}.\n")
    for line in report.differences:
        sys.stdout.write(f"  - {line}\n")
    if report.unchecked:
        sys.stdout.write(f"  {report.unchecked} parameters could not be compared.\n")
    return int(report.state == "neither")


def _apply(arguments: Sequence[str]) -> int:
    paths, config = _read(ApplyConfig, arguments, "apply")
    return _write("edited model", [Delta.load(path) for path in paths], config, reverted=False)


def _revert(arguments: Sequence[str]) -> int:
    paths, config = _read(RevertConfig, arguments, "revert")
    deltas = [Delta.load(path) for path in paths]
    if config.base is not None:
        deltas = [d if d.original else d.with_originals(config.base) for d in deltas]
    return _write("reverted model", deltas, config, reverted=True)


def _write(what: str, deltas: Sequence[Delta], config: ApplyConfig, *, reverted: bool) -> int:
    loaded = write_changed_folder(
        deltas,
        config.model,
        config.output,
        reverted=reverted,
        trust_remote_code=config.trust_remote_code,
    )
    how = "loaded and saved anew" if loaded else "only the files with edited matrices rewritten"
    ids = ", ".join(delta.short_id for delta in deltas)
    sys.stdout.write(f"{what}: {config.output} ({how}; {ids})\n")
    return 0


def _export(arguments: Sequence[str]) -> int:
    [path], config = _read(ExportConfig, arguments, "export", one=True)
    forms = {"model": "merged model", "adapter": "adapter", "lora": "LoRA adapter"}
    if config.as_ not in forms:
        raise HyperParamsError(f"`as={config.as_}` must be one of {', '.join(forms)}.")
    if config.as_ != "lora" and config.rank is not None:
        raise HyperParamsError("`rank` is for as=lora only. Leave it out.")
    delta, more = Delta.load(path), ""
    folders, trusted = (config.model, config.output), config.trust_remote_code
    if config.as_ == "model":
        delta.apply_to_folder(*folders, trust_remote_code=trusted)
    elif config.as_ == "adapter":
        delta.export_adapter(*folders, trust_remote_code=trusted)
    else:
        left_out = delta.export_lora(*folders, rank=config.rank, trust_remote_code=trusted)
        more = f"; {100 * left_out:.1f} % of the change is left out"
    sys.stdout.write(f"{forms[config.as_]}: {config.output} ({delta.short_id}{more})\n")
    return 0


def _read(
    config_class: type[T], arguments: Sequence[str], action: str, *, one: bool = False
) -> tuple[list[str], T]:
    """Returns the files and the other arguments of an action.

    Raises:
        HyperParamsError: There is no file, or an argument cannot be used.
    """
    files, rest = words_and_keys(arguments)
    if not files or (one and len(files) > 1):
        raise HyperParamsError(
            f"`locft delta {action}` needs {'one edit' if one else 'at least one edit'}; "
            f"{len(files)} were given. Add the path of an edit.safetensors."
        )
    return files, read_arguments(config_class, rest, command="delta")


_ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {
    "show": _show,
    "verify": _verify,
    "apply": _apply,
    "revert": _revert,
    "export": _export,
}
