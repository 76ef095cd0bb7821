"""ConvSent's metrics (`metric_kwargs`), which compare the edited model with the one before."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ..errors import LocFTError, ModelError, RequestError
from ..evaluation.fluency import fluency_of, word_tokenizer
from .importing import EasyEdit

_SEPARATOR = "</s>"  # between question and answer, in every text that EasyEdit makes


class _Unedited:
    """The model before the edits, when it is called; otherwise the model as it is."""

    def __init__(self, model: Any, unedited: Callable[[], AbstractContextManager[Any]]) -> None:
        self._model, self._unedited = model, unedited

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._unedited() as model:
            return model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class SentimentMetrics:
    """EasyEdit's `compute_sent_metric` for each request; without `metric_kwargs`, nothing.

    Args:
        easyedit: EasyEdit.
        model: The model, which edits change in place.
        tokenizer: Its tokenizer.
        hparams: The hyper-parameters, which EasyEdit's function takes.
        device: Where token ids go.
        unedited: Makes the context manager in which `model` is without its edits.
        metric_kwargs: EasyEdit's, one a request.
        n_requests: How many requests there are.

    Raises:
        LocFTError: They cannot be computed.
    """

    def __init__(
        self,
        easyedit: EasyEdit,
        model: Any,
        tokenizer: Any,
        hparams: Any,
        device: Any,
        unedited: Callable[[], AbstractContextManager[Any]],
        metric_kwargs: Sequence[Mapping[str, Any]] | None,
        n_requests: int,
    ) -> None:
        self._asked = metric_kwargs
        if metric_kwargs is None:
            return
        if easyedit.is_release:
            raise LocFTError(
                "`metric_kwargs`: ConvSent's metrics need the current EasyEdit; this is the PyPI "
                "release. Set EASYEDIT_HOME to a clone, or leave it out."
            )
        if len(metric_kwargs) != n_requests:
            raise RequestError(
                f"`metric_kwargs` has {len(metric_kwargs)} entries for {n_requests} requests. Give "
                "one each."
            )
        if _SEPARATOR not in tokenizer.get_vocab():
            raise ModelError(
                f"`metric_kwargs`: EasyEdit marks where ConvSent's answers begin with {_SEPARATOR},"
                " which is no token of this model. Leave it out, or use a model of Llama 2's "
                "vocabulary."
            )
        module = importlib.import_module("easyeditor.evaluate.personality_evaluate")
        self._compute: Any = module.compute_sent_metric
        self._words = word_tokenizer()
        self._base = _Unedited(model, unedited)
        self._model, self._tokenizer, self._hparams = model, tokenizer, hparams
        self._device = device

    def of(self, request: int) -> dict[str, Any]:
        """Returns what is added to a request's entry: `es`, `dd` and the edited model's fluency."""
        if self._asked is None:
            return {}
        asked = self._asked[request]
        found: dict[str, Any] = self._compute(
            self._base,
            self._model,
            "llama",  # it knows others, but takes none by their name
            self._hparams,
            self._tokenizer,
            metric_kwargs=asked,
            device=self._device,
            test_generation=False,
        )
        question = asked["inner_q"]
        prompt = question[0] if isinstance(question, list) else question
        found["fluency"] = fluency_of(
            self._model, self._tokenizer, [{"prompt": prompt}], words=self._words
        )[0]
        return found
