"""Hydra applications over the flat hparams YAMLs, with the keys of a command besides."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm.contrib.logging import logging_redirect_tqdm

from ..distributed.world import get_world
from ..errors import HyperParamsError, LocFTError, OutputError, one_message
from ..evaluation.report import flat, metric_label
from ..hparams import LocFTBFHyperParams, given_values, read_mapping, shipped_yamls, typed_values
from ..hparams_rules import ALG_NAME, ALG_NAMES
from ..utils.output import show
from ..utils.tables import Row, number_text, terminal_table
from .messages import say_interrupted, tell
from .overrides import hydra_overrides

if TYPE_CHECKING:
    from rich.table import Table

_RAISES = "HYDRA_FULL_ERROR"

# Returns the means that a table of several runs shows, if there are any.
Job = Callable[[LocFTBFHyperParams, dict[str, Any], Path], Mapping[str, Any] | None]


def run_application(
    arguments: Sequence[str],
    *,
    command: str,
    config_class: type,
    job: Job,
) -> int:
    """Runs a command as a Hydra application; returns the exit status.

    Args:
        arguments: What follows the command.
        command: Its name.
        config_class: The hyper-parameters' dataclass with the command's keys besides.
        job: Called with the hyper-parameters, the values of the command's own keys and the folder
            where results go.

    Raises:
        HyperParamsError: An argument cannot be used.
        OutputError: The folder for results cannot be made.
    """
    arguments = list(arguments)
    begun = False  # a job, and not ended well
    runs: list[tuple[list[str], Mapping[str, Any]]] = []
    shared = {f.name for f in fields(LocFTBFHyperParams)}
    command_keys = [f.name for f in fields(config_class) if f.name not in shared]

    def run(config: DictConfig) -> None:
        """One run; Hydra calls it once, or once a cell of a multirun."""
        nonlocal begun
        begun = True
        try:
            values = _resolved(config)
            given = {key: values.pop(key, None) for key in command_keys}
            hparams = LocFTBFHyperParams.from_mapping(values, source="The hyper-parameters")
            if given["data"] in (None, "???"):
                raise HyperParamsError("`data` is missing. Add data=FILE, a JSON file with edits.")
            with logging_redirect_tqdm():  # a line of the log does not land on a bar
                figures = job(hparams, given, Path(HydraConfig.get().runtime.output_dir))
            runs.append((list(HydraConfig.get().overrides.task), figures or {}))
            begun = False
        except LocFTError as error:
            # One message for a user's mistake; Hydra would print a stack of its own calls.
            raise SystemExit(tell(command, error)) from error
        except KeyboardInterrupt as error:
            raise SystemExit(say_interrupted(command, error)) from error

    # Between overrides Hydra's parser would take what follows for unknown.
    sweep = [a for a in arguments if a in ("-m", "--multirun")]
    arguments = sweep + [a for a in arguments if a not in sweep]
    arguments = _with_stored_configs(arguments, command, config_class)
    arguments = hydra_overrides(config_class, arguments, command=command, sweep=bool(sweep))
    if not get_world().is_main_process:  # what Hydra logs and writes is rank 0's to do
        arguments += ["hydra/job_logging=none", "hydra/hydra_logging=none"]
        arguments += ["hydra.output_subdir=null"]
    sys.argv = [f"locft {command}", *arguments]
    try:
        with _raised_errors():
            hydra.main(version_base="1.3", config_path=None)(run)()
    except SystemExit as error:
        return _status(error)
    except HydraException as error:
        raise HyperParamsError(_message_of(error)) from error
    except (OSError, ValueError) as error:
        # Of what Hydra writes before the job: the folder, its settings, the log.
        reason = error if isinstance(error, OSError) else error.__cause__
        if begun or not isinstance(reason, OSError):
            raise
        raise OutputError(
            f"`output` cannot be written: {reason.filename or 'the log'}: {reason.strerror}. "
            "Choose a folder that you may write to, with some space."
        ) from error
    if len(runs) > 1 and get_world().is_main_process:
        show(_table_of(runs))
    return 0


def _table_of(runs: Sequence[tuple[list[str], Mapping[str, Any]]]) -> Table:
    """Returns the figures of all runs of a sweep, each under what it has of its own."""
    shared = set.intersection(*(set(overrides) for overrides, _ in runs))
    means = [flat(figures) for _, figures in runs]
    own = [" ".join(o for o in overrides if o not in shared) for overrides, _ in runs]
    columns = [f"{i}: {name}" for i, name in enumerate(own)]
    rows = [
        Row([metric_label(key), *(number_text(found.get(key)) for found in means)])
        for key in dict.fromkeys(key for found in means for key in found)
    ]
    return terminal_table(["metric", *columns], rows, title="All runs: means after the edit")


@contextmanager
def _raised_errors() -> Iterator[None]:
    """Context manager in which Hydra raises errors; it would print them and end the program."""
    former = os.environ.get(_RAISES)
    os.environ[_RAISES] = "1"
    try:
        yield
    finally:
        if former is None:
            del os.environ[_RAISES]
        else:
            os.environ[_RAISES] = former


def _message_of(error: HydraException) -> str:
    """Returns what Hydra says of a command line, in one line, with what to do."""
    said = [str(one).strip().split("\n")[0] for one in (error, error.__cause__) if one is not None]
    return f"{'; '.join(dict.fromkeys(said)).rstrip('.')}. Correct the arguments."


def _status(error: SystemExit) -> int:
    return error.code if isinstance(error.code, int) else int(error.code is not None)


def _resolved(config: DictConfig) -> dict[str, Any]:
    """Returns plain values; `${...}` on the command line is the user's own and is computed.

    Raises:
        HyperParamsError: It cannot be.
    """
    try:
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        reason = str(error).split("\n")[0]
        raise HyperParamsError(f"{reason}. Correct the value on the command line.") from error


def _yamls_in(folder: Path) -> dict[str, Path]:
    """Returns the YAMLs of a folder by name."""
    return {path.stem: path for path in folder.glob("*.yaml")}


def take_config_file(
    arguments: Sequence[str], *, keep_folder: bool = False
) -> tuple[list[str], str, Path]:
    """Returns the arguments without `--config-name`, the YAML's name, and the YAML.

    `--config-dir` is left among the arguments with `keep_folder` alone.

    Raises:
        HyperParamsError: No YAML is named, or there is no such YAML.
    """
    files = shipped_yamls()
    rest: list[str] = []
    asked = None
    ahead = iter(arguments)
    for argument in ahead:
        option, equals, value = argument.partition("=")
        if option not in ("--config-dir", "-cd", "--config-name", "-cn"):
            rest.append(argument)
            continue
        value = value if equals else next(ahead, "")
        if option in ("--config-dir", "-cd"):
            files |= _yamls_in(Path(value))
            rest += [option, value] if keep_folder else []
        else:
            asked = Path(value).stem if value.endswith((".yaml", ".yml")) else value
            if asked != value:
                files[asked] = Path(value)
            asked = asked.removeprefix(f"{ALG_NAME}/")
    if asked is None:
        raise HyperParamsError(f"--config-name is missing. Choose one of: {', '.join(files)}.")
    if asked not in files:
        close = difflib.get_close_matches(asked, files, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise HyperParamsError(
            f"--config-name={asked} is not known. {hint}Choose one of: {', '.join(files)}, or give "
            "the path of a YAML."
        )
    return rest, asked, files[asked]


def values_of(file: Path) -> dict[str, Any]:
    """Returns what a YAML of this method says.

    Raises:
        HyperParamsError: It does not parse, is another method's, or has unknown or ill-typed keys.
    """
    _, values = read_mapping(file)
    alg_name = values.get("alg_name", ALG_NAME)
    if alg_name not in ALG_NAMES:
        raise HyperParamsError(
            f"`alg_name={alg_name!r}` in {file} is another method. Use a file with "
            f"`alg_name: {ALG_NAME}`."
        )
    values, problems = typed_values(given_values(values))
    if problems:
        raise HyperParamsError(one_message(f"{file}:", problems))
    return {key: value for key, value in values.items() if value is not None}


def _with_stored_configs(arguments: list[str], command: str, config_class: type) -> list[str]:
    """Puts every YAML that `--config-name` can mean into Hydra's store, with the command's keys.

    A flat YAML that EasyEdit can read has no place for `data` or `output`, and Hydra accepts only
    keys that a configuration has. Returns the arguments, with the name of what is stored.
    """
    arguments, _, file = take_config_file(arguments, keep_folder=True)
    name = f"locft_{command}"  # to Hydra the part of a name before a slash is a group
    arguments.insert(0, f"--config-name={name}")  # Hydra wants options before overrides
    _, values = read_mapping(file)
    # The command line may still give what is missing.
    values, problems = typed_values(given_values(values))
    if problems:
        raise HyperParamsError(one_message(f"{file}:", problems))
    node: Any = OmegaConf.merge(OmegaConf.structured(config_class), values)
    hydra_settings = {
        "run": {"dir": "${output}"},
        "sweep": {"dir": "${output}", "subdir": "${hydra.job.num}"},
        "job": {"name": f"locft_{command}"},
    }
    ConfigStore.instance().store(
        name=name, node={"hydra": hydra_settings, **{k: node._get_node(k) for k in node}}
    )
    return arguments
