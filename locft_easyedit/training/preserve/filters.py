"""From what is to be preserved to the filters that a confined change takes."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.forms import Forms
from ...data.training_texts import TrainingTexts
from ...errors import PreserveError
from ...hparams import LocFTBFHyperParams
from ...hparams_rules import NEIGHBOURS, SAMPLED
from ...modeling.places import Place, sides
from ...utils.hashing import json_sha256
from ...utils.progress import progress_bar
from .input_moments import check_finite, end_moments, input_width, keys_of
from .kept_prompts import check_few, prompt_keys
from .neighbours import neighbours_of
from .output_gradients import gradient_moments
from .source_statistics import (
    Moments,
    answered_ids,
    asked_moments,
    chat_moments,
    prompt_ids,
    text_moments,
)
from .sources import PROMPTS, TEXT, Source
from .spectral_filter import basis_of, mixed, output_filter, spectral_filter

logger = logging.getLogger(__name__)

# What counts beside all text together, which counts 1.
_WEIGHTS = {"asked": 1.0, "neighbours": 0.75, "context": 0.25}
_NEIGHBOURS_EACH = 8  # of an edit
_PER_DIRECTION = 2  # prompts per direction of the matrix's inputs suffice
OUTPUTS = "outputs."  # before the name of a parameter whose T a tensor is
# Tokens of a text, and ends of prompts, that gradients are taken of, for each output of the matrix:
# a pass through the upper layers and back costs several times what one to the matrix does.
_GRADIENT_TOKENS, _GRADIENT_ENDS = 8, 2
EDITS_AT_ONCE = 64  # edits whose keys are held together
# Adam's L2 penalty on A, and so on what D = T A S does where much is carried: what does nothing for
# the edits goes. Losses are averaged over edits and so is this: a fact costs what it does alone.
_PULL = 0.011
# The second moment forgets within an epoch or two. With PyTorch's 0.999 it would remember the large
# gradients of the beginning to the end, and nothing would come to rest.
_BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class Filters:
    """What a confined change takes, and what it rests on.

    Attributes:
        of: S of each trained matrix, by the parameter's name, [in, in] float32.
        outputs: T of each, [out, out] float32; empty where no text is preserved.
        summary: Figures for JSON.
        digest: Hash of the text that was measured: what the model has sampled is not known before.
        damps: Whether anything is damped, and not only kept exactly.
    """

    of: dict[str, torch.Tensor]
    summary: dict[str, Any]
    digest: str = ""
    damps: bool = True
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns all filters, those of outputs under `outputs.NAME`."""
        return self.of | {OUTPUTS + name: t for name, t in self.outputs.items()}


def filters_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    place: Place,
    sources: Sequence[Source],
    texts: TrainingTexts,
    hparams: LocFTBFHyperParams,
    *,
    progress: bool = False,
) -> Filters:
    """Measures what is to be preserved at a place, and returns its filters.

    Args:
        model: The model as it is before the edit, in evaluation mode.
        tokenizer: Its tokenizer.
        place: Whose matrices are trained.
        sources: What is to be preserved.
        texts: The edits, of which neighbours are made.
        hparams: `preserve_strength`, `preserve_dir`, `seed`.
        progress: Show progress bars.

    Raises:
        LocFTError: A source is too small, or takes too much; the cache cannot be written.
    """
    names = {name.rpartition(".")[0]: name for name in place.parameters}  # by module
    measured = _Measured(model, tokenizer, list(names), hparams, texts.forms, progress)
    # In chat the model's own text counts as a text by itself.
    each = {TEXT: 1, SAMPLED: 1 if texts.forms.chat is None else 2}
    n_texts = sum(each.get(source.kind, 0) for source in sources)
    # What takes too much is refused before minutes of sampling.
    measured.keep_exactly([source for source in sources if source.kind == PROMPTS], names)
    for source in sources:
        if source.kind == NEIGHBOURS:
            measured.add_neighbours(source, texts)
        elif source.kind != PROMPTS:
            measured.add_text(source, n_texts)
    if measured.moments:
        measured.add_context(texts)
    of = {name: measured.filter(module, name) for module, name in names.items()}
    outputs = {
        names[module]: output_filter(
            moment.to(measured.device(module)), strength=hparams.preserve_strength
        )
        for module, moment in measured.gradients.items()
    }
    summary = {"strength": hparams.preserve_strength, "sources": measured.figures}
    digest = json_sha256(measured.digests)
    return Filters(of, summary, digest, bool(measured.moments), outputs)


@dataclass
class _Measured:
    """Second moments of what enters the modules, and of gradients of what leaves them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    modules: list[str]
    hparams: LocFTBFHyperParams
    forms: Forms
    progress: bool
    moments: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    with_first: set[str] = field(default_factory=lambda: {"context"})
    kept: dict[str, torch.Tensor] = field(default_factory=dict)  # orthonormal bases, [in, r]
    figures: dict[str, Any] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)
    # Sums of k k^T over what leads up to the ends of prompts, once there are neighbours.
    context: dict[str, torch.Tensor] | None = None
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)  # sums, each of trace 1

    @property
    def _most_prompts(self) -> int:
        widths = [input_width(self.model.get_submodule(module)) for module in self.modules]
        return _PER_DIRECTION * max(widths)

    @property
    def _where(self) -> dict[str, Any]:
        """Where measurements are kept and shown."""
        return {"cache": cache_folder(self.hparams.preserve_dir), "progress": self.progress}

    def keep_exactly(self, sources: Sequence[Source], names: Mapping[str, str]) -> None:
        """Finds what may not be touched at all.

        Args:
            sources: Prompts; there may be none.
            names: Of the matrices by module, for errors.
        """
        found = []
        for source in sources:
            prompts = list(dict.fromkeys(source.texts))
            check_few(self.model, self.tokenizer, self.modules, prompts)
            found.append(
                prompt_keys(
                    self.model, self.tokenizer, self.modules, prompts, progress=self.progress
                )
            )
            n_tokens = len(next(iter(found[-1].values())))
            self._note(source, prompts=len(source.texts), tokens=n_tokens)
        for module in self.modules if found else ():
            keys = torch.cat([own[module] for own in found]).to(self.device(module))
            # The matrices' device has other uses for the room.
            self.kept[module] = basis_of(keys, names[module]).cpu()

    def add_text(self, source: Source, n_texts: int) -> None:
        where = self._where
        found = text_moments(self.model, self.tokenizer, self.modules, source, **where)
        self._add(source.name, found.second, 1 / n_texts)
        self._add_gradients(found, 1 / n_texts)
        self.with_first.add(source.name)
        self.digests.append(found.digest)
        self._note(source, tokens=found.n_tokens)
        if source.kind == SAMPLED:
            if self.forms.chat is not None:
                chat = chat_moments(
                    self.model, self.tokenizer, self.modules, self.forms.chat, **where
                )
                self._add("chat", chat.second, 1 / n_texts)
                self._add_gradients(chat, 1 / n_texts)
                self.with_first.add("chat")
                self.digests.append(chat.digest)
                self._note(source, chat_tokens=chat.n_tokens)
            asked = asked_moments(self.model, self.tokenizer, self.modules, self.forms, **where)
            if asked is not None:
                self._add("asked", asked.second, _WEIGHTS["asked"])
                self._add_gradients(asked, _WEIGHTS["asked"], ends_only=True)
                self.digests.append(asked.digest)
                self._note(source, prompts=asked.n_tokens)

    def _add_gradients(self, of: Moments, weight: float, *, ends_only: bool = False) -> None:
        """Adds how much each direction of the outputs matters on some of the text of `of`."""
        most = max(sides(self.model.get_submodule(module))[0] for module in self.modules)
        most *= _GRADIENT_ENDS if ends_only else _GRADIENT_TOKENS
        sequences = [sequence for part in of.parts for sequence in part]
        random.Random(self.hparams.seed).shuffle(sequences)
        counts = np.ones(len(sequences)) if ends_only else np.array([*map(len, sequences)])
        n_texts = int(np.searchsorted(np.cumsum(counts), most)) + 1
        moments = gradient_moments(
            self.model,
            self.modules,
            sequences[:n_texts],
            ends_only=ends_only,
            description="gradients of the outputs",
            **self._where,
        )
        for module, moment in moments.items():
            # Where nothing above depends on an output, every direction is as good.
            share = weight * moment / moment.trace().clamp(min=torch.finfo(torch.float32).tiny)
            self.gradients[module] = self.gradients.get(module, 0) + share
        self.digests.append(json_sha256(["gradients", ends_only, sequences[:n_texts]]))

    def add_neighbours(self, source: Source, texts: TrainingTexts) -> None:
        near = neighbours_of(
            texts.wordings,
            texts.subjects,
            each=_NEIGHBOURS_EACH,
            most=self._most_prompts // min(2, len(self.forms)),
            seed=self.hparams.seed,
        )
        self._note(source, prompts=len(near.prompts), edits_without_subject=near.n_without_subject)
        if not near.prompts:
            logger.warning(
                "`preserve` names neighbours, and no edit has a `subject` that its prompt holds as "
                "a word: there are none. Give each request the `subject` that its prompt names."
            )
            return
        last, self.context = end_moments(
            self.model,
            prompt_ids(self.model, self.tokenizer, near.prompts, self.forms),
            self.modules,
            description="neighbours",
            progress=self.progress,
        )
        self._add(source.name, last, _WEIGHTS["neighbours"])

    def add_context(self, texts: TrainingTexts) -> None:
        """Adds what leads up to the answers of the edits' own texts, once there are neighbours.

        It is much the same in the neighbours of a prompt, and above the change the ends of prompts
        attend to it: most of what an edit moves there comes by this way.

        Args:
            texts: The edits, as they are asked in training.
        """
        context = self.context
        if context is None:
            return
        n_texts = np.diff(texts.variants.first)  # [number of edits]
        n_edits = max(1, int(self._most_prompts // n_texts.mean()))
        chosen = random.Random(self.hparams.seed).sample(
            range(len(n_texts)), min(len(n_texts), n_edits)
        )
        starts = range(0, len(chosen), EDITS_AT_ONCE)
        for start in progress_bar(starts, desc="edits", show=self.progress):
            asked = [one for i in chosen[start : start + EDITS_AT_ONCE] for one in texts.asked(i)]
            answered = answered_ids(self.model, self.tokenizer, asked)
            keys_of(
                self.model,
                [ids for ids, _ in answered],
                self.modules,
                last=[n_tokens for _, n_tokens in answered],
                before=context,
                description="edits",
                progress=False,
            )
        for module, total in context.items():
            check_finite(total, module)
        if all(float(total.trace()) > 0 for total in context.values()):  # prompts of one token
            self._add("context", context, _WEIGHTS["context"])
            self.figures["context"] = {"prompts": int(n_texts[chosen].sum())}

    def filter(self, module: str, name: str) -> torch.Tensor:
        """Returns S of one matrix, where the matrix is."""
        device, width = self.device(module), input_width(self.model.get_submodule(module))
        here = {s: second[module].to(device) for s, second in self.moments.items()}
        kept = self.kept.get(module)
        if not here and kept is None:
            return torch.eye(width, device=device)
        return spectral_filter(
            mixed(here, self.weights, self.with_first) if here else None,
            None if kept is None else kept.to(device),
            strength=self.hparams.preserve_strength,
            mean=sum(self.weights.values()) / width if here else None,
            name=name,
        )

    def device(self, module: str) -> torch.device:
        """Returns where a module's weight is."""
        weight = self.model.get_submodule(module).weight
        assert isinstance(weight, torch.Tensor)
        return weight.device

    def _add(self, name: str, second: dict[str, torch.Tensor], weight: float) -> None:
        # They have been summed on the matrices' device, which has other uses for the room.
        self.moments[name] = {m: moment.to("cpu", torch.float32) for m, moment in second.items()}
        self.weights[name] = weight

    def _note(self, source: Source, **figures: int) -> None:
        noted = self.figures.setdefault(source.name, {"kind": source.kind})
        noted.update(figures)


def adam_of(n_edits: int, hparams: LocFTBFHyperParams) -> dict[str, Any]:
    """Returns what Adam is given for a confined change, beside the rate.

    Args:
        n_edits: Edits that are trained together.
        hparams: `weight_decay` comes on top.
    """
    return {"betas": _BETAS, "weight_decay": hparams.weight_decay + _PULL / n_edits}


def cache_folder(folder: str | None) -> Path:
    """Returns where measurements are kept: `folder`, or one in the user's cache folder.

    Raises:
        PreserveError: There is no such folder.
    """
    if folder is not None:
        return Path(os.path.expanduser(folder))
    named = os.environ.get("XDG_CACHE_HOME")
    base = named or os.path.expanduser("~/.cache")
    if not Path(base).is_absolute():
        why = "no absolute path" if named else "in no home folder"
        raise PreserveError(
            f"What `preserve` measures is kept in the user's cache folder, and {base!r} is {why}. "
            "Set `preserve_dir` to a folder."
        )
    return Path(base) / "locft_easyedit"
