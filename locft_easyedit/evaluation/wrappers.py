"""The wrappers in which edits are asked besides their plain prompt: fixed, few, and listed here.

| wrapper | what the model reads | an answer counts if it |
| --- | --- | --- |
| `please` | `Please answer the question: Q: PROMPT A:` | is the target |
| `sentence` | the prompt after a sentence that has nothing to do with it | is the target |
| `quoted` | a dialogue in which a colleague says the prompt | contains the target |
| `chat` | the chat template with the prompt as the first message | is the target |
| `chat_system` | the same with a system prompt of another kind | is the target |
| `chat_later` | the prompt as a later turn of a conversation | is the target |

No edit is trained in these texts. `chat` alone is also a form that `forms` can train, since a
chat template has but one way to ask a question; `chat_system` and `chat_later` are not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..data.forms import ChatTemplate, Turn
from ..data.requests import with_leading_space
from ..data.tokenization import Asked
from ..errors import ModelError

logger = logging.getLogger(__name__)

# None of these may be among the forms and contexts of `data.forms`.
PLEASE = "Please answer the question: Q: {prompt} A:"
SENTENCE = "The library stays closed on public holidays. {prompt}"
QUOTED = 'My colleague turned around and said: "{prompt}" Without a pause I replied: "'
SYSTEM = "You work at the help desk of a large company. Answer in as few words as you can."
EARLIER = (
    Turn("Hi, do you have a minute?", "Of course. What would you like to know?"),
    Turn("How many minutes are there in two hours?", "120"),
)
CHAT = "chat"
NAMES = ("please", "sentence", "quoted", CHAT, "chat_system", "chat_later")

_CHATS: dict[str, tuple[str | None, tuple[Turn, ...]]] = {
    CHAT: (None, ()),
    "chat_system": (SYSTEM, ()),
    "chat_later": (None, EARLIER),
}


@dataclass(frozen=True)
class Wrapper:
    """A way to ask a prompt.

    Attributes:
        name: One of `NAMES`.
        frame: The text around the prompt; unused in chat.
        contains: Whether an answer counts that contains the target; else it must be the target.
        template: The chat template, for a wrapper in chat.
        system: The system prompt; `None` leaves it to the template.
        earlier: Earlier turns of the conversation.
        end: The token that ends an answer in chat; `None` is the end of sequence.
    """

    name: str
    frame: str = "{prompt}"
    contains: bool = False
    template: ChatTemplate | None = None
    system: str | None = None
    earlier: tuple[Turn, ...] = ()
    end: int | None = None

    def ask(self, prompt: str, answer: str) -> Asked:
        """Returns the text that the model reads, and the answer that is expected after it."""
        prompt, answer = prompt.strip(), answer.strip()
        if self.template is not None:
            text = self.template.ask(prompt, system=self.system, earlier=self.earlier)
            lead = self.template.lead
            if "\n" in lead:  # the model's own would end the answer before its first word
                text, lead = text + lead, ""
            # A space is left to the model: it may be one token with the word after it.
            return Asked(text, lead + answer, special_tokens=False, end=self.end)
        text = self.frame.format(prompt=prompt)
        return Asked(text, answer if text.endswith('"') else with_leading_space(answer))


def wrappers_for(tokenizer: PreTrainedTokenizerBase, names: Sequence[str] = NAMES) -> list[Wrapper]:
    """Returns the wrappers that a tokenizer can be asked in, in the order of `NAMES`.

    Without a chat template those in chat are left out. A template that does not take a system
    prompt or earlier turns, or that leaves them out of its text, is not asked with them; a warning
    says so.

    Args:
        tokenizer: A tokenizer.
        names: Those that are wanted.
    """
    plain = [
        Wrapper("please", PLEASE),
        Wrapper("sentence", SENTENCE),
        Wrapper("quoted", QUOTED, contains=True),
    ]
    return [
        wrapper for wrapper in (*plain, *_chat_wrappers(tokenizer, names)) if wrapper.name in names
    ]


def _chat_wrappers(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[Wrapper]:
    wanted = [name for name in _CHATS if name in names]
    if not wanted or not getattr(tokenizer, "chat_template", None):
        return []
    try:
        template = ChatTemplate(tokenizer)
    except ModelError:
        logger.warning(
            "Nothing is measured in chat: the tokenizer's chat template cannot be rendered with a "
            "question and an answer. Correct `tokenizer.chat_template`."
        )
        return []
    # White space may come before an answer as well as after it.
    ends = str(tokenizer.decode([template.end_of_turn])).strip()
    found, left_out = [], []
    for name in wanted:
        system, earlier = _CHATS[name]
        if template.takes(system=system, earlier=earlier):
            found.append(
                Wrapper(
                    name,
                    template=template,
                    system=system,
                    earlier=earlier,
                    end=template.end_of_turn if ends else None,
                )
            )
        else:
            left_out.append(name)
    if left_out:
        logger.warning(
            "The tokenizer's chat template does not take what these wrappers say before the "
            "question: %s. They are not measured, and no mean counts them.",
            ", ".join(left_out),
        )
    return found
