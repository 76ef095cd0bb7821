"""How much each direction of a matrix's output matters to what a model says of texts.

To second order, adding d to a matrix's output at a token moves the distributions that the model
predicts by a KL of d^T G d / 2 in all, with G = mean of g g^T over tokens (that output's Fisher
information): g is the gradient there of the log-likelihoods of tokens that the model itself draws,
at this place and all later ones. With the inputs' second moment C these are the two Kronecker
factors of K-FAC (arXiv 1503.05671); CrispEdit (arXiv 2602.15823) edits along both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...modeling.devices import input_device
from ...modeling.modes import evaluation_mode
from ...modeling.places import sides
from ...modeling.sampling import seeded
from ...utils.hashing import json_sha256, model_fingerprint
from ...utils.progress import progress_bar
from .input_moments import add_moment_, batches_of, check_finite, last_of, padded_right
from .moment_cache import Origin, read_moments, write_moments

# Of a pass, padding included: its logits are held, and what autograd keeps of the upper layers.
GRADIENT_BATCH_TOKENS = 512
# Of what is differentiated, in float16: gradients below 6e-8 are nothing there.
_LOSS_SCALE = 256.0


def gradient_moments(
    model: Any,
    modules: Sequence[str],
    sequences: Sequence[list[int]],
    *,
    ends_only: bool,
    cache: Path | None,
    seed: int = 0,
    description: str,
    progress: bool,
) -> dict[str, torch.Tensor]:
    """Returns the sums of g g^T of modules' outputs over texts, [out, out] float32 on the host.

    Computed once and kept, as second moments of inputs are.

    Args:
        model: A causal language model, as it is before an edit.
        modules: Full names of linear modules.
        sequences: Token ids of texts within the model's context, none of them empty.
        ends_only: What follows the last token of each text counts alone.
        cache: A folder where the result is kept; `None` keeps nothing.
        seed: Seed of the tokens that are drawn.
        description: What the progress bar says.
        progress: Show a progress bar.

    Raises:
        ModelError: A logit or a gradient is NaN or infinite.
        OutputError: The result cannot be kept.
    """
    widths = {module: sides(model.get_submodule(module))[0] for module in modules}
    text = json_sha256(["output gradients", ends_only, seed, sequences])
    origin = Origin(model_fingerprint(model), text, sum(map(len, sequences)))
    found = {} if cache is None else read_moments(cache, widths, origin)
    missing = [module for module in widths if module not in found]
    if missing:
        sums: dict[str, torch.Tensor] = {}
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
        bar = progress_bar(total=len(order), desc=description, unit="text", show=progress)
        with bar, evaluation_mode(model), seeded(model, seed):
            for numbers in batches_of(order, sequences, GRADIENT_BATCH_TOKENS):
                batch = [sequences[i] for i in numbers]
                for module, gradients in _gradients(model, missing, batch, ends_only).items():
                    add_moment_(sums, module, gradients)
                bar.update(len(batch))
        for module in missing:
            found[module] = sums.pop(module).to("cpu", torch.float32)
            check_finite(found[module], module, what="gradients of the outputs")
            if cache is not None:
                write_moments(cache, module, found[module], origin)
    return {module: found[module] for module in widths}


def _gradients(
    model: Any, modules: Sequence[str], batch: Sequence[list[int]], ends_only: bool
) -> dict[str, torch.Tensor]:
    """Returns g of each module's output at all tokens of a batch, [tokens, out] float32."""
    ids, real = padded_right(batch)
    counted = last_of(real) if ends_only else real
    device = input_device(model)
    with torch.inference_mode(False), torch.enable_grad(), _offset(model, modules) as offsets:
        logits = model(
            input_ids=ids.to(device), attention_mask=real.long().to(device), use_cache=False
        ).logits
        logits = logits[counted.to(logits.device)].float()  # [scored, V]
        # A model may leave words out by an infinite logit below, and draws none of them.
        check_finite(logits.detach().logsumexp(-1), type(model).__name__, what="logits")
        drawn = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
        loss = F.cross_entropy(logits, drawn, reduction="sum")
        scale = _LOSS_SCALE if model.dtype == torch.float16 else 1.0
        gradients = torch.autograd.grad(loss * scale, list(offsets.values()))
    return {
        name: gradient.reshape(-1, gradient.shape[-1])[real.reshape(-1).to(gradient.device)].float()
        for name, gradient in zip(offsets, gradients, strict=True)
    }


@contextmanager
def _offset(model: nn.Module, modules: Sequence[str]) -> Iterator[Mapping[str, torch.Tensor]]:
    """Context manager that adds a 0 to each module's output; yields these, once the model has run.

    Autograd then differentiates by them: what lies below the lowest one it need not keep.
    """
    offsets: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def add(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
            offsets[name] = torch.zeros_like(output, requires_grad=True)
            return output + offsets[name]

        return add

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in modules]
    try:
        yield offsets
    finally:
        for handle in handles:
            handle.remove()
