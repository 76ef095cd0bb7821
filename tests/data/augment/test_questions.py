"""Questions in other words: what may replace what, and what must not."""

import re

import pytest

from locft_easyedit.data.augment.canonical import canonical
from locft_easyedit.data.augment.grammar import SLOT, finite
from locft_easyedit.data.augment.question_phrases import _rendered, _written, same_questions
from locft_easyedit.data.augment.questions import questions
from locft_easyedit.data.augment.reword import reword_edits
from locft_easyedit.data.requests import Edit


def reworded(question):
    """Returns all other wordings of a question about X."""
    return {text.replace(SLOT, "X") for text in questions(question.replace("X", SLOT))}


def what(text):
    """Of "which" and "what" there is only one, as they are no news beside each other."""
    return text.casefold().replace("which", "what")


@pytest.mark.parametrize(
    ("question", "others"),
    [
        ("Who was responsible for directing X?", ["Who directed X?", "X was directed by"]),
        ("Who directed the film X?", ["Who was the director of the film X?"]),
        ("Which river system contains X?", ["What river system is X in?"]),
        ("What series is X from?", ["What series does X come from?"]),
        ("What noble title does X hold?", ["What noble title does X have?"]),
        ("What continent is X on?", ["X is located on the continent of", "X's continent is"]),
        ("On which continent is X?", ["What is the name of the continent X is on?"]),
        ("Who created X?", ["Who was the creator of X?", "Which person created X?"]),
        ("Who is the architect of X?", ["Who designed X?"]),
        ("What is the native language of X?", ["What is X's native tongue?"]),
        ("Who manufactured X?", ["What company makes X?", "X was manufactured by"]),
        ("What was the cause of death of X?", ["What did X die of?", "What killed X?"]),
        ("What position does X play?", ["What is the playing position of X?"]),
        ("What position did X play?", ["What was the playing position of X?", "X played as"]),
        ("What team does X play for?", ["What club does X play for?", "X plays for"]),
        ("What is the gender of X?", ["What is the sex of X?", "Is X male or female?"]),
        ("Was X male or female?", ["What was the gender of X?"]),
        ("The college X attended was what?", ["X studied at", "What college did X attend?"]),
        ("On what date did X occur?", ["When did X occur?", "When did X take place?"]),
        ("What year did X die?", ["When did X die?", "In what year did X pass away?"]),
        ("What year was it when X was dissolved?", ["When was X dissolved?"]),
        ("What city was X born?", ["Where was X born?", "What was the city of birth of X?"]),
        ("On what date did X flow?", ["When did X flow?"]),
        ("What is the language X is written in?", ["What language is X written in?"]),
        ("Who is listed as X father?", ["Who fathered X?", "X's father is"]),
        ("What was the name of X mother?", ["Who gave birth to X?"]),
        (
            "The star X is part of the constellation known as what?",
            ["Which constellation is the star X in?"],
        ),
        ("What is the constellation that is made with X?", ["What constellation is X in?"]),
        ("In which year X ceased to exist?", ["When did X cease to exist?"]),
        ("Player X played for which team?", ["What club did player X play for?"]),
        ("What was the launch date of X?", ["When was X launched?"]),
        ("The X's architect was who?", ["Who designed the X?"]),
        ("What is the company which distributed X?", ["Who was X distributed by?"]),
        ("In what living being can X be found?", ["In what organism is X found?", "X is found in"]),
        ("Due to which disease did X die?", ["What disease killed X?"]),
        ("The death of X occured on what date?", ["On what date did X die?"]),
        ("What military branch did X serve in?", ["X served in the"]),
        ("What is the religion of X?", ["What religion does X follow?", "X is a follower of"]),
    ],
)
def test_other_words_for_the_same_question(question, others):
    assert {what(text) for text in others} <= {what(text) for text in reworded(question)}


@pytest.mark.parametrize(
    ("question", "never"),
    [
        # An answer may have a day or none, and be a place of any size.
        ("When did X die?", "year|[Oo]n (?:what|which)"),
        ("When was X founded?", "year|[Oo]n (?:what|which)"),
        ("What year did X die?", "date|day"),
        ("Where was X born?", "city|town|country|state"),
        # What was founded was created, not the other way round; a country is no nationality.
        ("In what year was X created?", "found|establish"),
        ("What is X's country of citizenship?", "nationality"),
        ("What is the nationality of X?", "citizen|country"),
        ("Who designed X?", "architect"),
        ("What company produced X?", "production company"),
        # No English.
        ("What is the language X is written in?", "is is"),
        ("What year was it when X was dissolved?", "that was it"),
        ("What constellation is where X is?", "is is"),
        ("What was the date of the opening of X?", "'s date of the"),
        ("Which historic war did X participate?", "participated the|participated was"),
        ("Who is the mother of X?", "As for| is who"),
        ("Which species has the X gene?", "[Tt]he the|(?<![Tt]he )X gene"),
        ("The X was named for whom?", "[Tt]he the|(?<![Tt]he )X"),
        ("What is the constellation that is made with X?", "is the is|The is"),
        ("The star X is part of the constellation known as what?", "known as\\?"),
        ("When is the date of birth of X?", "date of the date"),
        ("In what living being can X be found?", "was"),
        ("The death of X occurred on what date?", "death of did|death of that"),
        ("The death of X was caused by what?", "by the death"),
        # What may be asked of other things than of those that a line is about.
        ("Who shot X?", "cinematographer"),
        ("What order does X belong to?", "religious"),
        ("Who drafted X?", "club|team"),
        ("What rank did X have?", "military"),
        ("What was the point in time of X?", "[Oo]n (?:what|which) date"),
    ],
)
def test_never_another_question(question, never):
    assert not [text for text in reworded(question) if re.search(never, text)]


@pytest.mark.parametrize(
    "noun",
    ["killer", "murderer", "successor", "predecessor", "coach", "screenwriter", "cinematographer",
     "director", "child"],
)  # fmt: skip
def test_one_asks_who_a_person_is(noun):
    others = reworded(f"X's {noun} was who?") | reworded(f"Who was the {noun} of X?")
    assert others
    assert not [text for text in others if re.match(rf"Wh(?:at|ich) (?:is|was) the {noun}", text)]


def test_forms_of_a_family_lead_to_each_other():
    for line in _written():
        asked = [text for text in line if text.endswith("?") and text[0] not in "<>"]
        asked = [_rendered(text, None).replace(SLOT, "X") for text in asked]
        keys = {canonical(text.replace("X", SLOT)).key for text in asked}
        for one in asked:
            found = {canonical(text.replace("X", SLOT)).key for text in reworded(one)}
            assert keys <= found | {canonical(one.replace("X", SLOT)).key}, one


def test_the_table_is_well_formed():
    for line in _written():
        for form in line:
            if not form.lstrip("<>").startswith("@"):
                assert re.search(r"\bX\b", form), form
            verbs = set(re.findall(r"\b([a-z]+)~", form.lower())) - {"is", "do", "has"}
            assert all(finite("did", verb) for verb in verbs), form


def test_forms_have_a_subject_and_no_marks():
    for question in ("Who directed X?", "What language does X speak?", "In what year did X end?"):
        for text in same_questions(question.replace("X", SLOT)):
            assert SLOT in text
            assert not re.search(r"[~<>@|]|\bX\b", text)
            assert text[0] == text[0].upper()


@pytest.mark.parametrize(
    ("question", "key", "is_past"),
    [
        ("In which war did X fight?", "what war does X fight in", True),
        ("The war that X fought in was what?", "what war does X fight in", True),
        ("What was the name of X's home stadium?", "what is the home stadium of X", True),
        ("The mother of X is whom?", "what is the mother of X", False),
        ("The star X is part of what constellation?", "what constellation is X part of", False),
        ("By whom was X discovered?", "who is X discovered by", True),
        ("What is the state where X is located?", "what state is X located in", False),
        ("What is the university where X went?", "what university does X go to", False),
        ("The year X died was what?", "what year does X die", True),
        ("In what year was X born in?", "what year is X born", True),
        ("Which is the family of X?", "what is the family of X", False),
    ],
)
def test_one_form_for_many(question, key, is_past):
    found = canonical(question.replace("X", SLOT))
    assert (found.key.replace(SLOT, "X"), found.is_past) == (key, is_past)


def test_a_question_in_parentheses_is_no_part_of_a_name():
    edit = Edit("Who wrote Dune (and in which year)?", "Ann Smith in 1999", 0)
    [texts] = reword_edits([edit], ["Dune"], seed=0).prompts
    assert not [text for text in texts if "(and in which year) was" in text]


def test_what_tells_a_name_from_others_stays_with_it():
    edit = Edit("In which war did USS Bermuda (1861) fight?", "World War I", 0)
    [texts] = reword_edits([edit], ["USS Bermuda"], seed=0).prompts
    assert any("USS Bermuda (1861) fought in" in text for text in texts)
    assert all("USS Bermuda (1861)" in text for text in texts)


def test_subjects_stay_and_targets_stay_out():
    prompts = ["Who directed {}?", "What is the gender of {}?", "What year was {} founded?"]
    subjects = ["The Who", "X", "what is it", "X's (born in) Y", "the year"]
    edits, named = [], []
    for i, prompt in enumerate(prompts):
        for subject in subjects:
            edits.append(Edit(prompt.format(subject), "male", i))
            named.append(subject)
    for seed in range(10):
        for subject, prompts in zip(
            named, reword_edits(edits, named, seed=seed).prompts, strict=True
        ):
            assert prompts
            assert all(subject in text for text in prompts)
            assert not any("male or female" in text for text in prompts)


@pytest.mark.parametrize(
    ("question", "n_at_least"),
    [
        ("Who directed X?", 8),
        ("In what year was X founded?", 15),
        ("What family does X belong to?", 10),
        ("Which company flummoxed X?", 5),  # which no family holds
    ],
)
def test_number_of_wordings(question, n_at_least):
    assert len(reworded(question)) >= n_at_least
