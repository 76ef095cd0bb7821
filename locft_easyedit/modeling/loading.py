"""Loading a causal language model and its tokenizer, whatever its architecture or name."""

from __future__ import annotations

import atexit
import importlib.util
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from ..data.forms import ChatTemplate
from ..distributed.world import get_world, share_of_gpus
from ..errors import HyperParamsError, LocFTError, MissingDependencyError, ModelError
from ..hparams import LocFTBFHyperParams, torch_dtype
from ..hparams_rules import CHAT, DTYPES
from ..utils.memory import free_host_memory, is_out_of_memory
from .device_map import DeviceMap, devices_of, resident_map, room_on, streaming_map
from .model_name import check_model_name
from .places import check_low_rank, match_parameters
from .sharded_loading import Sharding, places, shard_

logger = logging.getLogger(__name__)


def resolve_device(device: int | str | None) -> torch.device:
    """Returns the device that EasyEdit's `device` key means; `None` takes a GPU if there is one.

    Of several processes on a machine each has a GPU of its own, whatever number is given.

    Raises:
        HyperParamsError: It is no device, or there is no such GPU.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    text = ("cuda" if n_gpus else "cpu") if device is None or device == "" else str(device)
    try:
        resolved = torch.device(f"cuda:{text}" if text.isdigit() else text)
    except RuntimeError as error:
        raise HyperParamsError(
            f"`device={device!r}` is no device. Use cpu, cuda, or the number of a GPU."
        ) from error
    if resolved.type == "cuda":
        world = get_world()
        if world.local_size > 1 and n_gpus:
            own, *_ = share_of_gpus(n_gpus, world.local_rank, world.local_size)
            return torch.device("cuda", own)
        if (resolved.index or 0) >= n_gpus:
            found = f"{n_gpus} GPUs were found" if n_gpus else "no usable GPU was found"
            raise HyperParamsError(
                f"`device={device!r}` needs a CUDA GPU of that number; {found}. "
                "Use `device: cpu`, or another number."
            )
    return resolved


def load_model(
    hparams: LocFTBFHyperParams, *, gpus: Sequence[int] | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Returns the model and tokenizer of `hparams.model_name`, on their device or devices.

    The place is looked up before the weights are loaded.

    Args:
        hparams: The hyper-parameters.
        gpus: The GPUs that `model_parallel` may use; `None` for all that are visible. Of several
            processes on a machine each has its own (see `share_of_gpus`).

    Raises:
        HyperParamsError: `model_name` or `device` cannot be used.
        PlaceError: The model has no such place.
        ModelError: The folder does not exist or holds no causal language model, or it does not
            fit.
    """
    name = hparams.model_name
    device = resolve_device(hparams.device)
    if isinstance(name, (tuple, list)) and len(name) == 2:
        if hparams.shard_frozen:
            raise ModelError(
                "`shard_frozen=true` shares out a model while it is loaded, and this one is whole "
                "on every process already. Give the model's folder as `model_name`, or leave it "
                "out."
            )
        loaded, tokenizer = name
        # A model that is placed already stays where it is, unless a device is asked for.
        if hparams.device is not None:
            loaded = loaded if hparams.model_parallel else _placed(loaded, device)
        return loaded, tokenizer
    if not isinstance(name, str) or not name.strip():
        raise HyperParamsError(
            f"`model_name={name!r}` must be a model's folder or hub name, or a pair "
            "(model, tokenizer) that is loaded."
        )
    name = check_model_name(name)
    if CHAT in (hparams.forms or ()):  # told before the weights are loaded
        ChatTemplate(load_tokenizer(name, hparams.trust_remote_code))
    device, chosen = devices_of(hparams.model_parallel, hparams.device, device, gpus)
    world = get_world()
    if hparams.model_parallel and len(set(world.all_gather(len(chosen)))) > 1:
        raise HyperParamsError(
            "`model_parallel=true` with several processes needs as many GPUs for each of them. "
            "Start a number of processes that divides the GPUs of every machine."
        )
    with _one_model_error(name):
        skeleton = _check_place(name, hparams)
    quantization = _quantization(skeleton, hparams, device)
    device_map: DeviceMap | None
    sharding: Sharding | None = None
    if chosen:
        device_map = streaming_map(skeleton, hparams, device, chosen)
        if device_map is None and skeleton is not None and quantization is None:
            device_map = resident_map(skeleton, hparams.dtype_on(device), chosen)
    else:
        device_map, sharding = places(skeleton, hparams, device, world)
    model, tokenizer = load_causal_lm(
        name,
        device=None if chosen else str(device),
        dtype=hparams.dtype_on(device),
        model_parallel=bool(chosen),
        gpus=chosen or None,
        trust_remote_code=hparams.trust_remote_code,
        device_map=device_map,
        quantization=quantization,
        attention=_attention(skeleton, device, hparams.dtype_on(device)),
    )
    if sharding is not None:
        shard_(model, sharding, device, world)
    return model, tokenizer


def load_causal_lm(
    name: str,
    *,
    device: int | str | None = None,
    dtype: str | torch.dtype = "float32",
    model_parallel: bool = False,
    gpus: Sequence[int] | None = None,
    trust_remote_code: bool = False,
    device_map: DeviceMap | None = None,
    quantization: Any | None = None,
    attention: str | None = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Returns a causal language model, in evaluation mode on its device, and its tokenizer.

    The tokenizer pads on the left with its own pad token, or with EOS where it has none: as
    EasyEdit sets it. Training and evaluation here do not depend on it.

    Args:
        name: A folder saved with `save_pretrained` (a PEFT adapter's as well), or a hub name.
        device: As EasyEdit's `device` key; `None` takes a GPU if there is one.
        dtype: `float32`, `bfloat16` or `float16`.
        model_parallel: Spread the model over several GPUs, if there are; what they have no room for
            goes to the host, unless `device_map` says another thing.
        gpus: As for `load_model`.
        trust_remote_code: Allow the folder's own code.
        device_map: Where each module goes, `disk` included.
        quantization: A quantization configuration of transformers.
        attention: transformers' `attn_implementation`; `None` is its own choice.

    Raises:
        HyperParamsError: `device` or `dtype` cannot be used.
        ModelError: The folder does not exist or holds no causal language model.
    """
    where = resolve_device(device)
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise HyperParamsError(f"`dtype={dtype!r}` must be one of {', '.join(DTYPES)}.")
    where, chosen = devices_of(model_parallel, device, where, gpus)
    name = check_model_name(name)
    with _one_model_error(name):
        tokenizer = load_tokenizer(name, trust_remote_code)
        model: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=torch_dtype(dtype) if isinstance(dtype, str) else dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attention,
            **_placement(device_map, chosen),
            **({"quantization_config": quantization} if quantization is not None else {}),
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return _placed(model, where).eval(), tokenizer


def _placement(device_map: DeviceMap | None, gpus: Sequence[int]) -> dict[str, Any]:
    """Returns what tells transformers where a model goes."""
    if device_map is not None:
        # For weights that are saved in another form than the model has them in.
        folder = tempfile.mkdtemp(prefix="locft-weights-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return {"device_map": device_map, "offload_folder": folder}
    if not gpus:
        return {}
    return {"device_map": "auto", "max_memory": {**room_on(gpus), "cpu": free_host_memory()}}


def _attention(skeleton: Any | None, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the attention to load a model with; `None` is transformers' own choice."""
    supported = getattr(type(skeleton), "_supports_flash_attn", False)
    if device.type != "cuda" or dtype == torch.float32 or not supported:
        return None
    # Packed rows of short texts without a mask.
    return "flash_attention_2" if is_flash_attn_2_available() else None


def model_without_weights(name: str, *, trust_remote_code: bool = False) -> Any:
    """Returns a causal language model on the meta device: its modules' names, types and shapes.

    Raises:
        ModelError: The folder does not exist or holds no causal language model.
    """
    name = check_model_name(name)
    with _one_model_error(name), torch.device("meta"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


@contextmanager
def _one_model_error(name: str) -> Iterator[None]:
    """Turns what goes wrong within into one error that names the model."""
    try:
        yield
    except LocFTError:
        raise
    except Exception as error:  # code of any kind reads what a folder holds
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            reason += " Look at it, and if you trust it, set trust_remote_code=true."
        raise ModelError(
            f"`model_name={name!r}` cannot be loaded as a causal language model: {reason}"
        ) from error


def _quantization(
    skeleton: Any | None, hparams: LocFTBFHyperParams, device: torch.device
) -> Any | None:
    """Returns how to load what is not trained in few bits; the trained matrices stay whole.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
        HyperParamsError: The device cannot do it.
    """
    if hparams.quantize_frozen is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            f"`quantize_frozen={hparams.quantize_frozen!r}` needs the package bitsandbytes. "
            "Install it: pip install bitsandbytes."
        )
    if hparams.quantize_frozen == "4bit" and device.type == "cpu":
        # Measured: its forward pass runs, its backward pass gives gradients of something else.
        raise HyperParamsError(
            "`quantize_frozen='4bit'` cannot be trained through on a CPU: bitsandbytes has no "
            "derivative of it there. Use 8bit, or a GPU."
        )
    if skeleton is None:
        raise ModelError("`quantize_frozen` needs a model that transformers can build by itself.")
    trained = match_parameters(skeleton, hparams.layers, hparams.templates)
    head = skeleton.get_output_embeddings()
    whole = {name.rpartition(".")[0] for name in trained}
    whole |= {name for name, module in skeleton.named_modules() if module is head}
    in_4_bit = hparams.quantize_frozen == "4bit"
    return BitsAndBytesConfig(
        load_in_4bit=in_4_bit,
        load_in_8bit=not in_4_bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=hparams.dtype_on(device),
        llm_int8_skip_modules=sorted(whole),
    )


def _placed(model: Any, device: torch.device) -> Any:
    """Returns the model on `device`, unless accelerate or a quantizer has placed it."""
    placed = getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)
    return model if placed else model.to(device)


def _check_place(name: str, hparams: LocFTBFHyperParams) -> Any | None:
    """Looks the place up in a model without weights: a wrong layer shows before the download.

    Returns that model, or `None` if it cannot be built.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=hparams.trust_remote_code)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=hparams.trust_remote_code
            )
    except Exception as error:  # code of any kind builds models; the loaded one is checked as well
        logger.debug("%s cannot be built without weights: %s", name, error)
        return None
    if hparams.chooses:
        return model
    place = match_parameters(model, hparams.layers, hparams.templates)
    if hparams.tuning == "lora":
        check_low_rank(model, place, hparams.lora_rank)
    return model


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a model's folder or hub name, as it is saved.

    Raises:
        ModelError: The folder does not exist, or holds none that can be loaded.
    """
    name = check_model_name(name)
    with _one_model_error(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            tokenizer_of(name), trust_remote_code=trust_remote_code
        )
    return tokenizer


def tokenizer_of(name: str) -> str:
    """Returns where a model's tokenizer is: peft saves adapters without one."""
    adapter = Path(name) / "adapter_config.json"
    if not adapter.is_file() or (Path(name) / "tokenizer_config.json").is_file():
        return name
    return str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
