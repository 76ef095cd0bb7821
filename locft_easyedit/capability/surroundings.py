"""What the harness would change around it, kept: random states, logging, the model, the network."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from ..modes import evaluation_mode

logger = logging.getLogger(__name__)

_HUB_SECONDS = 5


@contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Within, the attribute `name` of an object or module is `value`."""
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
def random_states_kept() -> Iterator[None]:
    """Afterwards the random states of `random`, numpy and torch are what they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def logging_kept(*, quiet: bool = False) -> Iterator[None]:
    """Afterwards logging is configured as before; some tasks configure it when they are read.

    Args:
        quiet: Within, the harness logs errors only, unless the program has set its level. Loading
            a task warns of defaults that every task has.
    """
    root, harness = logging.getLogger(), logging.getLogger("lm_eval")
    former = [(one, one.level, list(one.handlers), one.propagate) for one in (root, harness)]
    if quiet and harness.level == logging.NOTSET:
        harness.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level, handlers, propagate in former:
            one.setLevel(level)
            one.handlers[:] = handlers
            one.propagate = propagate


@contextmanager
def model_kept(model: Any) -> Iterator[None]:
    """Afterwards the model's modes are what they were, and what is tied to what.

    The harness ties weights anew, which would undo an edit of a matrix that was untied.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        if hasattr(model, "tie_weights"):
            stack.enter_context(replaced(model, "tie_weights", lambda *args, **kwargs: None))
        yield


def padded_copy(tokenizer: Any) -> Any:
    """Returns a copy of a tokenizer, with a pad token that the model knows.

    The harness sets the padding side and, where there is no pad token, adds a new one that is
    beyond the model's embeddings.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        # Padding is masked, but a pad token is special: one that texts use would be lost in them.
        special = [tokenizer.eos_token, *tokenizer.all_special_tokens]
        known = [token for token in special if token is not None]
        tokenizer.pad_token = known[0] if known else tokenizer.convert_ids_to_tokens(0)
    return tokenizer


@contextmanager
def offline_if_unreachable(*, needed: bool = True) -> Iterator[None]:
    """Within, data sets are looked for on this machine only if the hub does not answer.

    Otherwise each of them would be asked for six times, 23 seconds in all.

    Args:
        needed: Whether any data set may have to come from the hub.
    """
    import datasets.config
    from huggingface_hub import constants

    with ExitStack() as stack:
        if needed and not constants.HF_HUB_OFFLINE and not _hub_answers():
            logger.info("The hub does not answer; only data sets of this machine are used.")
            for module in (constants, datasets.config):
                stack.enter_context(replaced(module, "HF_HUB_OFFLINE", True))
        yield


def _hub_answers() -> bool:
    """Returns whether the hub answers one short request, by way of proxies if there are any."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception as error:  # of whichever HTTP library the hub's client uses
        logger.debug("%s: %s", constants.ENDPOINT, error)
        return False
    return True


@contextmanager
def data_set_bars(shown: bool) -> Iterator[None]:
    """Within, the progress bars of reading data sets are shown or not."""
    import datasets

    were_hidden = datasets.are_progress_bars_disabled()
    try:
        if not shown:
            datasets.disable_progress_bars()
        yield
    finally:
        if not shown and not were_hidden:
            datasets.enable_progress_bars()
