"""Cross-entropy of an output head that never holds all logits at once.

A vocabulary of 128,000 and some thousand scored tokens make more float32 logits than the model has
activations. A frozen head needs no gradient, so a chunk of logits can be turned into the gradient
of its hidden states at once and be forgotten: what is kept is as large as the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

# Logits at a time. On a CPU a chunk should stay in the cache; a GPU wants large products.
_LOGITS_CPU = 2**22
_LOGITS_GPU = 2**26


@dataclass(frozen=True)
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

    def token_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the cross-entropy of each token, [S] float32.

        Args:
            hidden: Hidden states that predict the tokens, [S, D].
            labels: The tokens, [S].
        """
        device = self.weight.device
        losses: torch.Tensor = _TokenLosses.apply(hidden.to(device), labels.to(device), self)
        return losses

    def _logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns float32 logits, [S, V], and what their gradient is multiplied by (softcap)."""
        logits = F.linear(hidden, self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is None:
            return logits, None
        bent = logits.div_(self.softcap).tanh_()
        return bent * self.softcap, 1 - bent**2


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: Head) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if needs_gradient else None
        logits_at_once = _LOGITS_GPU if hidden.device.type == "cuda" else _LOGITS_CPU
        n_rows = max(1, logits_at_once // len(head.weight))
        for start in range(0, len(hidden), n_rows):
            part = slice(start, start + n_rows)
            logits, bend = head._logits(hidden[part])
            log_p = torch.log_softmax(logits, dim=-1)
            index = labels[part].unsqueeze(1)
            losses[part] = -log_p.gather(1, index).squeeze(1)
            if gradient is not None:
                slope = log_p.exp_()  # softmax minus one-hot: the gradient of a token's own loss
                slope.scatter_add_(1, index, slope.new_full(index.shape, -1.0))
                if bend is not None:
                    slope *= bend
                if head.scale != 1.0:
                    slope *= head.scale
                gradient[part] = slope.to(hidden.dtype) @ head.weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # Each token's loss depends on its own hidden state alone.
        return (gradient.float() * outer[0].unsqueeze(1)).to(gradient.dtype), None, None
