"""Which shortcuts leave a model's own logits as they are: measured on a few texts, not assumed.

Packing, the frozen prefix, and running the end of the model at scored positions alone change
nothing in the result for the architectures of transformers that follow its conventions. Before
training, a few edits are run with and without each; what changes the logits is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..data.tokenization import TokenizedTexts
from ..errors import ModelError
from ..hparams import LocFTBFHyperParams
from ..modeling.compiled_layers import CompiledLayers
from ..modeling.cross_entropy import Head
from ..modeling.devices import input_device
from ..modeling.fsdp import lockstep
from ..modeling.fused_linears import FusedLinears
from ..modeling.last_layer import Tail
from ..modeling.places import Place
from ..modeling.suitability import check_causal
from .cut import Cut
from .probes import Probes
from .step_probes import StepProbes
from .streaming import FrozenStream, stream_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shortcuts:
    """What was found to leave a model's logits as they are.

    Attributes:
        packed: Rows hold several texts.
        cuts: Where the frozen prefix may end, the least to run first; empty for no prefix.
        tail: The end of the model, at scored positions alone; `None` runs it everywhere.
        head: The output head, for losses in chunks; `None` takes the model's own logits.
        packed_anywhere: Rows hold several texts whose positions do not begin at 0, too.
        shared: Beginnings that texts of a packed row have in common run once.
        fused: Frozen matrices above the cut that are given the same tensor, run as one; `None` runs
            each for itself.
        compiled: Layers above the cut that are compiled in training; `None` runs all as they are.
    """

    packed: bool
    cuts: tuple[Cut, ...] = ()
    tail: Tail | None = None
    head: Head | None = None
    packed_anywhere: bool = False
    shared: bool = False
    fused: FusedLinears | None = None
    compiled: CompiledLayers | None = None

    @property
    def from_layer(self) -> bool:
        """Whether the model can begin at the input of the first trained layer."""
        return any(cut.kind == "layer" for cut in self.cuts)


def can_pack(model: PreTrainedModel, texts: TokenizedTexts) -> bool:
    """Returns whether packed rows give the model's own logits; warns if they do not."""
    return Probes(model, texts).packing()


def can_pack_anywhere(model: PreTrainedModel, texts: TokenizedTexts) -> bool:
    """Returns the same for texts whose positions do not begin at 0; tells the debug log if not."""
    return Probes(model, texts).packing_anywhere()


def find_shortcuts(
    model: PreTrainedModel,
    texts: TokenizedTexts,
    place: Place,
    *,
    packing: bool = True,
    frozen_prefix: bool = True,
    on_disk: bool = False,
    fused: bool = False,
    compiled: bool = False,
) -> Shortcuts:
    """Returns the shortcuts that leave the logits as they are; warns of those that do not.

    Args:
        model: The model, in evaluation mode.
        texts: All edits as tokens.
        place: What is trained.
        packing: Allow packed rows.
        frozen_prefix: Allow the frozen prefix.
        on_disk: The layers below the first trained one are not resident.
        fused: Allow frozen matrices that are given the same tensor to run as one, unless layers are
            compiled: each layer would have code of its own then.
        compiled: Compile layers for training.

    Raises:
        ModelError: The model is not causal.
    """
    if len(texts):
        check_causal(model, texts.ids[: texts.offsets[1]].tolist())
    probes = Probes(model, texts)
    packed = packing and probes.packing()
    tail = probes.tail(place, packed)
    head = probes.head(place, packed)
    cuts: tuple[Cut, ...] = ()
    if frozen_prefix:
        cuts, why_not = probes.cuts(place, packed, on_disk=on_disk)
        if not cuts:
            logger.warning(
                "No frozen prefix for %s: %s. Every step runs the full model.",
                type(model).__name__,
                why_not,
            )
    anywhere, shared = packed and probes.packing_anywhere(), packed and probes.sharing()
    step = StepProbes(probes, place, packed, head, shared)
    faster = step.compiled() if compiled else None
    together = step.fused(cuts) if fused and faster is None else None
    return Shortcuts(packed, cuts, tail, head, anywhere, shared, together, faster)


@contextmanager
def enabled_shortcuts(
    model: PreTrainedModel,
    texts: TokenizedTexts,
    place: Place,
    hparams: LocFTBFHyperParams,
    *,
    fused: bool | None = None,
    progress: bool = False,
) -> Iterator[tuple[Shortcuts, FrozenStream | None]]:
    """Context manager that enables what makes many passes fast; afterwards the model is as before.

    Yields what leaves its logits as they are, and what reads frozen layers that are not resident.
    Of `hparams`, `packing`, `frozen_prefix` and `compile_layers` count; all else is as for
    `shortcuts_beside`.

    Raises:
        ModelError: Frozen layers are on disk, and the model cannot be split above them.
    """
    with ExitStack() as undo:
        stream = stream_of(model, place.first_layer, progress=progress)
        if stream is not None:
            undo.enter_context(stream)
        shortcuts = shortcuts_beside(stream, model, texts, place, hparams, fused=fused)
        if shortcuts.fused is not None:
            undo.enter_context(shortcuts.fused.laid_out())
        yield shortcuts, stream


def gains_by_fusing(model: PreTrainedModel) -> bool:
    """Returns whether frozen matrices of one input should run as one where nobody says so.

    On a GPU, where each product is a kernel to start and small ones leave most of it idle. On a CPU
    no gain was measured.
    """
    return input_device(model).type == "cuda"


def shortcuts_beside(
    stream: FrozenStream | None,
    model: PreTrainedModel,
    texts: TokenizedTexts,
    place: Place,
    hparams: LocFTBFHyperParams,
    *,
    fused: bool | None = None,
) -> Shortcuts:
    """Returns the shortcuts of a model whose frozen layers a stream reads, if they are on disk.

    Args:
        stream: The stream, entered; `None` where all layers are resident.
        model: As for `enabled_shortcuts`, like what follows.
        texts: All edits as tokens.
        place: What is trained.
        hparams: `packing`, `frozen_prefix`, `compile_layers`.
        fused: As for `find_shortcuts`; `None` leaves it to `gains_by_fusing`. What is found has yet
            to be laid out.

    Raises:
        ModelError: Frozen layers are on disk, and the model cannot be split above them.
    """
    shortened = stream.shortened() if stream is not None else nullcontext()
    with shortened, lockstep(model):
        shortcuts = find_shortcuts(
            model,
            texts,
            place,
            packing=hparams.packing,
            frozen_prefix=hparams.frozen_prefix or stream is not None,
            on_disk=stream is not None,
            fused=gains_by_fusing(model) if fused is None else fused,
            compiled=hparams.compile_layers,
        )
    if stream is not None and not shortcuts.cuts:
        raise ModelError(
            "`stream_frozen` does not suit this model: its layers cannot be split (see "
            "the warning). Set `stream_frozen: false`, on a device that holds it whole."
        )
    return shortcuts
