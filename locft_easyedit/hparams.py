"""The hyper-parameters of LocFT-BF: EasyEdit's fields and `from_hparams`, read strictly."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, Optional, Union, get_type_hints  # noqa: UP035

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import HyperParamsError, one_message
from .hparams_rules import (
    ALG_NAME,
    ALG_NAMES,
    AUTO,
    BREADTH_FIRST,
    CHAT,
    CONSTANT,
    CONTEXT,
    EDIT,
    NEIGHBOURS,
    OR_AUTO,
    PLAIN,
    PLUS_NAME,
    QUESTION_ANSWER,
    SAMPLED,
    broken_rules,
)
from .hparams_spellings import known_alg_name, translated
from .utils.parsing import (
    bad_text,
    did_you_mean,
    is_file,
    json_of,
    shown,
    text_of,
    texts_in,
    yaml_of,
)

if TYPE_CHECKING:
    import torch

_MOST_BYTES = 2**20
_MOST_ENTRIES = 1000  # of a list; models have fewer layers
REQUIRED_IN_FILE = ("alg_name", "model_name", "layers", "rewrite_module_tmp", "lr")
# Keys of EasyEdit's other fine-tuning YAMLs: a copied file is told that they do nothing here.
OTHER_METHODS_KEYS = frozenset(
    [
        "layer_module_tmp",
        "mlp_module_tmp",
        "attn_module_tmp",
        "ln_f_module",
        "lm_head_module",
        "kl_factor",
        "norm_constraint",
        "objective_optimization",
        "fact_token",
        "v_lr",
        "v_loss_layer",
        "stats_dir",
    ]
)


# What `alg_name: LocFT-BF+` stands for where the YAML says nothing else.
_PLUS_FORMS = (CHAT, QUESTION_ANSWER, CONTEXT)
_PLUS_PRESERVE = (SAMPLED, NEIGHBOURS)
_PLUS_MIN_BATCHES = 10
_REPAIRS = 10

# What OmegaConf, and the values themselves, raise where they do not suit a field.
_NOT_OF_THE_TYPE = (
    OmegaConfBaseException,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    OverflowError,
    RecursionError,
)


class HyperParamsBase:
    """What stands above our hyper-parameters: `register` puts EasyEdit's `HyperParams` there."""


# OmegaConf reads these annotations at run time and knows no PEP 604 unions on Python 3.10.
@dataclass(kw_only=True)
class LocFTBFHyperParams(HyperParamsBase):
    """Everything that a YAML with `alg_name: LocFT-BF` can say.

    Keys that EasyEdit has keep EasyEdit's names. `num_steps`, `batch_size`, `lr` and the two
    thresholds are those of "Fine-tuning Done Right in Model Editing" (arXiv 2509.22072).

    Attributes:
        alg_name: `LocFT-BF`, the published method, or `LocFT-BF+`, the same with `forms`,
            `preserve`, `min_batches` and `repairs` on.
        model_name: Folder or hub name of a causal language model; in EasyEdit also a pair
            `(model, tokenizer)` that is loaded already.
        device: `cpu`, `cuda`, `cuda:N` or the number N; `None` takes a GPU where there is one.
        layers: Layers to train, counted from 0; `auto` chooses one, with a few of the edits that
            are to be made.
        rewrite_module_tmp: What to train in each layer, with `{}` for the layer number: a
            parameter, a module (all its parameters), or a list of them. One expert of a mixture is
            named by its index behind the fused parameter: `...mlp.experts.down_proj[3]`. `auto`,
            together with `layers: auto`, chooses that as well.
        lr: Learning rate of Adam; `auto`, together with `layers: auto`, chooses that as well.
        num_steps: Passes over all edits at most (epochs); depth-first, steps on each mini-batch.
        pipeline: `breadth_first`, as published: epochs over all edits, shuffled. `depth_first`, as
            editors before it, for comparison: one mini-batch after another, in the order given,
            each until its loss is below `batch_loss_threshold`, with an optimizer of its own.
        batch_size: Edits in a mini-batch, at most. It never limits how many edits are trained
            together.
        min_batches: Mini-batches that an epoch has at least, as far as there are edits: with few of
            them, mini-batches are smaller than `batch_size`, since too few steps learn nothing.
            `None` leaves it at `batch_size`, with LocFT-BF+ it is 10.
        repairs: Rounds at most in which edits that do not hold after the epochs are trained again,
            at a lower rate and beside others that do; 0 checks nothing, as published. `None` is 0,
            and 10 with LocFT-BF+ and in a ledger, which does not take 0.
        loss_average: Of which a mini-batch's loss is the mean: of its `edit`s, each the mean of its
            target's tokens, as published; or of the `token`s of all its targets. An epoch's loss is
            the mean of its mini-batches', by their edits, in both cases.
        lr_schedule: `constant`, as published, or `cosine`: a linear rise over the first tenth of
            all steps, then half a cosine down to 0.
        weight_decay: Adam's L2 penalty.
        max_length: Read by EasyEdit's own evaluators only; nothing is ever truncated here.
        model_parallel: Spread the model's layers over the visible GPUs of this machine; `device`
            then says nothing. One GPU, or none, holds the whole model.
        fp16: EasyEdit's older way to say `dtype: float16`.
        dtype: Precision of weights and computation: float32, bfloat16 or float16. The trained
            matrices have float32 masters in every case. `None` is bfloat16 on a GPU and float32 on
            a CPU, or float16 with fp16.
        seed: Seed of the shuffling, of forms and of neighbours.
        append_eos: Train an end-of-sequence token after each target.
        batch_loss_threshold: A mini-batch whose loss is below this makes no update.
        epoch_loss_threshold: Training stops after an epoch whose mean loss is below this;
            depth-first nothing looks at it.
        on_conflict: Edits with one prompt and different targets: `train` all of them as
            published, stop with an `error`, or keep the `last`.
        eval_batch_size: Prompts evaluated together; in half precision as many as a fixed shape has.
        row_tokens: Packed rows hold about this many tokens (more if one edit is longer).
        micro_batch_size: Edits in one forward pass; gradients accumulate up to `batch_size`.
            `None` is the whole mini-batch.
        frozen_prefix: Compute the frozen layers below the first trained one only once.
        prefix_cut: Where the frozen prefix ends: at the first trained `matrix`, before its `mlp`,
            or before its `layer`; `None` takes the first that the model and the budgets allow.
        prefix_gpu_gib: What recorded hidden states may take of the GPU's memory, in GiB; `None` is
            a quarter of what is free.
        prefix_host_gib: The same of the host's memory; `None` is half of what is free.
        prefix_disk_gib: The same of the disk; `None` is nine tenths of what is free.
        prefix_dir: Folder for hidden states on disk. They stay there, and a later run on the same
            model and edits uses them again; `None` is a temporary file, if one is needed.
        stream_frozen: Leave the frozen layers on disk and read them once, one after another, when
            the prefix is computed; `None` does so where the model does not fit the device, or with
            `model_parallel` all GPUs together.
        shard_frozen: Leave each of several processes a share of the frozen layers above the place
            (FSDP2), and gather a layer when it runs; `None` does so where these do not fit a
            device.
        quantize_frozen: Load what is not trained in `8bit` or `4bit` (bitsandbytes).
        compile_layers: Compile the layers above the place for training (`torch.compile`), which
            takes half a minute or more, once. For GPUs: a CPU gains next to nothing. Not in a
            ledger.
        packing: Put several edits into one row instead of padding each; beginnings that they have
            in common run once, where that makes rows notably fewer.
        tuning: `full` trains the matrices themselves, as published; `lora` a low-rank change of
            each (LoRA, arXiv 2106.09685), which is added to it when training ends.
        lora_rank: Rank of that change.
        lora_alpha: LoRA's alpha: the change is scaled by alpha / rank; `None` is the rank.
        checkpoint_dir: Folder in which an interrupted training leaves what the same edit goes on
            from, bit for bit; `None` keeps nothing (`locft edit` uses its output folder).
        checkpoint_minutes: Minutes between two checkpoints; 0 makes one after every step, and
            `None` none at all.
        forms: How an edit's prompt is put to the model in training, beside the prompt itself
            (`plain`): in the model's `chat` template, as a question with an answer to come
            (`question_answer`), after a sentence that has nothing to do with it (`context`).
            `None` is plain alone, with LocFT-BF+ all of them (`chat` where there is a template).
        forms_per_epoch: How many other texts of an edit are trained beside its plain prompt in an
            epoch: other forms of it and its rewordings, which take turns. 0.5 is one in every
            second epoch.
        augment_model: Who writes rewordings of each edit's prompt, which are trained as those that
            a request brings: `edited`, the model being edited, as it is before the edit; the folder
            of another model; or `endpoint:NAME`, a model behind the OpenAI-compatible address in
            the environment variable `OPENAI_BASE_URL` (with `OPENAI_API_KEY`, if that is set).
            `None` has none written.
        augment_cache: File of JSON lines in which they are kept, to be read and corrected; what is
            there is not asked for again. `None` is `locft_easyedit/rewordings.jsonl` in the user's
            cache folder.
        preserve: What the edit is to leave as it is: `sampled` (text sampled from the model
            itself), `neighbours` (the edits' prompts with other subjects), and paths of `.txt`
            files (text) and of `.json` or `.jsonl` files (prompts, which are kept exactly). `None`
            is nothing, with LocFT-BF+ `[sampled, neighbours]` unless `tuning` is `lora`.
        preserve_strength: How strongly; more keeps more and learns less.
        preserve_dir: Folder for what is measured for it once per model and place; `None` is
            `locft_easyedit` in the user's cache folder.
        health_check: Compare the perplexity of a fixed text, and the norms of the trained matrices,
            before and after, and warn where the model looks damaged.
        ledger_dir: In EasyEdit's editor, the folder of a ledger (see `locft ledger`) to which calls
            with `sequential_edit=True` add their edits: made if need be, and gone on with by later
            programs. `None` keeps none; nothing else looks at it.
        trust_remote_code: Allow a model folder to bring Python code of its own.
        evaluation_type: EasyEdit's: `None` (teacher-forced), `LLM-judge` or `generate-text`.
        api_key: EasyEdit's, for `LLM-judge`.
    """

    alg_name: str = ALG_NAME
    model_name: Any = None
    device: Optional[Union[int, str]] = None  # noqa: UP007, UP045
    layers: Any
    rewrite_module_tmp: Any
    lr: Any
    num_steps: int = 25
    pipeline: str = BREADTH_FIRST
    batch_size: int = 100
    min_batches: Optional[int] = None  # noqa: UP045
    repairs: Optional[int] = None  # noqa: UP045
    loss_average: str = EDIT
    lr_schedule: str = CONSTANT
    weight_decay: float = 0.0
    max_length: int = 40
    model_parallel: bool = False
    fp16: bool = False
    dtype: Optional[str] = None  # noqa: UP045
    seed: int = 42
    append_eos: bool = True
    batch_loss_threshold: float = 1e-2
    epoch_loss_threshold: float = 1e-2
    on_conflict: str = "train"
    eval_batch_size: int = 64
    row_tokens: int = 64
    micro_batch_size: Optional[int] = None  # noqa: UP045
    frozen_prefix: bool = True
    prefix_cut: Optional[str] = None  # noqa: UP045
    prefix_gpu_gib: Optional[float] = None  # noqa: UP045
    prefix_host_gib: Optional[float] = None  # noqa: UP045
    prefix_disk_gib: Optional[float] = None  # noqa: UP045
    prefix_dir: Optional[str] = None  # noqa: UP045
    stream_frozen: Optional[bool] = None  # noqa: UP045
    shard_frozen: Optional[bool] = None  # noqa: UP045
    quantize_frozen: Optional[str] = None  # noqa: UP045
    compile_layers: bool = False
    packing: bool = True
    tuning: str = "full"
    lora_rank: int = 8
    lora_alpha: Optional[float] = None  # noqa: UP045
    checkpoint_dir: Optional[str] = None  # noqa: UP045
    checkpoint_minutes: Optional[float] = 5.0  # noqa: UP045
    forms: Optional[List[str]] = None  # noqa: UP006, UP045
    forms_per_epoch: float = 1.0
    augment_model: Optional[str] = None  # noqa: UP045
    augment_cache: Optional[str] = None  # noqa: UP045
    preserve: Optional[List[str]] = None  # noqa: UP006, UP045
    preserve_strength: float = 1.0
    preserve_dir: Optional[str] = None  # noqa: UP045
    health_check: bool = True
    ledger_dir: Optional[str] = None  # noqa: UP045
    trust_remote_code: bool = False
    evaluation_type: Optional[str] = None  # noqa: UP045
    api_key: Optional[str] = None  # noqa: UP045

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Checks all values, also after a caller changed some.

        Raises:
            HyperParamsError: Lists every value that breaks a rule.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(LocFTBFHyperParams)}
        typed, problems = typed_values(values)
        problems += broken_rules(typed)
        if problems:
            raise HyperParamsError(one_message("Hyper-parameters of LocFT-BF:", problems))
        for name, value in typed.items():
            setattr(self, name, value)

    def dtype_on(self, device: torch.device | str) -> torch.dtype:
        """Returns the precision of weights and computation on a device.

        Args:
            device: Where the model is. A GPU computes several times faster in bfloat16, and the
                trained matrices have float32 masters there; a CPU takes float32.
        """
        if self.dtype or self.fp16:
            return torch_dtype(self.dtype or "float16")
        on_gpu = str(device).partition(":")[0] == "cuda"
        return torch_dtype("bfloat16" if on_gpu else "float32")

    @property
    def chooses(self) -> bool:
        """Whether the place is still to be chosen: `layers` is `auto`."""
        return bool(self.layers == AUTO)

    def of_edits(self, n: int) -> LocFTBFHyperParams:
        """Returns these values with the `batch_size` that n edits together are trained with."""
        least = self.min_batches
        if least is None and self._plus and self.pipeline == BREADTH_FIRST:
            least = _PLUS_MIN_BATCHES
        if least is None:
            return self
        return dataclasses.replace(self, batch_size=max(1, min(self.batch_size, n // least)))

    @property
    def rounds_of_repair(self) -> int:
        """Rounds in which edits that do not hold are trained again, at most."""
        if self.repairs is None and not (self._plus and self.pipeline == BREADTH_FIRST):
            return 0
        return self.most_repairs

    @property
    def most_repairs(self) -> int:
        """The same where edits are checked in any case, as in a ledger."""
        return _REPAIRS if self.repairs is None else self.repairs

    @property
    def checkpoint_folder(self) -> str | None:
        """Where checkpoints are made; `None` if none are."""
        return None if self.checkpoint_minutes is None else self.checkpoint_dir

    @property
    def wrapped_forms(self) -> list[str]:
        """The forms that are trained beside the plain one: `forms`, or what `alg_name` means."""
        if self.forms is None:
            return list(_PLUS_FORMS) if self._plus else []
        return [form for form in self.forms if form != PLAIN]

    @property
    def preserved(self) -> list[str]:
        """What is preserved: `preserve`, or what `alg_name` stands for."""
        if self.preserve is not None:
            return list(self.preserve)
        return list(_PLUS_PRESERVE) if self._plus and not self.cannot_preserve else []

    @property
    def cannot_preserve(self) -> bool:
        """Whether the preset preserves nothing, since a low-rank change cannot be confined."""
        return self._plus and self.preserve is None and self.tuning == "lora"

    @property
    def _plus(self) -> bool:
        return self.alg_name == PLUS_NAME

    @property
    def templates(self) -> list[str]:
        """`rewrite_module_tmp` as a list."""
        tmp = self.rewrite_module_tmp
        return [tmp] if isinstance(tmp, str) else list(tmp)

    def to_dict(self) -> dict[str, Any]:
        """Returns the values as plain Python objects; a loaded model is given by its class."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if values["model_name"] is not None and not isinstance(values["model_name"], str):
            values["model_name"] = type(values["model_name"][0]).__name__
        values["api_key"] = None  # a secret: these values are written to files
        return values

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str | Path) -> LocFTBFHyperParams:
        """Reads a YAML (or JSON) file, as EasyEdit's classes do.

        Args:
            hparams_name_or_path: The file; `.yaml` may be left out.

        Raises:
            HyperParamsError: The file is missing or does not parse, or keys are unknown, missing,
                ill-typed or out of range (one error that lists them all).
        """
        path, config = read_mapping(hparams_name_or_path)
        return cls.from_mapping(config, source=str(path))

    @classmethod
    def from_json(cls, fpath: str | Path) -> LocFTBFHyperParams:
        """Reads a JSON file; EasyEdit's other name for `from_hparams`."""
        return cls.from_hparams(fpath)

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any], *, source: str) -> LocFTBFHyperParams:
        """Returns the hyper-parameters that `config` holds; `source` names it in errors.

        Raises:
            HyperParamsError: As for `from_hparams`.
        """
        if not isinstance(config, Mapping):
            raise HyperParamsError(
                f"{source} holds {type(config).__name__}, not keys with values. Give a mapping."
            )
        present = given_values(config)
        alg_name = known_alg_name(present.get("alg_name"))
        if alg_name is not None and alg_name not in ALG_NAMES:
            raise HyperParamsError(
                f"`alg_name={shown(alg_name)}` in {source} is another method; these are the "
                f"hyper-parameters of {ALG_NAME}. Use a file with `alg_name: {ALG_NAME}` or "
                f"`alg_name: {PLUS_NAME}`."
            )
        missing = [f"`{key}` is missing. Add it." for key in REQUIRED_IN_FILE if key not in present]
        typed, ill_typed = typed_values(present)
        problems = [*missing, *ill_typed, *broken_rules(typed)]
        if problems:
            raise HyperParamsError(one_message(f"{source}:", problems))
        return cls(**typed)


def read_mapping(name_or_path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Returns the file that EasyEdit's naming rule leads to, and what it holds.

    Raises:
        HyperParamsError: The file is missing, does not parse, or is not a mapping.
    """
    if not isinstance(name_or_path, (str, Path)) or not Path(name_or_path).name:
        raise HyperParamsError(
            f"`{shown(name_or_path)}` is not a file. Give the path of an hparams YAML."
        )
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        path = path.with_name(path.name + ".yaml")
    if not is_file(path):
        raise HyperParamsError(f"`{path}` is not a file. Give the path of an hparams YAML.")
    text = text_of(path, HyperParamsError, most=_MOST_BYTES)
    try:
        config = json_of(text, unique_keys=True) if path.suffix == ".json" else yaml_of(text)
    except ValueError as error:
        raise HyperParamsError(f"`{path}` does not parse: {error}. Correct the file.") from error
    if not isinstance(config, dict):
        raise HyperParamsError(
            f"`{path}` holds {type(config).__name__}, not keys with values. "
            f"See hparams/{ALG_NAME}/ for examples."
        )
    return path, translated(config, str(path))


def given_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values without those that leave a key at its default.

    Such are null, for a key that cannot be null, and OmegaConf's mark of a missing value.
    """
    fields = dataclasses.fields(LocFTBFHyperParams)
    optional = {f.name for f in fields if str(f.type).startswith("Optional")}
    return {k: v for k, v in values.items() if (v is not None or k in optional) and v != "???"}


def typed_values(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the values in their fields' types, and a line for each that is unknown or ill-typed.

    YAML reads `1e-4` as a text.
    """
    known = [f.name for f in dataclasses.fields(LocFTBFHyperParams)]
    typed: dict[str, Any] = {}
    problems = []
    for key, value in values.items():
        if key == "alg_name":
            value = known_alg_name(value)
        if key not in known:
            problems.append(_unknown_key(shown(key) if not isinstance(key, str) else key, known))
        elif isinstance(value, (list, tuple)) and len(value) > _MOST_ENTRIES:
            problems.append(f"`{key}` has {len(value)} entries; at most {_MOST_ENTRIES} are read.")
        elif (unusable := _unusable(value)) is not None:
            problems.append(f"`{key}={shown(value)}` {unusable}.")
        elif key == "model_name":
            typed[key] = value  # may be a loaded (model, tokenizer); OmegaConf holds plain values
        elif key in OR_AUTO and value == AUTO:
            typed[key] = value
        else:
            try:
                merged = OmegaConf.merge(_schema_of(key), {key: value})[key]  # type: ignore[index]
                typed[key] = (
                    OmegaConf.to_container(merged) if OmegaConf.is_config(merged) else merged
                )
            except _NOT_OF_THE_TYPE as error:
                reason = (str(error) or type(error).__name__).split("\n")[0][:300]
                problems.append(f"`{key}={shown(value)}`: {reason}. Allowed: {_type_name(key)}.")
    return typed, problems


@functools.cache
def _schema_of(key: str) -> Any:
    """Returns a schema with this field alone: with all of them, each value takes milliseconds."""
    annotation = OR_AUTO.get(key) or get_type_hints(LocFTBFHyperParams)[key]
    one = dataclasses.make_dataclass("OneField", [(key, annotation, MISSING)])
    return OmegaConf.structured(one)


def _unusable(value: Any) -> str | None:
    """Returns what is wrong with the texts within a value, whatever its type."""
    # OmegaConf would put in what it names: an environment variable, say.
    if any("${" in text for text in texts_in(value)):
        return "holds `${`; nothing is put in here. Write the value out"
    return bad_text(value)


def _type_name(key: str) -> str:
    if key in OR_AUTO:
        values = {"layers": "a list of whole numbers, for example [22]", "lr": "a number"}
        return f"{values[key]}, or {AUTO}"
    annotation = next(f.type for f in dataclasses.fields(LocFTBFHyperParams) if f.name == key)
    names = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "a text",
        "Optional[List[str]]": "a list of texts, or null",
        "Optional[int]": "a whole number, or null",
        "Optional[float]": "a number, or null",
        "Optional[str]": "a text, or null",
        "Optional[bool]": "true, false, or null",
        "Optional[Union[int, str]]": "cpu, cuda, cuda:N or N",
    }
    return names.get(str(annotation), "a text or a list of texts")


def _unknown_key(key: str, known: list[str]) -> str:
    if key in OTHER_METHODS_KEYS:
        return f"`{key}` belongs to other methods of EasyEdit and does nothing here. Remove it."
    name = key if len(key) <= 100 else f"{key[:97]}..."
    hint = did_you_mean(name, known, f"Known keys: {', '.join(known)}.")
    return f"`{name}` is not a key of {ALG_NAME}. {hint}"


def torch_dtype(name: str) -> torch.dtype:
    """Returns the precision of a name in `DTYPES`."""
    import torch  # takes seconds, which `locft COMMAND --help` has no use for

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def shipped_yamls() -> dict[str, Path]:
    """Returns the YAMLs that come with this library by name: of LocFT-BF+ with `LocFT-BF+/`."""
    own = hparams_folder()
    names = {path.stem: path for path in sorted(own.glob("*.yaml"))}
    others = [path for path in sorted(own.parent.glob("*/*.yaml")) if path.parent != own]
    return names | {f"{path.parent.name}/{path.stem}": path for path in others}


def hparams_folder() -> Path:
    """Returns the folder of the YAMLs that come with this library."""
    here = Path(__file__).resolve().parent
    checkout = here.parent / "hparams" / ALG_NAME
    return checkout if checkout.is_dir() else here / "hparams_yaml" / ALG_NAME
