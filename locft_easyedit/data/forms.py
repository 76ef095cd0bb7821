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
from ..hparams_rules import CHAT, CONTEXT, QUESTION_ANSWER
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

    def takes(self, *, system: str | None, earlier: Sequence[Turn]) -> bool:
        """Returns whether all that is said before a question stands in the template's text."""
        try:
            text = self.ask(_ANSWER_MARK, system=system, earlier=earlier)
        except ModelError:
            return False
        said = [text for turn in earlier for text in (turn.question, turn.answer)]
        return all(part in text for part in (*said, system or "", _ANSWER_MARK))

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


@dataclass(frozen=True)
class Way:
    """One of the forms.

    Attributes:
        chat: The prompt stands in the chat template.
        question: It is a question with an answer to come.
        before: How many unrelated sentences stand before it.
        system: One of them is the system prompt.
        earlier: Two of them are an earlier turn of the conversation.
    """

    chat: bool = False
    question: bool = False
    before: int = 0
    system: bool = False
    earlier: bool = False


def ways_of(names: Sequence[str]) -> list[Way]:
    """Returns the forms that names stand for, the plain prompt first; see `Forms`."""
    ways = [Way()]
    if CHAT in names:
        ways.append(Way(chat=True))
    if QUESTION_ANSWER in names:
        ways.append(Way(question=True))
    if CONTEXT in names:
        ways += [Way(before=1), Way(before=2)]
        if QUESTION_ANSWER in names:
            ways.append(Way(before=1, question=True))
        if CHAT in names:
            ways += [Way(chat=True, system=True), Way(chat=True, earlier=True)]
    return ways


class Forms:
    """The forms that edits are trained in.

    | named | texts beside the plain prompt |
    | --- | --- |
    | `chat` | the prompt in the chat template |
    | `question_answer` | `Question: PROMPT`, and `Answer:` on the next line |
    | `context` | the prompt after an unrelated sentence, and after two; the question after one |
    | `chat` and `context` | in chat, an unrelated system prompt or an unrelated earlier turn |

    Which sentences stand before which prompt depends on the edit's number alone: what is measured
    of a model's own prompts in these forms serves every seed.

    Args:
        tokenizer: The model's tokenizer.
        names: Some of `FORMS` but `plain`.

    Attributes:
        names: Those beside the plain one.
        chat: The chat template; `None` without the form `chat`.

    Raises:
        ModelError: `chat` is named, and the tokenizer has no template that can be rendered.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.chat = ChatTemplate(tokenizer) if CHAT in names else None
        self._ways = [way for way in ways_of(names) if self._takes(way)]

    def __len__(self) -> int:
        """Returns the number of texts of a prompt, the plain one included."""
        return len(self._ways)

    def all_of(self, prompt: str, target: str, number: int = 0) -> list[Asked]:
        """Returns a prompt in all forms, the plain one first; see `ask`."""
        return [self.ask(nth, prompt, target, number) for nth in range(len(self))]

    def ask(self, nth: int, prompt: str, target: str, number: int = 0) -> Asked:
        """Returns a prompt in a form, with what the model is to answer.

        Args:
            nth: Which form, below `len(self)`; 0 is the plain one.
            prompt: The prompt.
            target: The answer.
            number: The edit's number, on which the sentences around the prompt depend.
        """
        way = self._ways[nth]
        if nth == 0:
            return Asked(prompt, with_leading_space(target))
        drawn = random.Random(f"{number} {nth}").sample(CONTEXTS, 2)
        text = prompt.strip()
        if way.chat:
            assert self.chat is not None
            text = self._conversation(way, text, drawn) + self.chat.lead
            return Asked(text, target.lstrip(), special_tokens=False, end=self.chat.end_of_turn)
        if way.question:
            text = f"Question: {text}\nAnswer:"
        return Asked(" ".join([*drawn[: way.before], text]), with_leading_space(target))

    def _conversation(self, way: Way, prompt: str, sentences: Sequence[str]) -> str:
        assert self.chat is not None
        return self.chat.ask(prompt, **_around(way, sentences))

    def _takes(self, way: Way) -> bool:
        """Returns whether a form can be asked: not all templates take what it says in chat."""
        return self.chat is None or self.chat.takes(**_around(way, CONTEXTS))


def _around(way: Way, sentences: Sequence[str]) -> dict[str, Any]:
    """Returns what is said in a conversation before the prompt, as `ChatTemplate.ask` takes it."""
    return {
        "system": sentences[0] if way.system else None,
        "earlier": [Turn(*sentences[:2])] if way.earlier else [],
    }
