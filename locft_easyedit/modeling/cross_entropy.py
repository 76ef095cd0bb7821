"""Cross-entropy of an output head that never holds all logits at once.

A vocabulary of 128,000 and some thousand scored tokens make more float32 logits than the model has
activations. A frozen head needs no gradient, so a chunk of logits can be turned into the gradient
of its hidden states at once and be forgotten: what is kept is as large as the hidden states.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

# 256 MiB in float32: of 128,000 tokens those of 100 edits. Each chunk reads the whole head.
LOGITS_AT_ONCE = 2**26
# What a softmax is divided by may be as large as the vocabulary, and float16 ends at 65,504. Below
# this it leaves room for the head's own numbers.
_LARGEST_FLOAT16 = 256.0
_VOCABULARY_CPU = 4096  # a CPU multiplies fastest with so much of the head that a cache holds it


@dataclass(eq=False)
class Head:
    """A frozen output head.

    Attributes:
        weight: [V, D].
        bias: [V], or `None`.
        scale: Logits are multiplied by it.
        softcap: Then bounded smoothly by it, `softcap * tanh(logits / softcap)`; or `None`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    _room: dict[torch.dtype, torch.Tensor] = field(default_factory=dict, repr=False)

    def token_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the cross-entropy of each token, [S] float32.

        Args:
            hidden: Hidden states that predict the tokens, [S, D].
            labels: The tokens, [S].
        """
        device = self.weight.device
        losses: torch.Tensor = _TokenLosses.apply(hidden.to(device), labels.to(device), self)
        return losses

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the logits, [S, V] float32, all at once and with a graph.

        Args:
            hidden: Hidden states, [S, D].
        """
        logits = F.linear(hidden.to(self.weight.device), self.weight).float()
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def chunk_(
        self, hidden: torch.Tensor, labels: torch.Tensor, gradient: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the losses of some tokens; writes the gradient of each one's own loss.

        Args:
            hidden: [C, D].
            labels: [C].
            gradient: Written to, [C, D]; `None` if it is not needed.
        """
        index = labels.unsqueeze(1)
        products = self._products(hidden)
        logits = self._space(len(hidden), torch.float32)
        if logits is not products:
            logits.copy_(products)
        if self.bias is not None:
            logits += self.bias
        logits *= self.scale
        bend = None
        if self.softcap is not None:
            bent = logits.div_(self.softcap).tanh_()
            bend = 1 - bent**2
            logits *= self.softcap
        wanted = logits.gather(1, index)
        largest = logits.amax(1, keepdim=True)
        powers = logits.sub_(largest).exp_()
        total = powers.sum(1, keepdim=True)
        losses = (largest - wanted + total.log()).squeeze(1)
        if gradient is not None:
            # Softmax minus one-hot, times the sum that the softmax would be divided by.
            slope = powers.scatter_add_(1, index, -total)
            if bend is not None:
                slope *= bend
            if hidden.dtype == torch.float16:
                # By powers of two, which leave the digits as they are.
                shrink = (total / _LARGEST_FLOAT16).log2().ceil().clamp(min=0).neg().exp2()
                slope *= shrink
                total = total * shrink
            slope = self._space(len(hidden), hidden.dtype).copy_(slope)
            gradient.copy_((slope @ self.weight).float() * (self.scale / total))
        return losses

    def _products(self, hidden: torch.Tensor) -> torch.Tensor:
        products = self._space(len(hidden), hidden.dtype)
        step = _VOCABULARY_CPU if hidden.device.type == "cpu" else len(self.weight)
        for start in range(0, len(self.weight), step):
            part = slice(start, start + step)
            torch.mm(hidden, self.weight[part].t(), out=products[:, part])
        return products

    def _space(self, n_rows: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns room for logits, [n_rows, V]; the same at every call.

        A CPU spends as long on fresh memory of this size as on what it is for.
        """
        if dtype not in self._room or len(self._room[dtype]) < n_rows:
            self._room.pop(dtype, None)  # the old room goes before the new one comes
            shape = (n_rows, len(self.weight))
            self._room[dtype] = self.weight.new_empty(shape, dtype=dtype)
        return self._room[dtype][:n_rows]


def find_head(model: PreTrainedModel) -> Head | None:
    """Returns the output head with what the configuration says is done to its logits.

    `None` if there is no plain one. Whether its losses are right is for the caller to measure.
    """
    module: Any = model.get_output_embeddings()
    weight = getattr(module, "weight", None)
    if not torch.is_tensor(weight) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(weight, getattr(module, "bias", None), float(scale), softcap)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: Head) -> torch.Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        n_chunks = min(len(hidden), math.ceil(len(hidden) * len(head.weight) / LOGITS_AT_ONCE))
        edges = np.linspace(0, len(hidden), n_chunks + 1).astype(int).tolist()
        for part in itertools.starmap(slice, itertools.pairwise(edges)):
            slope = None if gradient is None else gradient[part]
            losses[part] = head.chunk_(hidden[part], labels[part], slope)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # Each token's loss depends on its own hidden state alone.
        return (gradient.float() * outer[0].unsqueeze(1)).to(gradient.dtype), None, None
