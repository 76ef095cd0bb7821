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
from typing import Any, NamedTuple

import torch
import yaml

from ...errors import LocFTError, one_message
from ...hparams import read_mapping
from ...modeling.places import LayerList, find_layers
from .modules import (
    attention_inputs,
    attention_output,
    caveats,
    easyedit_name,
    mlp_output,
    model_label,
    module_names,
    value_problems,
)
from .published import (
    BATCHED,
    DEFAULTS,
    MODULE_KEYS,
    PEERS,
    VALUES,
    VALUES_LAYERS,
    WITHOUT_THE_KEY,
    allowed,
    number_if_it_is_one,
    scaled_layers,
    typed,
)
from .yamls import published_yaml, scaled_parameters

LARGEST_BATCH = 100
# EasyEdit pads on the left for all methods but these, in `BaseEditor.__init__`, and the last two,
# whose code counts tokens from the left all the same: padded there, they train the padding.
_MISPLACED = ("PMET", "MEMIT-FE")
_RIGHT_PADDED = frozenset(
    ["ROME", "R-ROME", "MEMIT", "EMMET", "EAMET", "AlphaEdit", "CORE", "SPHERE", *_MISPLACED]
)


class PeerError(LocFTError):
    """A method of EasyEdit cannot be set up for this model, or with these values."""


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


class _Rule(NamedTuple):
    """A value that depends on the model or on the run, and why it is what it is."""

    key: str
    value: Any
    why: str


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
    runtime = _runtime_rules(model, device, stats_dir, corpus_name, n_samples)
    if method not in PEERS:
        rules: list[_Rule] = []
        base_hparams = None
        if file is None:
            path, n_layers = published_yaml(method)
            from_file = _read(method, path)
            rules = _yaml_rules(method, model, from_file, n_edits, n_layers)
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
    rules, missing = _model_rules(method, model, n_edits, (from_file | given).get("layers"))
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
        [_note(r) for r in rules if r.why] + caveats(method, model, values["layers"]),
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


def _note(rule: _Rule) -> str:
    return f"{rule.key}={rule.value!r}: {rule.why}"


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
    rules: list[_Rule],
    base: PeerHparams | None = None,
) -> PeerHparams:
    """Returns what a file says for a method without a table, with this run's model and files."""
    always = ("model_name", "device", "batch_size")
    used = [r for r in rules if r.key in (*from_file, *always) and r.key not in given]
    values = from_file | {r.key: r.value for r in used} | given
    size = number_if_it_is_one(values.get("batch_size"))
    batched = isinstance(size, (int, float)) and size > 1
    modules = _covariance_modules(values) + ([] if base is None else base.covariance_modules)
    notes = [_note(r) for r in used if r.why]
    if method in _MISPLACED:
        notes.append(
            "Padded on the right: EasyEdit's editor pads it on the left, its code does not."
        )
    return PeerHparams(method, values, not batched, modules, notes, base)


def _yaml_rules(
    method: str, model: Any, values: Mapping[str, Any], n_edits: int, n_layers: int
) -> list[_Rule]:
    """Returns what is set anew in a published YAML, made for a model of `n_layers` layers.

    Raises:
        PeerError: The model lacks a module that the method needs.
    """
    stack = _layers_of(model)
    why = f"the depth of EasyEdit's choice in {n_layers} layers, here in {len(stack.layers)}"
    rules = [
        _Rule("model_parallel", False, ""),
        _Rule("use_chat_template", False, "prompts are asked as they stand"),
        _Rule("fp16", False, ""),
        _Rule("half", False, "the model is loaded already, in its own precision"),
        _Rule("v_loss_layer", len(stack.layers) - 1, "the last layer"),
    ]
    layers = [0]
    if values.get("layers"):
        layers = scaled_layers(values["layers"], len(stack.layers), n_layers)
        rules.append(_Rule("layers", layers, why))
    weights = values.get("mom2_update_weight")
    if isinstance(weights, list):
        rules.append(_Rule("mom2_update_weight", weights[: len(layers)], ""))
    names, missing = module_names(method, model, stack, layers[0])
    if missing and any(key in values for key in missing):
        title = f"{method} cannot be set up for {model_label(model)}:"
        raise PeerError(one_message(title, list(missing.values())))
    layer, published = stack.layers[layers[0]], dict(values)
    output = mlp_output(layer)
    if published.get("mlp_module_tmp") == published.get("rewrite_module_tmp"):
        names["mlp_module_tmp"] = names.get("rewrite_module_tmp", "")
        names["attn_module_tmp"] = f"{names['layer_module_tmp']}.{attention_output(layer)}"
    rules += [_Rule(key, name, "from this model's modules") for key, name in names.items()]
    if "rewrite_module_tmps" in values:
        rules.append(_Rule("rewrite_module_tmps", [names["rewrite_module_tmp"]], ""))
    if "inner_params" in values:
        inner = scaled_parameters(
            values["inner_params"], stack, n_layers, {"mlp.down_proj": output} if output else {}
        )
        rules.append(_Rule("inner_params", inner, why))
    if method in BATCHED:
        size = min(n_edits, LARGEST_BATCH)
        rules.append(_Rule("batch_size", size, f"{n_edits} edits, at most {LARGEST_BATCH} at once"))
    return rules


def _written(folder: Path, method: str, values: Mapping[str, Any]) -> Path:
    path = folder / method / "hparams.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
    return path


def _layers_of(model: Any) -> LayerList:
    stack = find_layers(model)
    if stack is None or not len(stack.layers):
        raise PeerError(f"{model_label(model)} has no list of layers to edit. Take another model.")
    return stack


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


def _runtime_rules(
    model: Any, device: int | str | torch.device, stats_dir: str | Path, corpus: str, n: int
) -> list[_Rule]:
    """Returns the values that say which model, device and files this run uses."""
    number = "0" if str(device) == "cuda" else str(device).removeprefix("cuda:")
    where = "key covariances of this very model, measured on this run's corpus"
    return [
        _Rule("model_name", easyedit_name(model), "the path in EasyEdit's code for such a model"),
        _Rule("device", int(number) if number.isdigit() else number, ""),
        _Rule("stats_dir", str(stats_dir), where),
        _Rule("mom2_dataset", corpus, where),
        _Rule("mom2_n_samples", n, "documents in that corpus"),
        _Rule("P_loc", "null_space_project.pt", "where AlphaEdit itself saves it"),
    ]


def _model_rules(
    method: str, model: Any, n_edits: int, layers: list[int] | None
) -> tuple[list[_Rule], dict[str, str]]:
    """Returns the values that depend on the model, and a problem for each key without one."""
    stack = _layers_of(model)
    n = len(stack.layers)
    if method == "LoRA":
        targets, problem = attention_inputs(stack)
        why = "peft's AdaLoRA needs `total_step`, which EasyEdit does not give"
        rules = [_Rule("lora_type", "lora", why)]
        if problem:
            return rules, {"target_modules": problem}
        return [*rules, _Rule("target_modules", targets, "the attention of this model")], {}
    published = VALUES[method]["layers"]
    scaled = scaled_layers(published, n)
    why = f"the depth of {published} in {VALUES_LAYERS} layers, here in {n}"
    rules = [_Rule("layers", scaled, why)]
    if method == "FT":
        why = "FT-M; prompt_last would train every target token at the prompt's last position"
        rules.append(_Rule("objective_optimization", "target_new", why))
    else:
        rules.append(_Rule("v_loss_layer", n - 1, "the last layer"))
    if method == "ROME":
        rules.append(_Rule("fp16", False, "the model is loaded already, in its own precision"))
    if method in BATCHED:
        size = min(n_edits, LARGEST_BATCH)
        rules.append(_Rule("batch_size", size, f"{n_edits} edits, at most {LARGEST_BATCH} at once"))
    chosen = [i for i in layers or scaled if 0 <= i < n] or scaled
    names, missing = module_names(method, model, stack, chosen[0])
    rules += [_Rule(key, name, "from this model's modules") for key, name in names.items()]
    return rules, missing


def _covariance_modules(values: Mapping[str, Any]) -> list[str]:
    """Returns the modules whose covariance EasyEdit reads, by the values that make it do so."""
    template = values.get("rewrite_module_tmp")
    if not values.get("mom2_adjustment") or not isinstance(template, str):
        return []
    return [template.replace("{}", str(layer)) for layer in values.get("layers", [])]
