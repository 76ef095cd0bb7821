"""Other wordings of a prompt, made by template: what a choice may look at of generalization.

The rewordings that come with the data are for the evaluation; a place that was chosen with their
help would be measured on what it was chosen for.
"""

from __future__ import annotations

# Begin so in the middle of a sentence; anything else may be a name.
_SMALL_WORDS = (
    "a an the in on at of by for from what which who whom whose where when why how was is are were "
    "do does did can could has have had to it its"
)
_QUESTION_FRAMES = (
    "Question: {prompt} Answer:",
    "Nobody in the room could tell me {lower} In the end somebody said:",
    "The train was late again. {prompt}",
    "I have a short question. {prompt} The answer is",
)
_STATEMENT_FRAMES = (
    "Complete the sentence. {prompt}",
    "As far as I know, {lower}",
    "The train was late again. {prompt}",
    "It rained all day and we stayed inside. Somebody said that {lower}",
)


def reword(prompt: str) -> list[str]:
    """Returns other wordings of a prompt, the same for every call; each still leads to its answer.

    Args:
        prompt: A question, or the beginning of a statement.
    """
    plain = prompt.strip()
    frames = _QUESTION_FRAMES if plain.endswith("?") else _STATEMENT_FRAMES
    return [frame.format(prompt=plain, lower=_within_sentence(plain)) for frame in frames]


def _within_sentence(prompt: str) -> str:
    """Returns the prompt as it stands in the middle of a sentence."""
    first = prompt.split(" ", 1)[0]
    return prompt[:1].lower() + prompt[1:] if first.lower() in _SMALL_WORDS.split() else prompt
