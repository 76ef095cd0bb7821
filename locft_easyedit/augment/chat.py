"""A prompt as a user's message, in the chat form of the model."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# Templates that name the day take it from this variable, or else from the clock: a training that
# goes on tomorrow must find today's texts.
_DAY = "26 Jul 2024"


@dataclass(frozen=True)
class ChatForm:
    """The chat form of prompts.

    Attributes:
        tokenizer: A tokenizer with a chat template.
        first: The text of the token that the tokenizer itself puts before every text, or "".
    """

    tokenizer: PreTrainedTokenizerBase
    first: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatForm | None:
        """Returns the chat form of a tokenizer, or `None` if it has no template that works."""
        if not getattr(tokenizer, "chat_template", None):
            return None
        bos = tokenizer.bos_token
        adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        # Chat templates write this token too, and with both the model would read it twice. Where
        # only the template writes it (SmolLM2's `<|im_start|>`), it belongs to the message.
        form = cls(tokenizer, bos if bos and adds_bos else "")
        return form if "What is it?" in "".join(form.of_prompt("What is it?")) else None

    def of_prompt(self, prompt: str) -> list[str]:
        """Returns the prompt as a user's message up to where the answer begins; none if it fails.

        Args:
            prompt: The message.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                date_string=_DAY,
            )
        except Exception:  # templates are programs of their authors and raise what they like
            return []
        return [str(text).removeprefix(self.first)]
