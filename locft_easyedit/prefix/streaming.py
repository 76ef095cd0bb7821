"""Frozen layers that are never resident: read from disk, run once over everything, dropped.

A model that does not fit its GPU is loaded with its frozen part left on disk. One
pass then takes one layer after another through the GPU, the next one being read meanwhile, and
each runs over the tokens of all texts before it goes: every weight is read once, whatever the
number of texts. Between two layers the hidden states lie in the stores of the texts' prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel

from ..data.batching import sequences_a_pass
from ..modeling.devices import input_device, module_device
from ..modeling.layer_trace import n_returned, tracing
from ..modeling.places import LayerList, find_layers
from ..utils.hashing import digest_of_sample, sample_numbers
from ..utils.progress import progress_bar
from .cut import Cut, bypassing, layer_cut
from .frozen_prefix import FrozenPrefix, Layout
from .prefetch import SideStreams, prefetch
from .store import StateStore

_MOST_RETURNED = 3  # values in the tuple of a layer


class FrozenStream:
    """The frozen part of a model that lies on disk.

    A context manager: within, the hooks with which accelerate would read each module anew in every
    forward pass are off; what is on disk runs in `run` alone.

    Args:
        model: A model loaded with its layers below `first_layer` on disk.
        stack: Its layers.
        first_layer: The first layer that is resident.
        progress: Show progress bars.
    """

    def __init__(
        self, model: PreTrainedModel, stack: LayerList, first_layer: int, *, progress: bool = False
    ) -> None:
        self.model = model
        self.stack = stack
        self.first_layer = first_layer
        self.progress = progress
        # What leaves the last frozen layer is used where the next one is.
        self.device = module_device(stack.layers[first_layer]) or input_device(model)
        embedding: Any = model.get_input_embeddings()
        self.width, self.dtype = int(embedding.weight.shape[1]), model.dtype
        self.n_returned = 0
        self.n_passes = 0
        self._hooks: dict[nn.Module, Any] = {}
        self._sides = SideStreams()
        self._undo = ExitStack()
        self._jobs: list[tuple[FrozenPrefix, Layout]] = []

    def __enter__(self) -> FrozenStream:
        with ExitStack() as undo:
            undo.callback(self._hooks.clear)
            for module in self._on_disk():
                if not any(parameter.is_meta for parameter in module.parameters()):
                    continue  # resident, and perhaps on another device: its hooks are needed
                for part in module.modules():
                    if hasattr(part, "_hf_hook"):
                        self._hooks[part] = part._hf_hook
                        undo.callback(add_hook_to_module, part, part._hf_hook)
                        remove_hook_from_module(part)
                        self._place_buffers(part)
                sender = module.register_forward_pre_hook(self._send, with_kwargs=True)
                undo.enter_context(sender)
            self._look()
            self._undo = undo.pop_all()
        return self

    def _place_buffers(self, part: nn.Module) -> None:
        """Puts what is no weight on the device: without its hook it is where it was loaded."""
        for name, buffer in part.named_buffers(recurse=False):
            if not buffer.is_meta:
                part._buffers[name] = buffer.to(self.device)

    def _send(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Gives a module its input on the device, as the hook did that was taken off."""
        skipped = getattr(self.model, "_skip_keys_device_placement", None)
        sent = send_to_device(kwargs, self.device, skip_keys=skipped)
        return send_to_device(args, self.device), sent

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """Context manager that runs the model without its frozen layers, to examine the others."""
        [embedding, *_] = self._on_disk()
        shorter = bypassing(self.stack, self.first_layer, self.n_returned)
        with _resident(embedding, self._read(embedding)), shorter:
            yield

    def _look(self) -> None:
        """Finds out in which form layers take and return hidden states.

        Where layers return tuples, stand-ins that do not make the first resident layer fail; so
        the forms are tried, until it has run.
        """
        [embedding, *_] = self._on_disk()
        layer = self.stack.layers[self.first_layer]
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        forms: list[int] = []
        with _resident(embedding, self._read(embedding)), ExitStack() as stack:
            seen = layer.register_forward_hook(lambda _m, _a, out: forms.append(n_returned(out)))
            stack.enter_context(seen)
            for form in range(_MOST_RETURNED + 1):
                with (
                    bypassing(self.stack, self.first_layer, form),
                    tracing(layer) as trace,
                    suppress(Exception),  # what follows that layer does not matter
                    torch.no_grad(),
                ):
                    self.model(input_ids=ids, use_cache=False)
                if trace.entry is not None:
                    width = trace.entry.numel() // ids.numel()
                    self.width, self.dtype = width, trace.entry.dtype
                if forms:
                    self.n_returned = forms[0]
                    return

    def weights_of(self, module: nn.Module) -> Any:
        """Returns accelerate's map of a module's weights on disk, by their names within it."""
        return self._hooks[module].weights_map

    def _on_disk(self) -> list[nn.Module]:
        """Returns what is read in turn: the embedding, then the frozen layers."""
        embedding: Any = self.model.get_input_embeddings()
        return [embedding, *self.stack.layers[: self.first_layer]]

    def record(self, prefix: FrozenPrefix, layout: Layout) -> None:
        """Lets the next pass compute `prefix` as well, for texts that are laid out in this way."""
        self._jobs.append((prefix, layout))
        prefix.source = self.run

    @torch.no_grad()
    def run(self) -> None:
        """Takes the frozen layers through the device once, for all prefixes that wait for it.

        Raises:
            MemoryBudgetError: The budgets cannot hold the states; nothing was read yet.
            OutputError: The disk is full or cannot be written to.
        """
        jobs = [(prefix, layout) for prefix, layout in self._jobs if not prefix.complete]
        if not jobs:
            return
        self.n_passes += 1
        stages = self._on_disk()
        final: list[StateStore] = []
        states: list[StateStore] = []  # between two layers
        try:
            # First what stays: it is read in every epoch, and takes the fastest tiers.
            for prefix, _ in jobs:
                width = prefix.cut.width or self.width
                final.append(prefix.new_store(width, self.dtype, prefix.device))
            for (prefix, _), last in zip(jobs, final, strict=True):
                between = last
                if prefix.cut.kind != "layer":
                    n_tokens, budget = prefix.n_tokens, prefix.budget
                    between = StateStore(n_tokens, self.width, self.dtype, self.device, budget)
                states.append(between)
            with progress_bar(
                total=sum(prefix.n_tokens for prefix, _ in jobs) * (len(stages) + 1),
                desc=f"frozen prefix, {len(stages) - 1} layers from disk",
                unit="token",
                unit_scale=True,
                show=self.progress,
            ) as bar:
                arriving = prefetch(
                    self._read,
                    stages,
                    move=lambda weights: weights.values(),
                    in_thread=True,
                    sides=self._sides.of([self.device]),
                )
                layer = -1
                for weights in arriving:  # `enumerate` would keep the last ones alive
                    with _resident(stages[layer + 1], weights):
                        for job, store in zip(jobs, states, strict=True):
                            self._stage(layer, *job, store, bar)
                    layer += 1
                    del weights
                for job, store, last in zip(jobs, states, final, strict=True):
                    self._last_stage(*job, store, last, bar)
            self._jobs = []
        finally:
            for store in {*final, *states}:
                if not any(prefix.holds(store) for prefix, _ in jobs):
                    store.close()

    def _read(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Returns a module's weights, read from the checkpoint to the device."""
        weights = {}
        for path, part in module.named_modules():
            for name, parameter in part.named_parameters(recurse=False):
                if not parameter.is_meta:
                    continue
                value = self._hooks[part].weights_map[name]
                # A copy, and not the map of a whole file that each weight comes in: it is read
                # here, in the thread, and the file is let go.
                # accelerate may have read it to a GPU already.
                if value.device.type == "cpu":
                    value = value.pin_memory() if self.device.type == "cuda" else value.clone()
                full = f"{path}.{name}" if path else name
                weights[full] = value.to(self.device, non_blocking=True)
        return weights

    def _stage(
        self, layer: int, prefix: FrozenPrefix, layout: Layout, store: StateStore, bar: Any
    ) -> None:
        """Runs one layer (-1 is the embedding) over all tokens of a prefix, in place."""
        entry = layer_cut(self.stack, layer, self.n_returned) if layer >= 0 else None
        exit_ = layer_cut(self.stack, layer + 1, self.n_returned)
        self._batches(prefix, layout, entry, store, exit_, store, bar)

    def _last_stage(
        self, prefix: FrozenPrefix, layout: Layout, store: StateStore, final: StateStore, bar: Any
    ) -> None:
        """Runs what is frozen of the first trained layer."""
        if final is store:
            bar.update(prefix.n_tokens)
        else:
            entry = layer_cut(self.stack, self.first_layer, self.n_returned)
            self._batches(prefix, layout, entry, store, prefix.cut, final, bar)
        prefix.adopt(final)

    def _batches(
        self,
        prefix: FrozenPrefix,
        layout: Layout,
        entry: Cut | None,
        source: StateStore,
        exit_: Cut,
        target: StateStore,
        bar: Any,
    ) -> None:
        texts = layout.texts
        ids = torch.from_numpy(texts.ids).to(self.device)
        for batch in layout.batches(sequences_a_pass(float(texts.input_lengths.mean()))):
            rows = layout.rows(self.model, batch)
            keeping = exit_.recording(partial(target.put_rows, rows), go_on=False)
            prefix.run(rows, ids, keeping, entry, source)
            bar.update(int(texts.input_lengths[batch].sum()))


@contextmanager
def _resident(module: nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Context manager that gives `module` these weights; afterwards it has none again."""
    originals: list[tuple[nn.Module, str, nn.Parameter]] = []
    for full, value in weights.items():
        path, _, name = full.rpartition(".")
        part = module.get_submodule(path)
        originals.append((part, name, part._parameters[name]))  # type: ignore[arg-type]
        part._parameters[name] = nn.Parameter(value, requires_grad=False)
    try:
        yield
    finally:
        for part, name, original in originals:
            part._parameters[name] = original


def stream_of(
    model: PreTrainedModel, first_layer: int | None, *, progress: bool = False
) -> FrozenStream | None:
    """Returns the stream of a model whose frozen layers were left on disk; `None` if none was."""
    stack = find_layers(model)
    if stack is None or not first_layer:
        return None
    frozen = [p for layer in stack.layers[:first_layer] for p in layer.parameters()]
    if not any(parameter.is_meta for parameter in frozen):
        return None
    return FrozenStream(model, stack, first_layer, progress=progress)


def samples_on_disk(model: PreTrainedModel) -> dict[str, str]:
    """Returns what `sample_digest` gives for each parameter that was left on disk, by name.

    Nothing but the sample is read. Not to be called within a stream, which takes the hooks off.
    """
    found = {}
    for path, module in model.named_modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is None:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                numbers = sample_numbers(weights[name]).to(parameter.dtype)
                full = f"{path}.{name}" if path else name
                found[full] = digest_of_sample(numbers, parameter.shape)
    return found
