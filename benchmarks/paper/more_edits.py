"""More edits: 100 to 3,000 in the same matrix, as published and as LocFT-BF+ (figure 6).

    python benchmarks/paper/more_edits.py --data zsre.json --n 100 300 1000 --output more_edits

What compares between models is edits per input of the trained matrix: SmolLM2's down-projection has
1,536 inputs, that of an 8B model 14,336.
"""

from study import Study, by_file, changes, file_of, percent, verdict

LOSES = 5  # points, of reliability and of capability


def claim(rows):
    said = []
    for name, own in by_file(rows):
        for variant in dict.fromkeys(row["variant"] for row in own):
            of_it = sorted((r for r in own if r["variant"] == variant), key=lambda r: r["n"])
            first, last = of_it[0], of_it[-1]
            if first is last:
                continue
            holds = all(
                percent(last, key) > percent(first, key) - LOSES
                for key in ("reliability", "capability")
            )
            said.append(
                f"{name}, {variant}, from {first['n']:,} to {last['n']:,} edits: "
                f"{changes(first, last)}. {verdict(holds)}."
            )
    return said


STUDY = Study(
    doc=__doc__,
    title="the same training with more and more edits",
    paper="reliability stays at about 99 % up to thousands of edits, and the general capability "
    "where it was (figure 6).",
    variants={"as_published": "alg_name=LocFT-BF", "plus": "alg_name=LocFT-BF+"},
    axis="edits (log scale)",
    x=lambda row: row["n"],
    series=lambda row: f"{file_of(row)}, {row['variant']}",
    claim=claim,
    n=(100, 300, 1000, 3000),
    log_x=True,
)

if __name__ == "__main__":
    STUDY.main()
