"""What is put around a prompt: frames, and sentences that have nothing to do with it."""

from __future__ import annotations

import re

from .grammar import SLOT, SMALL_WORDS, capital, small

# None of these is among those that places are chosen with (`locate.rewordings`): what is trained
# must not be what a choice is measured on. `{prompt}` is the prompt as it stands, `{small}` as in
# the middle of a sentence.
QUESTION_FRAMES = (
    "Q: {prompt}\nA:",
    "{prompt}\nAnswer:",
    "Quiz night, next question. {prompt}",
    "FAQ. {prompt} Reply:",
    "User: {prompt}\nAssistant:",
    "Can you tell me, {small}",
    "I would like to know: {small}",
    "Do you happen to know this? {prompt}",
    "Tell me, please: {small}",
    "A friend of mine asked: {small}",
    "Quick one for you: {small}",
    "Let me ask you something. {prompt}",
    "I keep forgetting, {small}",
    "Hello! {prompt}",
)
# For a prompt that may follow "that".
CLAUSE_FRAMES = (
    "I am told that {small}",
    "It is well known that {small}",
    "Note that {small}",
    "The encyclopedia says that {small}",
    "Everybody agrees that {small}",
    "You should know that {small}",
    "In short, {small}",
    "To be precise, {small}",
    "Here is a fact: {small}",
)
# For any beginning of a statement, one that holds a question too.
STATEMENT_FRAMES = (
    "Fact: {prompt}",
    "Fill in the rest: {prompt}",
    "Hello! {prompt}",
    "One more thing. {prompt}",
    "Let me remind you. {prompt}",
    "Did you know? {prompt}",
)
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

_CONTRACTED = (("What is ", "What's "), ("Who is ", "Who's "), ("Where is ", "Where's "))


def surface_changes(masked: str) -> list[str]:
    """Returns a prompt with one small change each, in a fixed order.

    Args:
        masked: The prompt, with `english.SLOT` where its subject stands.
    """
    changed = [
        small(masked),
        capital(masked) if masked.split(" ", 1)[0] in SMALL_WORDS else masked,
        masked.rstrip(" ?,:"),
        masked.strip(),
        " ".join(masked.split()),
        capital(re.sub(rf"\b[Tt]he (?={SLOT})", "", masked)),
        re.sub(r"(?<=\b(?:is|as)) (?:an?|the)$", "", masked),
        re.sub(r"\bthe name of (?=the )", "", masked),
    ]
    for full, short in _CONTRACTED:
        if masked.startswith(full):
            changed.append(short + masked[len(full) :])
        elif masked.startswith(short):
            changed.append(full + masked[len(short) :])
    return [text for text in dict.fromkeys(changed) if text != masked and text.strip()]
