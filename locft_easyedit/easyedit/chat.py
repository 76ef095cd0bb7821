"""Chat answers to a request's prompts, as EasyEdit's `generate_edit` collects them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import ModelError
from ..evaluation.fluency import fluency_of
from ..evaluation.prompts import Metrics
from ..modeling.modes import own_precision
from ..utils.progress import progress_bar
from .measures import Measures

_MAX_NEW_TOKENS = 512


@dataclass
class ChatMeasures(Measures):
    """Chat answers to each request's prompts, in place of scores.

    Raises:
        ModelError: The tokenizer has no chat template.
    """

    scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tokenizer.chat_template:
            raise ModelError(
                "`generate_edit` asks in the model's chat format, and this tokenizer has no chat "
                "template. Use an instruct model, or `edit`."
            )

    def of(self, description: str, only: Sequence[int] | None = None) -> list[Metrics]:
        """Returns the answers for each request that was checked; see `Measures.of`."""
        show = self.progress and only is None
        records = self._asked(only)
        return [
            _answers(self, record)
            for record in progress_bar(
                records, desc=f"answers {description}", unit="record", show=show
            )
        ]


def _answers(measures: Measures, record: Mapping[str, Any]) -> dict[str, Any]:
    results: dict[str, Any] = {"rewrite_ans": _ask(measures, record["prompt"])}
    if record.get("rephrase_prompt") is not None:
        results["rephrase_ans"] = _ask(measures, record["rephrase_prompt"])
    for part, name in (("locality", "loc_hop"), ("portability", "por_hop")):
        prompts = record.get(part, {}).get(name, {}).get("prompt", [])
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if prompts:
            results[f"{part}_ans"] = [_ask(measures, prompt) for prompt in prompts]
    if measures.words is not None:
        results["fluency"] = fluency_of(
            measures.model, measures.tokenizer, [record], words=measures.words
        )[0]
    return results


@torch.no_grad()
@own_precision()
def _ask(measures: Measures, question: str) -> str:
    tokenizer = measures.tokenizer
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": question},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # EasyEdit tokenizes the finished text once more, special tokens included.
    ids = torch.tensor([tokenizer.encode(text)], device=measures.device)
    output = measures.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_MAX_NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
    )
    answer: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return answer
