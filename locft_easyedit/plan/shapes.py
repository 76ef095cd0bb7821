"""The sizes of a model's parts and of what is trained of it, in numbers (never bytes)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..hparams_rules import SAMPLED
from ..training.preserve.sources import TEXT


@dataclass(frozen=True)
class LoraShapes:
    """LoRA of the trained matrices, counted in numbers.

    Attributes:
        rank: Its rank.
        trained: All matrices A and B.
        inputs: Widths of what the matrices are given, together.
        largest: The largest of the matrices.
    """

    rank: int
    trained: int
    inputs: int
    largest: int

    def of(self, matrices: Iterable[torch.Tensor]) -> int:
        """Returns the numbers of A and B for some of the matrices."""
        return sum(self.rank * sum(matrix.shape) for matrix in matrices)


@dataclass(frozen=True)
class ConfinedShapes:
    """A confined change T A S of the trained matrices, counted in numbers.

    Attributes:
        preserve: What is preserved, as it is named.
        kinds: What kind of source each is.
        inputs: Width of what each matrix is given, by its parameter's name: S is a square of it.
        sizes: Numbers of each matrix, and so of A; divided by the width of the inputs that is the
            width of the outputs, of which T is a square where text is preserved.
        folds: Whether a prefix that ends at the matrix holds what does not change: W x and S x.
    """

    preserve: tuple[str, ...]
    kinds: tuple[str, ...]
    inputs: dict[str, int]
    sizes: dict[str, int]
    folds: bool

    @property
    def squares(self) -> int:
        """Numbers of all S."""
        return sum(width**2 for width in self.inputs.values())

    @property
    def outputs(self) -> dict[str, int]:
        """Width of what each matrix gives that has a T, by its parameter's name."""
        if not {SAMPLED, TEXT} & {*self.kinds}:
            return {}
        return {name: self.sizes[name] // width for name, width in self.inputs.items()}

    @property
    def output_squares(self) -> int:
        """Numbers of all T."""
        return sum(width**2 for width in self.outputs.values())

    @property
    def largest_square(self) -> int:
        """Numbers of the largest S."""
        return max(self.inputs.values()) ** 2

    def of(self, names: Iterable[str]) -> int:
        """Returns the numbers of A and S for some of the matrices."""
        return sum(self.sizes[name] + self.inputs[name] ** 2 for name in names)

    def outputs_of(self, names: Iterable[str]) -> int:
        """Returns the numbers of T for some of the matrices."""
        return sum(self.outputs[name] ** 2 for name in names if name in self.outputs)


@dataclass(frozen=True)
class LayerShape:
    """One layer, counted in numbers.

    Attributes:
        parameters: All of its parameters.
        matmul: Weights that a token is multiplied with (of a mixture, its active experts').
        late: Those of `matmul` that come after the attention itself: its output projection and
            the MLP. The last layer needs them at scored positions only.
        trained: Trained parameters.
        trained_matmul: Those of them that are matrices. With LoRA three times A and B, which are
            multiplied with forward, backward and for their gradients.
        confined: A and S of its trained matrices, where their change is confined.
        output_filters: T of these.
    """

    parameters: int
    matmul: int
    late: int
    trained: int
    trained_matmul: int
    confined: int = 0
    output_filters: int = 0


@dataclass(frozen=True)
class ModelShapes:
    """A model's sizes, in numbers (never bytes).

    Attributes:
        name: Where they come from.
        parameters: All parameters; tied ones count once.
        embedding: Input embedding (and learned positions).
        head: Output head without what it shares with the embedding.
        tied: Whether the head is the embedding.
        rest: Everything else outside the layers: the final norm.
        layers: Each layer.
        first_layer: The lowest trained layer, L.
        hidden: Width of the residual stream, D.
        vocab: Rows of the output head, V.
        attention: Width of all attention heads together, A.
        cuts: Numbers a token that each possible cut keeps, W; widest first.
        above_cut: Weights of layer L that a token is multiplied with above each cut.
        trained: Sizes of the trained parameters, by name.
        fused: Numbers of the fused parameters of which single experts are trained: a step makes
            gradients of all of them.
        stored_dtype: The checkpoint's precision.
        lora: LoRA of them; `None` where they are trained themselves.
        confined: A confined change of them; likewise.
    """

    name: str
    parameters: int
    embedding: int
    head: int
    tied: bool
    rest: int
    layers: tuple[LayerShape, ...]
    first_layer: int
    hidden: int
    vocab: int
    attention: int
    cuts: dict[str, int]
    above_cut: dict[str, int]
    trained: dict[str, int]
    stored_dtype: str
    fused: int = 0
    lora: LoraShapes | None = None
    confined: ConfinedShapes | None = None

    def folds(self, cut: str) -> bool:
        """Returns whether the prefix holds what a confined change makes constant at a cut."""
        return self.confined is not None and self.confined.folds and cut == "matrix"

    @property
    def first(self) -> LayerShape:
        """The lowest trained layer."""
        return self.layers[self.first_layer]

    @property
    def above(self) -> tuple[LayerShape, ...]:
        """The layers above it."""
        return self.layers[self.first_layer + 1 :]

    @property
    def streamed(self) -> int:
        """Parameters of the embedding and the layers below the first trained one."""
        return self.embedding + sum(layer.parameters for layer in self.layers[: self.first_layer])

    @property
    def upper(self) -> int:
        """Parameters that stay while everything below the first trained layer is streamed."""
        return self.parameters - self.streamed + (self.embedding if self.tied else 0)

    @property
    def sharded(self) -> int:
        """Parameters that FSDP2 would cut up: frozen layers above the place."""
        return sum(one.parameters for one in (self.first, *self.above) if not one.trained)

    @property
    def n_trained(self) -> int:
        """Numbers of all trained parameters."""
        return sum(self.trained.values())

    @property
    def optimized(self) -> int:
        """Numbers that Adam updates: LoRA's, or as many as the trained parameters have."""
        return self.lora.trained if self.lora else self.n_trained
