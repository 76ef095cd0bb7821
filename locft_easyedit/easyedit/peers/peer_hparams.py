"""Hyper-parameters of EasyEdit's own methods for any causal language model, by a few rules.

EasyEdit publishes YAMLs for a few models of 7B parameters. Here the Llama ones are the base, and
rules adapt what depends on the model: layers by their depth, module names by looking at the
model, and what EasyEdit needs in order to run on it. Every value that a rule set has a note.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from ...errors import one_message
from ...hparams import read_mapping
from .modules import (
    caveats,
    model_label,
    value_problems,
)
from .published import (
    BATCHED,
    DEFAULTS,
    MODULE_KEYS,
    PEERS,
    VALUES,
    WITHOUT_THE_KEY,
    allowed,
    number_if_it_is_one,
    typed,
)
from .rules import PeerError, Rule, model_rules, note, runtime_rules, yaml_rules
from .yamls import published_yaml

# EasyEdit pads on the left for all methods but these, in `BaseEditor.__init__`, and the last two,
# whose code counts tokens from the left all the same: padded there, they train the padding.
_MISPLACED = ("PMET", "MEMIT-FE")
_RIGHT_PADDED = frozenset(
    ["ROME", "R-ROME", "MEMIT", "EMMET", "EAMET", "AlphaEdit", "CORE", "SPHERE", *_MISPLACED]
)


@dataclass(frozen=True)
class PeerHparams:
    """What a method of EasyEdit is run with.

    Attributes:
        method: Its name in EasyEdit's `ALG_DICT`.
        values: The keys of EasyEdit's hyper-parameter class (current source) and their values.
        one_by_one: Whether the method gets one request a call; otherwise `batch_size` of them.
        covariance_modules: Modules whose inputs' second moment EasyEdit reads from `stats_dir`.
        notes: A line for each value that a rule set, and why; then what does not fit the model.
        base: Those of the method that this one calls for each edit, if it does.
    """

    method: str
    values: dict[str, Any]
    one_by_one: bool
    covariance_modules: list[str]
    notes: list[str]
    base: PeerHparams | None = None

    def load(self, cls: Any) -> Any:
        """Returns the values as an object of EasyEdit's class, made by its own `from_hparams`.

        Some classes have other keys in a YAML than as attributes, and some read the YAML of another
        method, which lies below a folder of its name.

        Args:
            cls: The hyper-parameter class.

        Raises:
            PeerError: The class lacks a key, and would not do what its value says.
        """
        values = self.values
        if self.method in PEERS:
            values = self.values_for([field.name for field in fields(cls)])
        with TemporaryDirectory() as folder:
            path = _written(Path(folder), self.method, values)
            if self.base is not None:
                _written(Path(folder), self.base.method, self.base.values)
            return cls.from_hparams(str(path))

    def values_for(self, fields: Collection[str]) -> dict[str, Any]:
        """Returns the values that a hyper-parameter class with these `fields` takes.

        EasyEdit's release lacks some keys of the current source. They are left out where that
        changes nothing.

        Raises:
            PeerError: The class lacks a key, and would not do what its value says.
        """
        unknown = {key: value for key, value in self.values.items() if key not in fields}
        problems = []
        for key, value in unknown.items():
            if key not in WITHOUT_THE_KEY:
                problems.append(f"`{key}={value!r}`: there is no such key. Remove it.")
            elif WITHOUT_THE_KEY[key] != value:
                always = WITHOUT_THE_KEY[key]
                problems.append(f"`{key}={value!r}`: it is always {always!r}. Set it to that.")
        if problems:
            title = (
                f"This EasyEdit's {self.method} lacks keys of the current source; set "
                "EASYEDIT_HOME to a clone of that, or change:"
            )
            raise PeerError(one_message(title, problems))
        return {key: value for key, value in self.values.items() if key not in unknown}


def peer_hparams(
    method: str,
    model: Any,
    *,
    device: int | str | torch.device,
    n_edits: int,
    stats_dir: str | Path,
    corpus_name: str,
    n_samples: int,
    overrides: Mapping[str, Any] | None = None,
) -> PeerHparams:
    """Returns the hyper-parameters with which EasyEdit runs `method` on `model`.

    Args:
        method: One of EasyEdit's names. Those that are none of `PEERS` begin with EasyEdit's YAML,
            from the clone that EASYEDIT_HOME names, or from `hparams` in `overrides`.
        model: A causal language model; only its configuration and its modules' names and types
            are read, so its weights need not be loaded.
        device: The model's device. CUDA devices become numbers. EasyEdit's release takes nothing
            else: give it 0 on a CPU as well.
        n_edits: Edits in the run.
        stats_dir: Folder of the key covariances.
        corpus_name: Their name there (`stats_name`).
        n_samples: Documents they were measured on.
        overrides: Values of EasyEdit's keys that win over table and rules, and `hparams`: a YAML
            of EasyEdit to start from instead of the table and of the rules for its keys.

    Raises:
        MethodUnavailableError: There are no values for the method.
        PeerError: Keys are unknown or values ill-typed, or the model lacks a module that the method
            needs. All problems of a kind in one error.
        HyperParamsError: The file of `hparams` cannot be read.
    """
    given = dict(overrides or {})
    file = given.pop("hparams", None)
    from_file = {} if file is None else _read(method, file)
    runtime = runtime_rules(model, device, stats_dir, corpus_name, n_samples)
    if method not in PEERS:
        rules: list[Rule] = []
        base_hparams = None
        if file is None:
            path, n_layers = published_yaml(method)
            from_file = _read(method, path)
            rules = yaml_rules(method, model, from_file, n_edits, n_layers)
        if "base_method" in from_file:
            base_hparams = peer_hparams(
                from_file["base_method"],
                model,
                device=device,
                n_edits=n_edits,
                stats_dir=stats_dir,
                corpus_name=corpus_name,
                n_samples=n_samples,
            )
        return _as_in_the_file(method, from_file, given, rules + runtime, base_hparams)

    base = DEFAULTS | deepcopy(VALUES[method]) | {"alg_name": method}
    keys = [*base, "model_name", "device"]
    keys += [] if method == "LoRA" else MODULE_KEYS
    keys += ["batch_size"] if method in BATCHED else []
    from_file, given = _checked(method, from_file, given, keys)
    rules, missing = model_rules(method, model, n_edits, (from_file | given).get("layers"))
    # A file is its author's choice for a model; only what names this run's model and files goes
    # before it.
    rules = [r for r in rules if r.key not in from_file] + [r for r in runtime if r.key in keys]
    rules = [r for r in rules if r.key not in given]
    values = base | from_file | {r.key: r.value for r in rules} | given
    problems = [text for key, text in missing.items() if key not in from_file | given]
    problems += value_problems(method, model, values)
    if problems:
        raise PeerError(
            one_message(f"{method} cannot be set up for {model_label(model)}:", problems)
        )
    return PeerHparams(
        method,
        {key: values[key] for key in keys},
        method not in BATCHED,
        _covariance_modules(values),
        [note(r) for r in rules if r.why] + caveats(method, model, values["layers"]),
    )


def name_for_easyedit_(model: Any, model_id: str) -> None:
    """Gives a model the names by which EasyEdit finds covariances and samples context templates.

    The current source looks for covariances below the last part of `config._name_or_path`, the
    release below the whole of it: a name without a slash is the same to both. And unless
    `name_or_path` holds "llama", the sampling that ROME, MEMIT and AlphaEdit begin with passes an
    attention mask of one column where the past has many: what it samples then ignores the text.

    Args:
        model: The model, on which both names are set.
        model_id: As for `write_key_covariances`.
    """
    model.config._name_or_path = model_id
    model.name_or_path = "llama"


def padding_side(method: str) -> str:
    """Returns the side on which EasyEdit pads for this method."""
    return "right" if method in _RIGHT_PADDED else "left"


def _read(method: str, file: Any) -> dict[str, Any]:
    path, config = read_mapping(file)
    name = config.get("alg_name")
    if str(name).casefold() != method.casefold():  # `ULTRAEDIT` in the folder UltraEdit
        raise PeerError(
            f"`alg_name={name!r}` in {path} is another method. Give a file of {method}."
        )
    return {key: number_if_it_is_one(value) for key, value in config.items()}


def _as_in_the_file(
    method: str,
    from_file: dict[str, Any],
    given: dict[str, Any],
    rules: list[Rule],
    base: PeerHparams | None = None,
) -> PeerHparams:
    """Returns what a file says for a method without a table, with this run's model and files."""
    always = ("model_name", "device", "batch_size")
    used = [r for r in rules if r.key in (*from_file, *always) and r.key not in given]
    values = from_file | {r.key: r.value for r in used} | given
    size = number_if_it_is_one(values.get("batch_size"))
    batched = isinstance(size, (int, float)) and size > 1
    modules = _covariance_modules(values) + ([] if base is None else base.covariance_modules)
    notes = [note(r) for r in used if r.why]
    if method in _MISPLACED:
        notes.append(
            "Padded on the right: EasyEdit's editor pads it on the left, its code does not."
        )
    return PeerHparams(method, values, not batched, modules, notes, base)


def _written(folder: Path, method: str, values: Mapping[str, Any]) -> Path:
    path = folder / method / "hparams.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
    return path


def _checked(
    method: str, from_file: dict[str, Any], given: dict[str, Any], keys: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a file's values and the user's, converted to the types of their keys.

    Raises:
        PeerError: Keys are unknown or values ill-typed.
    """
    result: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    problems = []
    for source, values, into in ((" in the file", from_file, result[0]), ("", given, result[1])):
        for key, value in values.items():
            if key not in keys:
                problems.append(f"`{key}`{source} is not a key of {method}. Remove it.")
                continue
            try:
                into[key] = typed(key, value)
            except (TypeError, ValueError):
                problems.append(f"`{key}={value!r}`{source} must be {allowed(key)}.")
    if given.get("alg_name", method) != method:
        problems.append(f"`alg_name={given['alg_name']!r}` is another method. Remove it.")
    if problems:
        problems.append(f"The keys are: {', '.join(keys)}.")
        raise PeerError(one_message(f"Values for {method}:", problems, limit=len(problems)))
    return result


def _covariance_modules(values: Mapping[str, Any]) -> list[str]:
    """Returns the modules whose covariance EasyEdit reads, by the values that make it do so."""
    template = values.get("rewrite_module_tmp")
    if not values.get("mom2_adjustment") or not isinstance(template, str):
        return []
    return [template.replace("{}", str(layer)) for layer in values.get("layers", [])]
