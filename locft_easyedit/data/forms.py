"""The forms in which a prompt is asked: plain, in the model's chat template, in a wrapper.

An edit that is trained in its plain prompt holds there, and hardly where the same is asked in a
chat. A form puts the prompt where a model would meet it; the fact stays as the request has it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ModelError
from ..hparams_rules import CHAT, CONTEXT, PLAIN, QUESTION_ANSWER
from .requests import with_leading_space
from .tokenization import Asked

# No names, numbers or facts: nothing that an answer could lean on.
CONTEXTS = (
    "The coffee had gone cold.",
    "She closed the window and sat down again.",
    "We walked home slowly. Nobody was in a hurry.",
    "The shop opens again after lunch.",
    "He put the letter back into the drawer.",
    "There was a long pause. Then the talk went on.",
    "The children were playing outside.",
    "It had been a quiet week.",
    "The kitchen smelled of fresh bread.",
    "Somebody had left the lights on. The room was empty.",
    "They waited for the bus and talked.",
    "The wind had dropped by the evening.",
    "A dog barked somewhere down the street.",
    "The meeting took longer than planned.",
    "I found my glasses under the chair. They were not broken.",
    "Her bicycle needs a new chain.",
)
_ANSWER_MARK = "Zebra"  # a text that templates leave as it is, to find where the answer stands


@dataclass(frozen=True)
class Turn:
    """An earlier question of a conversation and its answer."""

    question: str
    answer: str


class ChatTemplate:
    """A tokenizer's chat template, asked without thinking.

    Args:
        tokenizer: A tokenizer with a chat template.

    Attributes:
        end_of_turn: The token that ends an answer.
        lead: White space that the template puts before an answer.

    Raises:
        ModelError: There is no template, or it cannot be rendered with a question and an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "The tokenizer has no chat template. Give one in `tokenizer.chat_template`, or "
                f"leave `{CHAT}` out of `forms`."
            )
        question = [{"role": "user", "content": _ANSWER_MARK}]
        answered = self._rendered([*question, {"role": "assistant", "content": _ANSWER_MARK}])
        before, mark, after = answered.rpartition(_ANSWER_MARK)
        asked = self.ask(_ANSWER_MARK)
        if not mark or _ANSWER_MARK not in before or _ANSWER_MARK not in asked:
            raise ModelError(
                "The tokenizer's chat template leaves out the question or the answer. Correct "
                f"`tokenizer.chat_template`, or leave `{CHAT}` out of `forms`."
            )
        lead = before[len(asked) :] if before.startswith(asked) else ""
        self.lead = lead if not lead.strip() else ""
        # White space before the token that ends the turn is the template's own.
        ends = tokenizer(after.lstrip() or after, add_special_tokens=False)["input_ids"]
        end = ends[0] if ends else tokenizer.eos_token_id
        if end is None:
            raise ModelError(
                "The tokenizer's chat template ends no turn, and the tokenizer has no EOS token. "
                f"Set `tokenizer.eos_token`, or leave `{CHAT}` out of `forms`."
            )
        self.end_of_turn = int(end)

    def ask(self, question: str, *, system: str | None = None, earlier: Sequence[Turn] = ()) -> str:
        """Returns the text of a conversation up to where the answer to `question` begins.

        Its special tokens are in the text: tokenize it with `add_special_tokens=False`.

        Args:
            question: The user's last message.
            system: The system prompt; `None` leaves it to the template.
            earlier: Earlier turns, first one first.

        Raises:
            ModelError: The template does not take these roles, or fails otherwise.
        """
        messages = [] if system is None else [{"role": "system", "content": system}]
        for turn in earlier:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        messages.append({"role": "user", "content": question})
        return self._rendered(messages, add_generation_prompt=True)

    def before_question(self) -> str:
        """Returns the text of a conversation up to where the user's first message begins."""
        return self.ask(_ANSWER_MARK).partition(_ANSWER_MARK)[0]

    def _rendered(self, messages: list[dict[str, str]], **options: Any) -> str:
        try:
            # Templates without a switch for thinking ignore it.
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, enable_thinking=False, **options
            )
        except Exception as error:  # whatever a template of the model's author raises
            roles = ", ".join(message["role"] for message in messages)
            raise ModelError(
                f"The tokenizer's chat template cannot be rendered with the roles {roles}: "
                f"{type(error).__name__}: {str(error)[:200]}. Correct `tokenizer.chat_template`, "
                f"or leave `{CHAT}` out of `forms`."
            ) from error
        return str(text)


class Forms:
    """The forms that edits are trained in.

    Args:
        tokenizer: The model's tokenizer.
        names: Some of `FORMS` but `plain`.
        seed: Seed of which sentence stands before which prompt.

    Attributes:
        names: Those beside the plain one.
        chat: The chat template; `None` without the form `chat`.

    Raises:
        ModelError: `chat` is named, and the tokenizer has no template that can be rendered.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], seed: int = 0
    ) -> None:
        self.names = tuple(names)
        self._seed = seed
        self.chat = ChatTemplate(tokenizer) if CHAT in names else None

    def all_of(self, prompt: str, target: str, number: int = 0) -> list[Asked]:
        """Returns a prompt in all forms, the plain one first; see `ask`."""
        return [self.ask(form, prompt, target, number) for form in (PLAIN, *self.names)]

    def ask(self, form: str, prompt: str, target: str, number: int = 0) -> Asked:
        """Returns a prompt in a form, with what the model is to answer.

        Args:
            form: One of `names`, or `plain`.
            prompt: The prompt.
            target: The answer.
            number: The edit's number, on which the sentence before the prompt depends.
        """
        if form == CHAT:
            assert self.chat is not None
            text = self.chat.ask(prompt.strip()) + self.chat.lead
            return Asked(text, target.lstrip(), special_tokens=False, end=self.chat.end_of_turn)
        if form == QUESTION_ANSWER:
            prompt = f"Question: {prompt.strip()}\nAnswer:"
        elif form == CONTEXT:
            draw = random.Random(f"{self._seed} {number}")
            prompt = f"{draw.choice(CONTEXTS)} {prompt.lstrip()}"
        else:
            assert form == PLAIN, form
        return Asked(prompt, with_leading_space(target))
