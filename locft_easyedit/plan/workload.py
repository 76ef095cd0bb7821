"""What a plan is made for: the work to be done, and the machine that is there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import HyperParamsError, one_message
from ..hparams import LocFTBFHyperParams

# TFLOP/s that matrix products of a large model reach, not what data sheets promise: an H100 or
# H200, and two cores of a server.
ASSUMED_TFLOPS = {
    ("gpu", "half"): 400.0,
    ("gpu", "float32"): 40.0,
    ("cpu", "half"): 0.6,
    ("cpu", "float32"): 0.15,
}
ASSUMED_HOST = "128GiB"
ASSUMED_DISK = "500GiB"
PROMPTS_AN_EDIT = 4  # of an evaluation: rewrite, rephrase, one locality, one portability


@dataclass(frozen=True)
class Workload:
    """The work.

    Attributes:
        n: Edits.
        tokens: Mean tokens an edit, with the one after the target that ends it.
        targets: How many of them are targets, which are scored.
        epochs: Passes over all edits.
        batch_size: Edits in a mini-batch.
        micro_batch_size: Edits in one forward pass, or `None` to choose it.
        eval_batch_size: Sequences in a forward pass without gradients.
        row_tokens: Length of packed rows.
        evaluate: Whether the model is measured before and after.
        checked: Whether all texts of the edits are run once more after the epochs (`repairs`). How
            many are trained again is not known beforehand.
        forms: Texts of an edit beside its plain prompt, in other forms (see `Forms`). Rewordings
            that the data may bring are not known beforehand.
        forms_per_epoch: How many of them are trained in an epoch, in the mean.
        form_longer: Tokens that a prompt in such a form has more than the plain one.
    """

    n: int
    tokens: float = 15.6
    targets: float = 4.3
    epochs: int = 25
    batch_size: int = 100
    micro_batch_size: int | None = None
    eval_batch_size: int = 64
    row_tokens: int = 64
    evaluate: bool = True
    checked: bool = False
    forms: int = 0
    forms_per_epoch: float = 1.0
    form_longer: float = 25.0  # SmolLM2's chat template has 30, a question 5, a sentence 9

    def __post_init__(self) -> None:
        problems = [
            f"`{name}={value}` must be 1 or more."
            for name, value in (("n", self.n), ("epochs", self.epochs))
            if value < 1
        ]
        if not self.targets > 0:
            problems.append(f"`targets={self.targets}` must be above 0.")
        if not self.targets + 1 <= self.tokens < float("inf"):
            problems.append(
                f"`tokens={self.tokens}` must be at least one more than `targets={self.targets}`: "
                "an edit has a prompt."
            )
        if problems:
            raise HyperParamsError(one_message("Nothing can be planned:", problems))

    @property
    def run_tokens(self) -> float:
        """Tokens of an edit that run: its last one is only a label."""
        return self.tokens - 1

    @property
    def texts(self) -> float:
        """Texts of an edit in an epoch, in the mean: its plain prompt, and other forms of it."""
        return 1 + min(self.forms, self.forms_per_epoch)

    @property
    def recorded_texts(self) -> int:
        """Texts of an edit in the prefix: all that are trained, whatever an epoch takes."""
        return 1 + self.forms

    @property
    def step_tokens(self) -> float:
        """Tokens of an edit that run in a step."""
        return self._tokens_of(self.texts)

    @property
    def recorded_tokens(self) -> float:
        """Tokens of an edit in the prefix."""
        return self._tokens_of(self.recorded_texts)

    def _tokens_of(self, texts: float) -> float:
        return texts * self.run_tokens + (texts - 1) * self.form_longer

    def cells(self, tokens: float) -> float:
        """Returns the cells of the packed rows, of one length, that so many tokens fill."""
        if tokens <= self.row_tokens:
            return tokens
        return math.ceil(tokens / self.row_tokens) * self.row_tokens

    @property
    def edit_tokens(self) -> float:
        """Tokens of all edits in the prefix, T."""
        return self.n * self.recorded_tokens

    @property
    def eval_tokens(self) -> float:
        """Tokens of all evaluation prompts, each as long as an edit."""
        return PROMPTS_AN_EDIT * (self.n * self.run_tokens) if self.evaluate else 0.0

    @property
    def scored(self) -> float:
        """The part of a prompt's tokens that is scored."""
        return self.targets / self.run_tokens

    @property
    def step_scored(self) -> float:
        """The part of a step's tokens that is scored."""
        return self.texts * self.targets / self.step_tokens

    @property
    def recorded_scored(self) -> float:
        """The part of the tokens in the prefix that is scored."""
        return self.recorded_texts * self.targets / self.recorded_tokens

    @classmethod
    def from_hparams(
        cls, hparams: LocFTBFHyperParams, n: int, **changes: float | int | bool
    ) -> Workload:
        """Returns the work that the hyper-parameters ask for; `changes` override fields.

        Raises:
            HyperParamsError: A value is out of range.
        """
        sizes = (
            "batch_size",
            "micro_batch_size",
            "eval_batch_size",
            "row_tokens",
            "forms_per_epoch",
        )
        from ..data.forms import ways_of  # help shows what is assumed, and has no time for it

        forms = len(ways_of(hparams.wrapped_forms)) - 1
        checked = hparams.rounds_of_repair > 0
        values: dict[str, Any] = {"epochs": hparams.num_steps, "forms": forms, "checked": checked}
        trained = hparams.of_edits(n)
        values |= {key: getattr(trained, key) for key in sizes}
        return cls(n=n, **(values | changes))


@dataclass(frozen=True)
class Machine:
    """The machine, or several of a kind; sizes in bytes. Rates that are not given are assumed.

    Attributes:
        gpu: Memory of a GPU; `None` plans for a CPU alone.
        host: Memory of a node's host.
        disk: Room for the prefix on a node's disk.
        rate: TFLOP/s that a GPU reaches, or `None` for what is assumed.
        read: GB/s that a node's disk reads and writes.
        prefix_gpu: Budget of the prefix on a GPU, or `None` for the automatic one.
        prefix_host: Budget of the prefix in a host's memory, which the processes of a node share.
        prefix_disk: Budget of the prefix on a node's disk, which they share too.
        gpus: GPUs of a node.
        nodes: Nodes.
        bandwidth: GB/s that a GPU reads and writes its memory.
        nvlink: GB/s between the GPUs of a node.
        network: GB/s that the network of a node carries each way, all of its cards together.
        launch: Milliseconds to start the kernels of a layer, forward and backward.
    """

    gpu: int | None
    host: int
    disk: int
    rate: float | None = None
    read: float = 3.0
    prefix_gpu: int | None = None
    prefix_host: int | None = None
    prefix_disk: int | None = None
    gpus: int = 1
    nodes: int = 1
    # Of an H100's memory; of ring all-reduces in one node; of one card of 400 Gbit/s; of Python.
    bandwidth: float = 2800.0
    nvlink: float = 300.0
    network: float = 50.0
    launch: float = 0.7

    def __post_init__(self) -> None:
        rates = ("rate", "read", "bandwidth", "nvlink", "network", "launch")
        problems = [
            f"`{name}={value}` must be above 0."
            for name, value in ((name, getattr(self, name)) for name in rates)
            if value is not None and not 0 < value < float("inf")
        ]
        problems += [
            f"`{name}={value}` must be 1 or more."
            for name, value in (("gpus", self.gpus), ("nodes", self.nodes))
            if value < 1
        ]
        if self.gpu is None and self.world > 1:
            problems.append(
                f"`gpus={self.gpus}` and `nodes={self.nodes}` are {self.world} GPUs, and none has "
                "a memory. Add gpu=80GiB, the memory of each, or leave them out for one CPU."
            )
        if problems:
            raise HyperParamsError(one_message("Nothing can be planned:", problems))

    @property
    def world(self) -> int:
        """GPUs of all nodes."""
        return self.gpus * self.nodes

    @property
    def device(self) -> str:
        """Which place computes: `gpu` or `host`."""
        return "host" if self.gpu is None else "gpu"

    def room(self, place: str) -> int:
        """Returns the memory of `gpu`, `host` or `disk`."""
        return {"gpu": self.gpu or 0, "host": self.host, "disk": self.disk}[place]

    def flops(self, dtype: str) -> float:
        """Returns FLOP/s reached in a precision."""
        kind = "float32" if dtype == "float32" else "half"
        assumed = ASSUMED_TFLOPS["cpu" if self.gpu is None else "gpu", kind]
        return (self.rate or assumed) * 1e12
