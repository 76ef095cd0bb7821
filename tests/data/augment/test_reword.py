"""Rewordings: made from the prompt alone, the same for every list, and without the answer."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers.toys import REPOSITORY, toy_requests
from hypothesis import given, settings
from hypothesis import strategies as st

from locft_easyedit.data.augment import reword as wordings
from locft_easyedit.data.augment import templates as frames
from locft_easyedit.data.augment.grammar import SLOT
from locft_easyedit.data.augment.reword import MOST, holds, reword_edits
from locft_easyedit.data.requests import Edit, distinct_edits
from locft_easyedit.locate import held_out


def pool(prompt, subject=None, target="Zzyzx", seeds=20):
    """Returns every rewording that some seed gives."""
    edits = [Edit(prompt, target, 0)]
    return {
        text
        for seed in range(seeds)
        for text in reword_edits(edits, [subject], seed=seed).prompts[0]
    }


def squeezed(text):
    return " ".join(text.casefold().split())


@pytest.mark.parametrize(
    ("prompt", "rewordings"),
    [
        ("The mother tongue of {} is", ["{}'s mother tongue is", "What is {}'s mother tongue?"]),
        ("{}'s mother tongue is", ["The mother tongue of {} is", "{} is a native speaker of"]),
        ("{}'s shoe size is", ["The shoe size of {} is", "What is the shoe size of {}?"]),
        ("{}, which is located in", ["{} is located in", "{} lies in"]),
        ("{}, whose seat is in", ["{}'s seat is in", "The seat of {} is in"]),
        ("{}, created by", ["{} was created by", "The creator of {} is"]),
        ("{}, a citizen of", ["{} is a citizen of"]),
        ("What does {} play? They play", ["{} plays"]),
        ("What is the twin city of {}? It is", ["The twin city of {} is"]),
        ("The name of the child of {} is", ["The child of {} is", "Who is {}'s child?"]),
        ("{} is located in", ["{}, which is located in"]),
        ("Who is the mother of {}?", ["The mother of {} is", "Who is {}'s mother?"]),
        ("The director of {} is who?", ["Who is the director of {}?", "{}'s director is"]),
        ("What is the name of the publisher of {}?", ["The publisher of {} is"]),
        ("Who directed the film {}?", ["The film {} was directed by"]),
        ("Who wrote {}?", ["{} was written by", "By whom was {} written?"]),
        ("The film {} was directed by who?", ["Who directed the film {}?"]),
        ("Which company produced {}?", ["What company produced {}?", "{} was produced by"]),
        ("What company makes {}?", ["{} is made by the company"]),
        ("In what year did {} die?", ["What year did {} die?", "{} died in"]),
        ("What airport does {} operate in?", ["In which airport does {} operate?"]),
        ("Which state is {} located?", ["{} is located in", "In what state is {} located?"]),
        ("In what city was {} born in?", ["{} was born in", "Which city was {} born in?"]),
        ("To which fictional work does {} appear in?", ["{} appears in"]),
        ("What university did {} attend?", ["The university that {} attended was"]),
        ("Where is {}?", ["{} is in"]),
        ("When was {} born?", ["What is the date when {} was born?"]),
        ("What is {}?", ["What's {}?", "What is {}"]),
        ("What is the university where {} went?", ["The university where {} went is"]),
        ("Which position was held by {}?", ["The position that {} held was"]),
    ],
)
def test_rules_of_grammar(prompt, rewordings):
    name = "Lo van der Ruba"
    found = pool(prompt.format(name), name)
    assert {text.format(name) for text in rewordings} <= found


@pytest.mark.parametrize(
    ("prompt", "never"),
    [
        # A verb that the rules do not know, a clause that no name follows, a question in a phrase.
        ("What year did Kilo flummox?", "flummox(ed|s)"),
        ("What is the universe that Kilo exists in?", "is exists|that that|by the is"),
        ("What year was the end of Kilo?", "was was"),
        ("Where did Kilo study or work?", "studied or work "),
        ("What is the name of the director of Kilo?", "'s name of"),
        ("What type of ship is Kilo classified as?", "the type"),
        ("Which city did Kilo live when she died?", "died in|that Kilo lived"),
    ],
)
def test_leaves_what_it_cannot_parse(prompt, never):
    assert not [text for text in pool(prompt, "Kilo") if re.search(never, text)]


def test_a_subject_keeps_its_letters():
    for subject in ("The Who", "is", "What is It", "iPhone", "X's  mother", "the A (of B)?"):
        for prompt in ("Who is the mother of {}?", "{} is located in", "{}, which is in"):
            for text in pool(prompt.format(subject), subject, seeds=5):
                assert subject in text


def test_a_subject_written_otherwise_keeps_the_letters_of_the_prompt():
    assert "kilo ruba's mother is" in pool("The mother of kilo ruba is", "Kilo Ruba")


def test_the_slot_s_own_character_is_kept():
    for prompt in ("The mother of \ue000 is", "The \ue000 of Kilo is", "What is \ue000 to Kilo?"):
        found = pool(prompt, "Kilo" if "Kilo" in prompt else None)
        assert found
        assert all("\ue000" in text for text in found)


def test_names_are_found_without_a_subject():
    assert "Lo Ruba's mother tongue is" in pool("The mother tongue of Lo Ruba is")
    assert "The mother tongue of Lo of Ruba is" in pool("Lo of Ruba's mother tongue is", "Kilo")
    assert pool("what comes after rain is")
    assert "Note that Éire is in" in pool("Éire is in", seeds=60)  # no letter made small
    # No rule can tell what "what" stands for where nothing is known to be a name.
    assert "Which comes after rain?" not in pool("What comes after rain?")


def test_questions_and_statements_have_frames_of_their_own():
    asked, told = pool("Who sings?", seeds=50), pool("the choir sings", seeds=50)
    assert "Q: Who sings?\nA:" in asked
    assert "Can you tell me, who sings?" in asked
    assert "It is well known that the choir sings" in told
    assert "Fact: the choir sings" in told
    mixed = pool("Who sings? It is", seeds=50)
    assert "Fact: Who sings? It is" in mixed
    assert not any(" that " in text for text in mixed)


@st.composite
def edits_with_subjects(draw):
    words = st.sampled_from(
        # A target may be a word of a frame or of a context, and a subject may hold markup.
        (
            *("Kilo", "Lo", "ba", "The", "the", "of", "is", "What", "a", "fact", "answer"),
            *("coffee", "Q:", "in,", "shop's", "told", "\ue000", "{}", "é"),
        )
    )
    edits, subjects = [], []
    for i in range(draw(st.integers(1, 4))):
        subject = " ".join(draw(st.lists(words, min_size=1, max_size=3)))
        frame = draw(
            st.sampled_from(
                [
                    "Who is the mother of @?",
                    "The mother tongue of @ is",
                    "@, which is located in",
                    "What year did @ die?",
                    "@ and @ speak ",
                    " in @,\nthey speak",
                    "What @",
                ]
            )
            | st.text(max_size=12).map(lambda text: text + "@" + text)
        )
        target = draw(words | st.text(min_size=1, max_size=3))
        edits.append(Edit(frame.replace("@", subject), target, i))
        subjects.append(draw(st.sampled_from([subject, subject, None])))
    return edits, subjects


@settings(max_examples=150, deadline=None)
@given(edits_with_subjects(), st.integers(0, 3))
def test_rewordings_of_any_edits(case, seed):
    edits, subjects = case
    found = reword_edits(edits, subjects, seed=seed)
    for edit, subject, prompts in zip(edits, subjects, found.prompts, strict=True):
        assert len(set(prompts)) == len(prompts) <= MOST
        assert edit.prompt not in prompts
        target = edit.target.strip().casefold()
        pattern = rf"(?<!\w){re.escape(target)}(?!\w)"
        for text in prompts:
            assert text.strip()
            if subject:
                assert subject in text
            if target and not re.search(pattern, edit.prompt.casefold()):
                assert not re.search(pattern, text.casefold())
    backwards = reword_edits(edits[::-1], subjects[::-1], seed=seed)
    assert backwards.prompts == found.prompts[::-1]
    assert backwards.summary() == found.summary()
    assert reword_edits(edits[:1], subjects[:1], seed=seed).prompts == found.prompts[:1]


def test_same_in_another_process_and_other_for_another_seed():
    prompts = [request["prompt"] for request in toy_requests(12)]
    edits = [Edit(prompt, "Oslo", i) for i, prompt in enumerate(prompts)]
    found = reword_edits(edits, [None] * 12, seed=1).prompts
    program = (
        "import json, sys\n"
        "from locft_easyedit.data.augment.reword import reword_edits\n"
        "from locft_easyedit.data.requests import Edit\n"
        "prompts = json.load(sys.stdin)\n"
        "edits = [Edit(p, 'Oslo', 0) for p in prompts]\n"
        "print(json.dumps(reword_edits(edits, [None] * 12, seed=1).prompts))"
    )
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPOSITORY)}
    output = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    ).stdout
    assert json.loads(output) == found
    assert reword_edits(edits, [None] * 12, seed=2).prompts != found


def test_nothing_in_common_with_the_templates_that_places_are_chosen_with():
    def bare(frame):
        return squeezed(re.sub(r"\{\w+\}", "@", frame))

    theirs = {bare(f) for f in held_out._QUESTION_FRAMES + held_out._STATEMENT_FRAMES}
    ours = frames.QUESTION_FRAMES + frames.CLAUSE_FRAMES + frames.STATEMENT_FRAMES
    assert not theirs & {bare(frame) for frame in ours}
    assert not theirs & {bare(f"{context} @") for context in frames.CONTEXTS}
    for prompt in ("Who is the mother of Kilo?", "The mother tongue of Kilo is", "Kilo, in"):
        chosen_with = {squeezed(text) for text in held_out.reword(prompt)}
        assert not chosen_with & {squeezed(text) for text in pool(prompt, "Kilo", seeds=60)}


def test_frames_are_many_and_hold_one_prompt():
    assert len(set(frames.CONTEXTS)) == len(frames.CONTEXTS) >= 12
    for frame in frames.QUESTION_FRAMES + frames.CLAUSE_FRAMES + frames.STATEMENT_FRAMES:
        assert len(re.findall(r"\{(?:prompt|small)\}", frame)) == 1
        assert frame == frame.strip()


def test_contexts_that_speak_of_the_edit_are_skipped():
    word = "bicycle"
    assert any(word in text for text in pool("Kilo is in", "Kilo", seeds=200))
    for subject, target in (("Kilo", word), (word, "Zzyzx")):
        found = pool(f"{subject} is in", subject, target=target, seeds=200)
        assert any(text.startswith(frames.CONTEXTS) for text in found)
        assert not any(re.search(rf"\b{word}\b", text.replace(subject, "")) for text in found)


def test_counts_what_holds_the_target():
    edits = [Edit(f"Who wrote Kilo {i}?", "Written", i) for i in range(20)]
    found = reword_edits(edits, [None] * 20, seed=0)
    assert found.n_with_target == found.summary()["dropped_with_target"] > 0
    assert not any("written" in text for prompts in found.prompts for text in prompts)
    harmless = [Edit(edit.prompt, "writte", edit.request) for edit in edits]
    found = reword_edits(harmless, [None] * 20, seed=0)
    assert found.n_with_target == 0
    assert any("written" in text for prompts in found.prompts for text in prompts)
    # What the prompt itself says may be said again.
    known = [Edit(f"Who wrote the unwritten, written Kilo {i}?", "written", i) for i in range(20)]
    found = reword_edits(known, [None] * 20, seed=0)
    assert found.n_with_target == 0
    assert any("written" in text for prompts in found.prompts for text in prompts)


def test_counts_what_lost_the_subject(monkeypatch):
    monkeypatch.setattr(wordings, "statements", lambda masked: ["It is in", f"{SLOT} lies in"])
    wordings._paraphrases.cache_clear()
    edits = [Edit("Kilo is in", "Oslo", 0), Edit("Lo is in", "Oslo", 1)]
    found = reword_edits(edits, ["Kilo", "Another"], seed=0)
    assert found.n_without_subject == found.summary()["dropped_without_subject"] == 1
    assert "It is in" not in found.prompts[0]
    assert "Kilo lies in" in found.prompts[0]
    assert "It is in" in found.prompts[1]  # whose subject the prompt itself does not name
    wordings._paraphrases.cache_clear()


@pytest.mark.parametrize(
    ("text", "target", "held"),
    [
        ("in oslo.", "oslo", True),
        ("osloers of oslo", "oslo", True),
        ("osloers", "oslo", False),
        ("an oslo_", "oslo", False),
        ("c++ is", "c++", True),
        ("c++x", "c++", False),
        ("anything", "", False),
    ],
)
def test_whole_words(text, target, held):
    assert holds(text, target) is held


def test_summary():
    edits = distinct_edits(toy_requests(8)).edits
    found = reword_edits(edits, [None] * 8, seed=0)
    assert json.loads(json.dumps(found.summary())) == {
        "edits": 8,
        "rewordings": sum(len(prompts) for prompts in found.prompts),
        "fewest": MOST,
        "most": MOST,
        "edits_without": 0,
        "dropped_with_target": found.n_with_target,
        "dropped_without_subject": 0,
    }
    assert reword_edits([], [], seed=0).summary()["edits"] == 0


@pytest.mark.parametrize(
    ("name", "prompt", "target"),
    [
        ("zsre_1k", "src", "alt"),
        ("counterfact_1k", "prompt", "target_new"),
        ("wikidata_counterfact_400", "prompt", "target_new"),
    ],
)
def test_real_prompts(shared_data, name, prompt, target):
    records = json.loads((shared_data / f"{name}.json").read_text())
    edits = [Edit(record[prompt], record[target], i) for i, record in enumerate(records)]
    subjects = [record["subject"] for record in records]
    found = reword_edits(edits, subjects, seed=0)
    assert {len(prompts) for prompts in found.prompts} == {MOST}
    # Frames, contexts and changes of the surface leave the words of the prompt in their order;
    # a paraphrase does not. On these files 95, 99 and 100 % of the edits have one.
    paraphrased = 0
    for edit, prompts in zip(edits, found.prompts, strict=True):
        words = squeezed(edit.prompt).rstrip("?,")
        paraphrased += not all(words in squeezed(text) for text in prompts)
    assert paraphrased > 0.9 * len(edits)
