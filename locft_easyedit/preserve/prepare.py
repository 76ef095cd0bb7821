"""From what is to be preserved to the filters that a confined change takes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..devices import context_length
from ..hparams import LocFTBFHyperParams
from ..place import Place
from ..tokens import ids_of
from .confined import owner, sides
from .neighbours import neighbours_of
from .sources import NEIGHBOURS, Source
from .spectral import mixed, spectral_filter
from .statistics import moments_of, prompt_keys, text_moments

logger = logging.getLogger(__name__)

# What neighbours count beside text. On SmolLM2 a whole share protects neighbours no better than
# half of it, and leaves less to generalize with.
_NEIGHBOURS_WEIGHT = 0.5
_NEIGHBOURS_EACH = 8  # of an edit
_NEIGHBOURS_OF_WIDTH = 8  # as many per direction of the matrix's inputs suffice
# Adam's L2 penalty on A. With D = A S it is |A|^2 = |D|^2 + tr(D C D^T) / (alpha m), which is what
# the change does to the preserved texts in the mean square: what does nothing for the edits goes.
PULL = 1e-4


@dataclass(frozen=True)
class Filters:
    """What a confined change takes, and what it rests on.

    Attributes:
        of: S of each trained matrix, by the parameter's name, [in, in] float32.
        summary: Figures for JSON.
    """

    of: dict[str, torch.Tensor]
    summary: dict[str, Any]


def filters_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    place: Place,
    sources: Sequence[Source],
    prompts: Sequence[Sequence[str]],
    subjects: Sequence[str | None],
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
        prompts: For each edit its prompt, and its rewordings after it.
        subjects: The subject of each edit; `None` if it is not known.
        hparams: `preserve_strength`, `preserve_dir`, `seed`.
        progress: Show progress bars.

    Raises:
        LocFTError: A source is too small, or takes too much; the cache cannot be written.
    """
    names = {name.rpartition(".")[0]: name for name in place.parameters}  # by module
    modules = list(names)
    width = max(sides(owner(model, name))[1] for name in place.parameters)
    moments: dict[str, Mapping[str, torch.Tensor]] = {}
    weights: dict[str, float] = {}
    exact: dict[str, torch.Tensor] = {}
    summary: dict[str, Any] = {"strength": hparams.preserve_strength, "sources": {}}
    n_texts = sum(source.kind in ("sampled", "text") for source in sources)
    for source in sources:
        figures: dict[str, Any] = {"kind": source.kind}
        if source.kind == "prompts":
            keys = prompt_keys(model, tokenizer, modules, source.texts)
            for module, found in keys.items():
                held = exact.get(module)
                exact[module] = found if held is None else torch.cat([held, found])
            figures |= {"prompts": len(source.texts), "tokens": len(next(iter(keys.values())))}
        elif source.kind == NEIGHBOURS:
            near = neighbours_of(
                prompts,
                subjects,
                each=_NEIGHBOURS_EACH,
                most=_NEIGHBOURS_OF_WIDTH * width,
                seed=hparams.seed,
            )
            figures |= {
                "prompts": len(near.prompts),
                "edits_without_subject": near.n_without_subject,
            }
            if not near.prompts:
                logger.warning(
                    "`preserve` names neighbours, and no edit has a `subject` that is in its "
                    "prompt: nothing is known of them. Give the requests a `subject`."
                )
            else:
                context = context_length(model)
                found_near = moments_of(
                    model,
                    [ids[:context] for ids in ids_of(tokenizer, near.prompts)],
                    modules,
                    last_only=True,
                    description="neighbours",
                    progress=progress,
                )
                moments[source.name] = found_near.second
                weights[source.name] = _NEIGHBOURS_WEIGHT
        else:
            text = text_moments(
                model,
                tokenizer,
                modules,
                source,
                cache=cache_folder(hparams.preserve_dir),
                progress=progress,
            )
            moments[source.name] = text.second
            weights[source.name] = 1 / n_texts
            figures |= {"tokens": text.n_tokens}
        summary["sources"][source.name] = figures
    of = {}
    for module, name in names.items():
        device = place.parameters[name].device
        here = {s: second[module].to(device) for s, second in moments.items()}
        if not here and module not in exact:
            of[name] = torch.eye(sides(owner(model, name))[1], device=device)
            continue
        of[name] = spectral_filter(
            mixed(here, weights) if here else None,
            exact[module].to(device) if module in exact else None,
            strength=hparams.preserve_strength,
            name=name,
        )
    return Filters(of, summary)


def cache_folder(folder: str | None) -> Path:
    """Returns where measurements are kept: `folder`, or one in the user's cache folder."""
    if folder is not None:
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "locft_easyedit"
