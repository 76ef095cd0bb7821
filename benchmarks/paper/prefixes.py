"""Random text before the prompt: five texts an edit that the model begins, trained beside it.

    python benchmarks/paper/prefixes.py --data counterfact.json --output prefixes

The prefixes are sentences that the model itself writes after a BOS, sampled once; each edit gets
five of them before its prompt, as `rewordings` (table 7).
"""

import random

from study import Study, by_file, changes, file_of, loaded, percent, rewritten, verdict

from locft_easyedit.errors import DataError
from locft_easyedit.modeling.sampling import TextKind, TextSampler, first_token

EACH, N_TEXTS, N_TOKENS = 5, 128, 10
PREFIXED = "_prefixes"


def with_prefixes(options, folder):
    """Writes each file with five prefixes an edit, beside the file itself; returns the paths."""
    model, tokenizer = loaded(options)
    kind = TextKind("prefix", [[first_token(tokenizer)]], N_TEXTS, N_TOKENS)
    sampled = TextSampler(model, tokenizer, [kind], cache=folder).round(0)["prefix"]
    # A text is a beginning; its end makes a sentence of it, as in ROME's context templates.
    texts = sorted({" ".join(text.split()).rstrip(".") for text in sampled} - {""})
    if len(texts) < EACH:
        raise DataError(f"The model writes {len(texts)} different beginnings; {EACH} are needed.")

    def change_(requests):
        draw = random.Random(0)
        for request in requests:
            request["rewordings"] = [
                f"{text}. {request['prompt']}" for text in draw.sample(texts, EACH)
            ]

    return rewritten(options, folder, PREFIXED, change_)


def claim(rows):
    files, said = dict(by_file(rows)), []
    for name in files:
        prefixed = files.get(f"{name}{PREFIXED}")
        if prefixed:
            before, after = files[name][0], prefixed[0]
            points = percent(after, "generalization") - percent(before, "generalization")
            said.append(f"{name}: {changes(before, after)}. {verdict(points > 0)}.")
    return said


STUDY = Study(
    doc=__doc__,
    title="five random prefixes an edit",
    paper="five random prefixes an edit take generalization on CounterFact from 33 to 51 %, 40 to "
    "50 % and 12 to 45 % in three models (table 7).",
    variants={"as": f"forms_per_epoch={EACH}"},
    axis="",
    x=file_of,
    series=lambda _: "published training",
    claim=claim,
    made=with_prefixes,
)

if __name__ == "__main__":
    STUDY.main()
