"""One forward pass, with logits only where they are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel

from ..data.packing import Rows

_given_masks: WeakSet[PreTrainedModel] = WeakSet()


def run_layout(model: PreTrainedModel, rows: Rows, **inputs: torch.Tensor) -> Any:
    """Returns the model's output for some rows.

    Args:
        model: A causal language model.
        rows: The layout, on the model's device.
        **inputs: `input_ids`, [R, L], or `inputs_embeds`, [R, L, D].
    """
    first = first_position(model)
    return model(
        **inputs,
        position_ids=rows.position_ids + first if first else rows.position_ids,
        attention_mask=rows.attention_mask,
        use_cache=False,
    )


def give_masks(model: PreTrainedModel, given: bool = True) -> None:
    """Lets `with_masks` make a model's masks of packed rows, or leaves them to the model again."""
    (_given_masks.add if given else _given_masks.discard)(model)


def with_masks(model: PreTrainedModel, rows: Rows) -> Rows:
    """Returns packed rows with the masks that the model is given for them.

    Made where rows are laid out, ahead of their step: a model that makes them itself looks for the
    texts in its rows in every pass, and waits for the GPU to say whether there are several. Some
    make them without `position_ids`, and so take a row for one text.

    Args:
        model: A causal language model.
        rows: The layout, on the host.
    """
    mask = rows.attention_mask
    if mask is None and model in _given_masks:
        mask = packed_masks(model, rows.position_ids)
    elif isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:  # eager attention adds it
        nothing = torch.zeros((), dtype=model.dtype)
        mask = nothing.masked_fill(~mask, torch.finfo(model.dtype).min)
    return replace(rows, attention_mask=mask)


def packed_masks(
    model: PreTrainedModel, position_ids: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor] | None:
    """Returns the masks of packed rows as transformers makes them; `None` if it does not here.

    Args:
        model: A causal language model.
        position_ids: [R, L]: a text begins where they do not go on.

    Returns:
        A mask, [R, 1, L, L], or one for each type of layer that the configuration names.
    """
    try:
        from transformers.masking_utils import create_masks_for_generate as masks_of
    except ImportError:
        return None
    known = inspect.signature(masks_of).parameters
    masks = masks_of(
        config=model.config,
        # Of these the shape and the type count alone.
        inputs_embeds=torch.empty((*position_ids.shape, 0), dtype=model.dtype,
                                  device=position_ids.device),
        attention_mask=None,
        position_ids=position_ids,
        **{name: None for name in ("cache", "past_key_values", "cache_position") if name in known},
    )  # fmt: skip
    all_ = masks.values() if isinstance(masks, dict) else [masks]
    return masks if all(isinstance(mask, torch.Tensor) for mask in all_) else None


def first_position(model: PreTrainedModel) -> int:
    """Returns the position that a model gives the first token of a text.

    RoBERTa and its kind count from behind the padding token's.
    """
    embeddings: Any = getattr(getattr(model, "base_model", None), "embeddings", None)
    counts_from_padding = hasattr(embeddings, "create_position_ids_from_input_ids")
    return embeddings.padding_idx + 1 if counts_from_padding else 0


def run_rows(
    model: PreTrainedModel, rows: Rows, *, narrowed: bool = False, **inputs: torch.Tensor
) -> torch.Tensor:
    """Returns the logits at the scored cells, [S, V].

    Args:
        model: A causal language model.
        rows: The layout, on the model's device.
        narrowed: The model's last layer gives the scored cells alone already.
        **inputs: As for `run_layout`.
    """
    with head_sees(model, _narrow(rows, narrowed)) as seen:  # [1, S, D]
        output = run_layout(model, rows, **inputs)
    logits: torch.Tensor = output.logits  # [1, S, V], or [R, L, V] without a head to hook
    logits = logits[0] if seen or narrowed else _scored(logits, rows)
    return logits[: len(rows.owner)]


def run_to_head(
    model: PreTrainedModel, rows: Rows, *, narrowed: bool = False, **inputs: torch.Tensor
) -> torch.Tensor:
    """Returns what the output embedding would be given for the scored cells, [S, D].

    The model needs an output embedding; arguments are as for `run_rows`.
    """
    hidden: list[torch.Tensor] = []

    def leave(given: torch.Tensor) -> torch.Tensor:
        hidden.append(_narrow(rows, narrowed)(given))
        raise Stop

    with head_sees(model, leave), suppress(Stop):
        run_layout(model, rows, **inputs)
    return hidden[0][0]


def _narrow(rows: Rows, narrowed: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda hidden: hidden if narrowed else _scored(hidden, rows).unsqueeze(0)


def run_next(model: PreTrainedModel, cache: Any, **inputs: Any) -> tuple[torch.Tensor, Any]:
    """Returns the logits after the last column, [B, V], and the cache, as `run_cached` does."""
    with head_sees(model, lambda hidden: hidden[:, -1:]):
        output, cache = run_cached(model, cache, **inputs)
    return output.logits[:, -1], cache


def run_cached(model: PreTrainedModel, cache: Any, **inputs: Any) -> tuple[Any, Any]:
    """Returns the model's output, and its cache: with `None`, the next call needs all tokens again.

    Args:
        model: A causal language model.
        cache: What the last call gave; `None` for the first.
        **inputs: The model's `input_ids`, [B, L]: those that the cache does not hold. Where they
            are padded on the left, `attention_mask` and `position_ids` as well.
    """
    name = _cache_argument(model)
    if name is None:
        return model(**inputs, use_cache=False), None
    output = model(**inputs, **{name: cache}, use_cache=True)
    cache = getattr(output, name, None)
    return output, cache if _counts_tokens(cache) else None


def _cache_argument(model: PreTrainedModel) -> str | None:
    """Returns what the model calls its cache; `None` if it takes none under a name known here.

    transformers renamed it in 5.24, models with code of their own keep the former name, and a
    model may swallow a name that it does not know.
    """
    own = getattr(model, "get_base_model", lambda: model)()  # what peft wraps
    known = inspect.signature(own.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in known), None)


def _counts_tokens(cache: Any) -> bool:
    """Returns whether it is a cache of attention, which knows how many tokens it holds.

    Models like Mamba keep states alone. They take masks of the new tokens, not of all.
    """
    try:
        cache.get_seq_length()
    except (AttributeError, ValueError):
        return False
    return True


@contextmanager
def head_sees(
    model: PreTrainedModel, select: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[list[bool]]:
    """Context manager that gives the output embedding `select(hidden states)`.

    Yields a list, which is filled once the embedding was called so. It is called as it was to be
    where it gets more than one stream of hidden states.

    The output embedding is the largest matrix of many models, and most positions' logits are not
    asked for. What it gets is contiguous: by a slice of [B, L, D], and a weight without gradients,
    PyTorch multiplies on a CPU as if each of the B rows had a matrix of its own, and copies it.

    Args:
        model: A causal language model.
        select: Makes what the output embedding gets of what it was to get, [B, L, D].
    """
    seen: list[bool] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if args[0].dim() > 3:
            return args
        seen.append(True)
        return (select(args[0]).contiguous(), *args[1:])

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    with nullcontext() if head is None else head.register_forward_pre_hook(hook):
        yield seen


def _scored(values: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Returns the scored cells of [R, L, any], [S, any]."""
    return values.flatten(0, 1)[rows.scored.to(values.device)]


def mean_by_owner(values: torch.Tensor, owner: torch.Tensor, n_owners: int) -> torch.Tensor:
    """Returns the mean of the values of each owner, [n_owners].

    On a GPU the same at every run: values are added up in their order. (`index_add` adds them as
    they come.)

    Args:
        values: [S].
        owner: Of each value, ascending, [S].
        n_owners: Owners are below it; each has a value at least.
    """
    counts = torch.zeros(n_owners, dtype=torch.int64, device=owner.device)
    counts.index_add_(0, owner, torch.ones_like(owner))
    # Unsafe is that nothing looks at the counts first, for which the host would have to wait.
    return torch.segment_reduce(values, "mean", lengths=counts, unsafe=True)


class Stop(Exception):
    """Ends a forward pass; never leaves the code that asked for it."""
