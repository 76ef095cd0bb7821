"""What enters a model's matrices ("keys") over texts: one pass for all matrices that are asked for.

A pass ends at the last of these matrices: nothing above it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...errors import DataError, ModelError, one_message
from ...modeling.devices import context_length, input_device
from ...modeling.modes import evaluation_mode
from ...modeling.module_inputs import module_inputs
from ...utils.progress import progress_bar

BATCH_TOKENS = 4096
# Up to this width sums are kept in float64, at 128 MiB a module.
WIDEST_FLOAT64 = 4096

# Gets a module's name, keys of a batch's tokens, [tokens, D] float32, their documents, [tokens],
# and which of them are among a document's last ones, [tokens].
Taker = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], None]


def input_width(module: nn.Module) -> int:
    """Returns the size D of a linear module's inputs; 0 if it is not linear."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return 0
    # gpt2's Conv1D stores its matrix as [in, out].
    return int(weight.shape[0 if type(module).__name__ == "Conv1D" else 1])


def check_modules(
    model: nn.Module,
    modules: Sequence[str],
    title: str = "What enters the trained matrices cannot be measured:",
) -> None:
    """Checks that all `modules` can be measured.

    Raises:
        ModelError: Some do not exist or are not linear; all of them under `title`.
    """
    found = dict(model.named_modules())
    wrong = [f"there is no module `{module}`." for module in modules if module not in found]
    wrong += [
        f"`{module}` ({type(found[module]).__name__}) is not linear."
        for module in modules
        if module in found and input_width(found[module]) == 0
    ]
    if wrong:
        raise ModelError(one_message(title, wrong))


def check_finite(numbers: torch.Tensor, module: str, what: str = "inputs") -> None:
    """Checks what was computed from the inputs of `module`, or from something else of it.

    Raises:
        ModelError: There is a NaN or an infinite number.
    """
    if not torch.isfinite(numbers).all():
        raise ModelError(
            f"The {what} of `{module}` hold a NaN or an infinite number. Load the model in another "
            "precision."
        )


def within_context(model: Any, sequences: Sequence[list[int]]) -> list[list[int]]:
    """Returns token sequences, cut to the model's context; empty ones are left out.

    Raises:
        DataError: Nothing is left.
    """
    context = context_length(model)
    documents = [sequence[:context] for sequence in sequences if sequence]
    if not documents:
        raise DataError("The corpus has no tokens. Give other texts.")
    return documents


def second_moments(
    model: Any,
    documents: Sequence[list[int]],
    modules: Sequence[str],
    *,
    last_only: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    description: str,
    progress: bool,
) -> tuple[dict[str, torch.Tensor], int]:
    """Returns the sum of k k^T, [D, D], for each module, and over how many tokens it goes.

    Products are float32; sums are float64 up to a width of 4096, and stay where the module is.

    Args:
        model: A causal language model.
        documents: Token sequences within the model's context, none of them empty.
        modules: Full names of linear modules.
        last_only: Only the last token of each document counts.
        batch_tokens: Tokens of a batch, padding included; a longer document is a batch by itself.
        description: What the progress bar says.
        progress: Show a progress bar.

    Raises:
        ModelError: A module was not run, or not on all tokens.
    """
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, keys: torch.Tensor, _: torch.Tensor, ends: torch.Tensor) -> None:
        add_moment_(sums, name, keys[ends] if last_only else keys)

    _run(model, documents, modules, add, batch_tokens, description, progress)
    n_tokens = len(documents) if last_only else sum(map(len, documents))
    return sums, n_tokens


def add_moment_(sums: dict[str, torch.Tensor], name: str, keys: torch.Tensor) -> None:
    """Adds the sum of k k^T over keys, [T, D] float32, to that of a module, in place."""
    if name not in sums:
        sums[name] = no_moment(keys.shape[1], keys.device)
    sums[name] += keys.T @ keys


def no_moment(width: int, device: torch.device) -> torch.Tensor:
    """Returns the sum of k k^T, [D, D], over no keys: float64 up to a width of 4096."""
    wide = width > WIDEST_FLOAT64 or device.type == "mps"
    return torch.zeros(width, width, dtype=torch.float32 if wide else torch.float64, device=device)


def end_moments(
    model: Any,
    documents: Sequence[list[int]],
    modules: Sequence[str],
    *,
    description: str,
    progress: bool,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns the sums of k k^T, [D, D] by module, over last tokens, and over those before them.

    Arguments, precision and errors as for `second_moments`.
    """
    last: dict[str, torch.Tensor] = {}
    before: dict[str, torch.Tensor] = {}

    def add(name: str, keys: torch.Tensor, _: torch.Tensor, ends: torch.Tensor) -> None:
        add_moment_(last, name, keys[ends])
        add_moment_(before, name, keys[~ends])

    _run(model, documents, modules, add, BATCH_TOKENS, description, progress)
    return last, before


def keys_of(
    model: Any,
    documents: Sequence[list[int]],
    modules: Sequence[str],
    *,
    last: Sequence[int] | None = None,
    before: dict[str, torch.Tensor] | None = None,
    description: str,
    progress: bool,
) -> dict[str, torch.Tensor]:
    """Returns each module's keys, [T, D] float32 on the host: document after document.

    Args:
        model: A causal language model.
        documents: Token sequences within the model's context, none of them empty.
        modules: Full names of linear modules.
        last: How many of each document's last tokens count, at least 1; `None` counts them all.
        before: Sums of k k^T by module, to which the tokens before the last ones are added.
        description: What the progress bar says.
        progress: Show a progress bar.

    Raises:
        ModelError: A module was not run, or not on all tokens.
    """
    counts = torch.tensor(last or [len(document) for document in documents])
    starts = counts.cumsum(0) - counts
    keys: dict[str, torch.Tensor] = {}

    def put(name: str, found: torch.Tensor, owners: torch.Tensor, ends: torch.Tensor) -> None:
        if before is not None:
            add_moment_(before, name, found[~ends])
        if last is not None:
            found, owners = found[ends], owners[ends.cpu()]
        if name not in keys:
            keys[name] = torch.empty(int(counts.sum()), found.shape[1])
        # Within a batch a document's tokens are neighbours.
        changes = torch.cat([torch.tensor([True]), owners[1:] != owners[:-1]])
        firsts = changes.nonzero()[:, 0]
        within = torch.arange(len(owners)) - firsts[changes.cumsum(0) - 1]
        keys[name][starts[owners] + within] = found.cpu()

    _run(model, documents, modules, put, BATCH_TOKENS, description, progress, last)
    return keys


def _run(
    model: Any,
    documents: Sequence[list[int]],
    modules: Sequence[str],
    take: Taker,
    batch_tokens: int,
    description: str,
    progress: bool,
    last: Sequence[int] | None = None,
) -> None:
    """Runs all documents, the longest first, and gives the keys of each batch to `take`.

    `last` says how many tokens of each document count as its last ones; `None`: one of each.
    """
    device = input_device(model)
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]), reverse=True)
    bar = progress_bar(total=len(documents), desc=description, unit="document", show=progress)
    with bar, torch.no_grad(), evaluation_mode(model):
        for numbers in batches_of(order, documents, batch_tokens):
            batch = [documents[i] for i in numbers]
            ids, real = padded_right(batch)
            owners = torch.tensor(numbers)[:, None].expand_as(real)[real]  # [tokens]
            n_last = torch.tensor([1 if last is None else last[i] for i in numbers])
            ends = last_of(real, n_last)[real]  # [tokens]
            with _listening(model, modules, real, owners, ends, take):
                model(
                    input_ids=ids.to(device),
                    attention_mask=real.long().to(device),
                    use_cache=False,
                )
            bar.update(len(batch))


def padded_right(batch: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token sequences side by side, and which of these tokens are real, [B, T].

    Padding goes on the right, with any token: nothing before it sees it.
    """
    lengths = torch.tensor([len(sequence) for sequence in batch])
    ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long)
    for row, sequence in zip(ids, batch, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def last_of(real: torch.Tensor, n_last: torch.Tensor | int = 1) -> torch.Tensor:
    """Returns which tokens are among the last `n_last` of each sequence, [B, T].

    Args:
        real: Which tokens are no padding, [B, T].
        n_last: How many; of each sequence, [B], or of all.
    """
    lengths = real.sum(dim=1)
    return (torch.arange(real.shape[1]) >= (lengths - n_last)[:, None]) & real


def batches_of(
    order: Sequence[int], documents: Sequence[list[int]], batch_tokens: int
) -> Iterator[list[int]]:
    """Yields the numbers of each batch's documents; `order` has the longest first."""
    start = 0
    while start < len(order):
        size = max(batch_tokens // len(documents[order[start]]), 1)
        yield list(order[start : start + size])
        start += size


@contextmanager
def _listening(
    model: Any,
    modules: Sequence[str],
    real: torch.Tensor,
    owners: torch.Tensor,
    ends: torch.Tensor,
    take: Taker,
) -> Iterator[None]:
    """Context manager that gives each module's keys in a pass to `take`; ends it after the last.

    Args:
        model: The model.
        modules: Names of modules.
        real: Which tokens are no padding, [B, T].
        owners: Their documents, [tokens].
        ends: Which of them are among its last ones, [tokens].
        take: What gets the keys.

    Raises:
        ModelError: A module was not run, or not on all tokens.
    """

    def of_real(name: str, flat: torch.Tensor) -> None:
        if len(flat) != real.numel():
            raise ModelError(
                f"`{name}` gets {len(flat)} of {real.numel()} tokens (is it one of several "
                "experts?), and which they are is not known. Name a module that gets all."
            )
        keys = flat[real.reshape(-1).to(flat.device)].float()
        take(name, keys, owners, ends.to(flat.device))

    with module_inputs({name: model.get_submodule(name) for name in modules}, of_real) as seen:
        yield
    unseen = [name for name in modules if name not in seen]
    if unseen:
        raise ModelError(f"The model does not run {', '.join(unseen)}. Name other modules.")
