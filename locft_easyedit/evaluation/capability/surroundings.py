"""What the harness would change around it, restored: random states, logging, bars, the model."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ...modeling.modes import evaluation_mode

logger = logging.getLogger(__name__)

_HUB_SECONDS = 5


@contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Context manager in which the attribute `name` of an object or module is `value`."""
    own = name in vars(target)
    former = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        if own:
            setattr(target, name, former)
        else:
            delattr(target, name)


@contextmanager
def surroundings_kept(*, progress: bool) -> Iterator[None]:
    """Context manager that restores random states and logging, which tasks may set.

    Args:
        progress: Show progress bars; without it none is shown, the harness's included.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        for one in (logging.getLogger(), logging.getLogger("lm_eval")):
            stack.callback(one.setLevel, one.level)
            stack.enter_context(replaced(one, "propagate", one.propagate))
            stack.enter_context(replaced(one, "handlers", list(one.handlers)))
        if not progress:
            stack.enter_context(_bars_hidden())
        yield


@contextmanager
def _bars_hidden() -> Iterator[None]:
    """Context manager in which tqdm shows nothing: the harness has no switch for all its bars."""
    initialize = tqdm.__init__

    def hidden(self: Any, *args: Any, **options: Any) -> None:
        initialize(self, *args, **options | {"disable": True})

    with replaced(tqdm, "__init__", hidden):
        yield


@contextmanager
def errors_only() -> Iterator[None]:
    """Context manager in which the harness logs no warnings, unless the program set its level.

    Loading a task warns of defaults that every task has.
    """
    harness = logging.getLogger("lm_eval")
    level = harness.level
    if level == logging.NOTSET:
        harness.setLevel(logging.ERROR)
    try:
        yield
    finally:
        harness.setLevel(level)


@contextmanager
def model_kept(model: Any) -> Iterator[None]:
    """Context manager in which a model is in evaluation mode and no weights are tied.

    The harness ties weights anew, which would undo an edit of a matrix that was untied.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        if hasattr(model, "tie_weights"):
            stack.enter_context(replaced(model, "tie_weights", lambda *args, **kwargs: None))
        yield


def padded_copy(tokenizer: Any) -> Any:
    """Returns a copy of a tokenizer, with a pad token that the model knows.

    The harness sets the padding side, and a tokenizer without pad and EOS token gets a new one
    from it that is beyond the model's embeddings.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        # A special token: one that texts use would be lost in them.
        special = tokenizer.all_special_tokens or [tokenizer.convert_ids_to_tokens(0)]
        tokenizer.pad_token = tokenizer.eos_token or special[0]
    return tokenizer


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Context manager in which data sets come from this machine alone if the hub does not answer.

    Otherwise each of them would be asked for six times, 23 seconds in all.
    """
    import datasets.config
    from huggingface_hub import constants, get_session

    with ExitStack() as stack:
        if not constants.HF_HUB_OFFLINE:
            try:
                get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
            except Exception as error:  # of whichever HTTP library the hub's client uses
                logger.info("The hub does not answer (%s): this machine's data sets.", error)
                for module in (constants, datasets.config):
                    stack.enter_context(replaced(module, "HF_HUB_OFFLINE", True))
        yield
