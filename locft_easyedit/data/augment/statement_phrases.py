"""Beginnings of statements that say the same of a subject X and take the same end."""

from __future__ import annotations

from functools import cache

from .grammar import SLOT

# Every form of a line may replace every other one. A line keeps one preposition or article before
# the answer, because the answer was given for it.
_FAMILIES = """
X is located in | X is situated in | X can be found in | X lies in | X is in | The location of X is
X is within | X lies within | X is located within | X is in
X is located in the country of | X lies in the country of | X can be found in the country of
X is located in the continent | X is on the continent of | X lies on the continent of | X is part of the continent of | X belongs to the continent of | X is a part of the continent of
X speaks | X can speak | X speaks the language | X is a speaker of | X communicates in | The language X speaks is
X spoke the language | X spoke | X was a speaker of | The language X spoke was
X is a native speaker of | X natively speaks | X grew up speaking | X's mother tongue is | X's native language is | The mother tongue of X is | The native language of X is | The first language of X is
The language of X is | X's language is | X is in the language | The original language of X is | X's original language is
The language of X was | X's language was | X was in the language | The original language of X was | X's original language was
The language used by X is | The language that X uses is | X uses the language
In X, the language spoken is | The language spoken in X is | People in X speak | In X, people speak
In X, an official language is | An official language of X is | An official language in X is | X has as an official language
The official language of X is | X's official language is | In X, the official language is
In X, they understand | People in X understand | The people of X understand
The law in X declares the language | The law of X declares the language | By law, the language of X is
The official religion of X is | X's official religion is | The state religion of X is
X writes in | X is a writer in | The language that X writes in is
X is written in | X was written in | X was originally written in
X is created by | X was created by | X was made by | X's creator is | The creator of X is
X is developed by | X was developed by | X is a product developed by | X's developer is | The developer of X is
X is produced by | X was produced by | X is made by | X is manufactured by | X is a product manufactured by | X's manufacturer is | The manufacturer of X is
X is a product of | X was a product of | X is produced by | X is made by
X is owned by | X belongs to | X's owner is | The owner of X is | X owner | X's owner
X was created in | X was first created in | X was made in | X originated in | X came into being in
X was formulated in | X was devised in | X originated in | X came into being in
X was developed in | X was first developed in | X originated in
X was founded in | X was established in | X was set up in | X was started in
X was formed in | X formed in | X was established in | X got together in
X was started in | X started in | X began in | X had its beginning in
X was created in the country of | X originated in the country of | X comes from the country of
X originated in | X has its origin in | X started out in | X first appeared in
X originates from | X originated from | X comes from | X stems from | X is from
X is from | X comes from | X is originally from | X hails from
X was from | X came from | X was originally from | X hailed from
X is native to | X was native to | X is a native of | X comes from
X premiered on | X debuted on | X was originally aired on | X first aired on | X was first shown on | X originally ran on
X premieres on | X is to debut on | X debuts on | X is to premiere on
X was released on | X came out on | X is available on
X is headquartered in | X is based in | X has its headquarters in | X's headquarters are in | The headquarters of X are in | X's head office is in | The headquarters of X is in | The headquarter of X is in | The headquarter of X is located in
X died in | X passed away in | X's life ended in | X lost their life in | X's place of death is | The place where X died is
X died at | X passed away at | X lost their life at | X expired at | X succumbed at | The place of death of X is
X died in the city of | X passed away in the city of | X's life ended in the city of
The place of death of X is | X's place of death is | X died in | X passed away in
X was born in | X's place of birth is | X's birthplace is | The birthplace of X is | The place of birth of X is
The place of burial of X is | X is buried in | X's burial place is | X was laid to rest in
X worked in | X was employed in | X used to work in | X found employment in | X took up work in | X had a job in
X worked in the city of | X was employed in the city of | X found employment in the city of
X works as | X is employed as | X earns a living as | X's profession is | X's occupation is | The profession of X is | The occupation of X is
X works as a | X is employed as a | X's profession is a | X earns a living as a | X's occupation is a
X works as an | X is employed as an | X's profession is an | X earns a living as an | X's occupation is an
X works for | X is employed by | X is an employee of | X has a job at | X's employer is | The employer of X is | The name of the employer of X is
X works in the field of | X works in the area of | X's area of work is | X's domain of work is | X's domain of activity is | X's field of work is | X specializes in | X's expertise is | The domain of work of X is | The domain of activity of X is | The field of work of X is | The name of the field of work of X is
X has a citizenship from | X holds a citizenship from | X is a citizen of | X has the citizenship of | X is a national of | The country of citizenship of X is | The name of the country of citizenship of X is
X plays the instrument | X plays the | X is a player of the | X can play the | X performs on the
X plays | X is known for playing | X likes to play | What X plays is
X performs | X is known for performing | X is known to perform | What X performs is
The genre played by X is | The genre that X plays is | X plays the genre | X plays music of the genre
X professionally plays the sport | X is a professional player of | X plays the sport of | The sport that X plays is
X plays the position | X plays in the position of | X plays as | X's position is | The position of X is | X plays in the position
X has the position of | X holds the position of | X holds the title of | X serves in the position of | The name of the position held by X is | The position held by X is | The position that X holds is
X follows the religion of | X is affiliated with the religion | X's religion is | The religion of X is | X is a follower of | X is follower of | X adheres to
X is affiliated with | X is associated with | X has an affiliation with
X is a twin city of | X is twinned with | X is a sister city of | X's twin city is | The twin city of X is
X was named for | X was named after | X is named after | X is named for | X is called after | X got its name from | X takes its name from
X is a member of | X belongs to the organization of | X is one of the members of | X belongs to
X is a part of the | X belongs to the | X is part of the | X is in the
X's capital is | X has the capital | X has as its capital | X's capital city is | The capital of X is | The capital city of X is | X has the capital city | X's capital city, | The name of the capital city of X is
X follows | X comes after | X comes directly after | What comes before X is
X is followed by | X comes before | X precedes | What comes after X is
The name of the author of X is | X was written by | The author of X is | X's author is
The name of the composer of X is | X was composed by | The composer of X is | X's composer is
The name of the director of X is | X was directed by | The director of X is | X's director is
The name of the father of X is | X's father is | The father of X is | X's father is called | X was fathered by
The name of the mother of X is | X's mother is | The mother of X is | X's mother is called
The name of the child of X is | X's child is | The child of X is | X's child is called | X is a parent of
The name of the spouse of X is | X's spouse is | The spouse of X is | X is married to
The name of the country which X is associated with is | X is associated with the country | X is associated with the country of | The country associated with X is
The name of the sports team which X is a member of is | X is a member of the sports team | X's sports team is
The name of the league which X plays in is | X plays in the league | X's league is
The name of the award X won is | X won the award | The award won by X is | X was awarded
The gender of X is | X's gender is | The sex of X is | X's sex is | By gender, X is
"""  # noqa: E501 - a family is one line


def same(form: str) -> tuple[str, ...]:
    """Returns the other beginnings that say what `form` says, with the subject's slot in each."""
    return _by_form().get(form, ())


@cache
def _by_form() -> dict[str, tuple[str, ...]]:
    found: dict[str, dict[str, None]] = {}
    for line in _FAMILIES.strip().splitlines():
        forms = [form.strip().replace("X", SLOT) for form in line.split("|")]
        for form in forms:
            found.setdefault(form, {}).update((other, None) for other in forms if other != form)
    return {form: tuple(others) for form, others in found.items()}
