"""Frozen layers of which each process holds a share (FSDP2), and how the processes keep in step.

Above the place every layer runs in every step, forward and backward. Where these layers do not fit
one GPU, `fully_shard` leaves each process a share of each, and gathers a layer just before it runs.
A gathering takes all processes; but they run different numbers of passes: shares of a mini-batch
are unequal, and so are answers. So before each pass they agree on what runs next, and a process
that has no such pass takes part in its gatherings without computing anything.

Why all processes issue the same gatherings in the same order:

- The sharded layers are a chain: each is run once in a forward pass, in order (this is checked),
  and a backward pass meets them in the opposite order, because what enters the first of them
  already depends on what is trained.
- A pass gathers each of them once. Which is fetched ahead of its turn is said explicitly (the next
  one, and only that), so that what FSDP2 would derive from the history of a process, which
  differs, plays no part. Fetching ahead issues a gathering earlier and changes no order.
- Nothing that is frozen has a gradient, so a backward pass gathers and reduces nothing.
- Where no gradients are wanted there is no backward pass, and none is announced: forward and
  backward passes are agreed upon each for itself.
- Passes that end early (`Stop`) do so below the first of these layers or above the last.

A pass that fails half-way (memory that runs out, say) still owes the others its gatherings: they
are made up for before this process says what it does next, which may be the same with less. An
error that ends a phase is told to all, and ends it for them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..distributed.world import World, brief
from ..errors import LostRankError, ModelError, RankError
from ..utils.hashing import keep_sample
from .layer_trace import first_tensor

_DONE, _FORWARD, _BACKWARD, _FAILED = 0, 1, 2, 3


class ShardedLayers:
    """The layers of a model that the processes of a world hold together.

    Args:
        n_layers: Their number.
        world: The processes.
        mesh: The device mesh of those that share one copy.

    Attributes:
        n_taken_part: Passes of others that this process took part in.
    """

    def __init__(self, n_layers: int, world: World, mesh: Any) -> None:
        self.world = world
        self.n_taken_part = 0
        self._mesh = mesh
        self._layers: list[Any] = []
        self._n_layers = n_layers
        self._running = _DONE  # the kind of pass that this process is in
        self._at = 0  # the layer that it is in or comes to next
        self._in_lockstep = False

    def __len__(self) -> int:
        return len(self._layers)

    def add_(self, layer: nn.Module, whole: set[nn.Parameter]) -> None:
        """Leaves this process its share of a layer.

        Args:
            layer: The next in the order in which they run; all of it is here.
            whole: Its parameters that every process keeps; the others are frozen.
        """
        from torch.distributed.fsdp import fully_shard

        number = len(self._layers)
        samples = {}
        for name, parameter in layer.named_parameters():
            if parameter not in whole:
                parameter.requires_grad_(False)
                samples[name] = keep_sample(parameter)
        # Before `fully_shard` adds its own: what is agreed upon comes before what is gathered.
        layer.register_forward_hook(functools.partial(self._leave, number))
        fully_shard(layer, mesh=self._mesh, reshard_after_forward=True, ignored_params=whole)
        layer.register_forward_pre_hook(
            functools.partial(self._enter, number), prepend=True, with_kwargs=True
        )
        for name, sample in samples.items():
            sample(layer.get_parameter(name))
        self._layers.append(layer)
        # Makes ready what FSDP2 leaves until a layer runs: it may be fetched ahead before it does.
        self._gather([layer])
        if len(self._layers) == self._n_layers:
            self._settle_order()

    def _settle_order(self) -> None:
        """Says which layer is fetched ahead while another one runs."""
        for layer, following in zip(self._layers, self._layers[1:], strict=False):
            layer.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([layer])
        # None named would mean the one that ran before it, whenever that was. It is here already.
        self._layers[0].set_modules_to_backward_prefetch([self._layers[0]])
        try:
            from torch.distributed.fsdp import share_comm_ctx
        except ImportError:  # older releases of PyTorch use more streams for the same
            return
        share_comm_ctx(self._layers)

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """Context manager in which ranks run different numbers of passes; all leave it together.

        Nothing else that all processes do together may be begun within.

        Raises:
            RankError: Another process has failed.
        """
        if self._in_lockstep:
            yield
            return
        self._make_up()
        self._in_lockstep = True
        try:
            yield
            self._until(_DONE)
        except RankError:  # all know
            raise
        except Exception as error:
            self._tell(error)
            raise
        finally:
            self._in_lockstep = False

    def _tell(self, error: Exception) -> None:
        """Lets the others know that this process has failed, if it can still keep up with them."""
        try:
            self._until(_FAILED, error)
        except Exception as again:
            if again is error:
                return
            raise LostRankError(
                f"A pass through sharded layers failed ({brief(error)}) and cannot be ended in "
                f"order ({brief(again)}): the other processes end as well."
            ) from error

    def _enter(self, number: int, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """Is called before a layer is gathered to run."""
        if number == 0:
            self._make_up()
            if self._in_lockstep:
                self._until(_FORWARD)
            self._running, self._at = _FORWARD, 0
        if self._running != _FORWARD or number != self._at:
            raise ModelError(
                "`shard_frozen` does not suit this model: its layers do not run one after another, "
                "each once. Set `shard_frozen: false`."
            )
        hidden = first_tensor([*args, *kwargs.values()])
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(functools.partial(self._leave_backward, number))

    def _leave(self, number: int, layer: nn.Module, args: Any, output: Any) -> None:
        """Is called when a layer has run."""
        self._at = number + 1
        if self._at == self._n_layers:
            self._running = _DONE
        hidden = first_tensor(output)
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(functools.partial(self._enter_backward, number))

    def _enter_backward(self, number: int, gradient: torch.Tensor) -> None:
        """Is called before a layer is gathered to run backward."""
        if number == self._n_layers - 1 and self._in_lockstep:
            self._until(_BACKWARD)
        self._running, self._at = _BACKWARD, number

    def _leave_backward(self, number: int, gradient: torch.Tensor) -> None:
        """Is called when a layer has run backward."""
        self._at = number - 1
        if number == 0:
            self._running = _DONE

    def _make_up(self) -> None:
        """Does this process's part in what is left of a pass that it failed in."""
        running, self._running = self._running, _DONE
        if running == _DONE:
            return
        forward = running == _FORWARD
        left = self._layers[self._at :] if forward else self._layers[self._at :: -1]
        self._gather(left)  # nothing for those that are here, or on the way, already
        for layer in self._layers:
            if hasattr(layer, "reset_iter_state"):  # older releases of PyTorch do without
                layer.reset_iter_state()

    def _until(self, wanted: int, error: Exception | None = None) -> None:
        """Takes part in what others run, until it is the turn of what this process wants to do.

        Raises:
            RankError: A process has failed.
        """
        self._make_up()
        while True:
            kinds = (_FORWARD, _BACKWARD, _FAILED)
            forward, backward, failed = self.world.all_max([wanted == kind for kind in kinds])
            if failed:
                self.world.share_error(error)
            # Backward first: it frees what the forward pass has left.
            agreed = _BACKWARD if backward else _FORWARD if forward else _DONE
            if agreed == wanted:
                return
            self.n_taken_part += 1
            self._gather(self._layers if agreed == _FORWARD else reversed(self._layers))

    def _gather(self, layers: Iterable[Any]) -> None:
        """Does its part in the gatherings of a pass, and lets go of what comes."""
        for layer in layers:
            layer.unshard()
            layer.reshard()


_sharded: WeakKeyDictionary[nn.Module, ShardedLayers] = WeakKeyDictionary()


def note_sharded(model: nn.Module, layers: ShardedLayers) -> None:
    """Lets everybody who has `model` find out which of its layers are sharded."""
    _sharded[model] = layers


def sharded_layers(model: Any) -> ShardedLayers | None:
    """Returns the sharded layers of a model; `None` if this process has all of it."""
    return _sharded.get(model) if isinstance(model, nn.Module) else None


def lockstep(model: Any) -> AbstractContextManager[None]:
    """Returns a context within which processes may run different numbers of passes.

    All of them enter it, and leave it together: around a mini-batch, or around a measurement of
    which each process does a share. It does nothing for a model that is not sharded.
    """
    layers = sharded_layers(model)
    return nullcontext() if layers is None else layers.lockstep()
