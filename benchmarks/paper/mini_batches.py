"""Mini-batches of 1 to 128 edits: what their size does to edits and to the rest (figure 4).

    python benchmarks/paper/mini_batches.py --data zsre.json counterfact.json --output mini_batches

The rate is the same for all sizes, as in the paper; `--all lr=1e-3` gives another one.
"""

from study import Study, by_file, changes, percent, verdict

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
LOSES = 5  # points of reliability, at most
POINTS = 3  # of capability; less is within the error of two small tasks


def claim(rows):
    said = []
    for name, own in by_file(rows):
        first, *others = own
        # With few steps the largest ones learn too little to be compared.
        learned = [row for row in others if percent(row) > percent(first) - LOSES]
        if learned:
            last = learned[-1]
            more = percent(last, "capability") - percent(first, "capability")
            said.append(
                f"{name}, from {first['variant']} to {last['variant']} edits a step: "
                f"{changes(first, last)}. {verdict(more > POINTS)}."
            )
    return said


STUDY = Study(
    doc=__doc__,
    title="mini-batches of the same training",
    paper="larger mini-batches leave more of the general capability, at little less generalization "
    "(figure 4).",
    variants={str(size): f"batch_size={size},min_batches=null" for size in SIZES},
    axis="edits in a mini-batch (log scale)",
    x=lambda row: int(row["variant"]),
    claim=claim,
    n=(128,),
    log_x=True,
)

if __name__ == "__main__":
    STUDY.main()
