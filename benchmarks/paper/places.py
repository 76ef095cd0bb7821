"""Places: each kind of module in layers from bottom to top, with what else moves (figure 5).

    python benchmarks/paper/places.py --data zsre.json --output places

`locft locate` sweeps places and rates in one command and chooses among them; this holds a few of
them beside the paper's figure, with capability and drift, at one rate for all. Templates are those
of Llama's kind.
"""

from study import Study, by_file, file_of, mean, percent, verdict

LAYERS = (1, 5, 9, 13, 17, 21, 25, 29)
MODULES = {
    "down": "mlp.down_proj.weight",
    "up": "mlp.up_proj.weight",
    "o": "self_attn.o_proj.weight",
    "mlp": "mlp",
}
VARIANTS = {
    f"{module}_{layer}": f"layers=[{layer}],rewrite_module_tmp=model.layers.{{}}.{path},lr=1e-3"
    for module, path in MODULES.items()
    for layer in LAYERS
}
NEARLY_ALL = 90  # % of the edits
LEAST = 3 / 4  # of the places


def claim(rows):
    said = []
    for name, own in by_file(rows):
        learned = [row for row in own if percent(row) >= NEARLY_ALL]
        sentence = (
            f"{name}: {len(learned)} of {len(own)} places learn at least {NEARLY_ALL} % of the "
            f"edits. {verdict(len(learned) >= LEAST * len(own))}."
        )
        if learned:
            kept = min(learned, key=lambda row: mean(row, "kl"))
            far = max(learned, key=lambda row: mean(row, "generalization"))
            sentence += (
                f" Of these {told(kept)} moves least (KL {mean(kept, 'kl'):.3g}), and "
                f"{told(far)} generalizes best ({percent(far, 'generalization'):.1f} %)."
            )
        said.append(sentence)
    return said


def told(row):
    module, layer = row["variant"].split("_")
    return f"{module} in layer {layer}"


STUDY = Study(
    doc=__doc__,
    title="the same training in different places",
    paper="nearly any module learns the edits; generalization and what else moves depend on the "
    "layer, and down-projections of late layers are the stable choice (figure 5).",
    variants=VARIANTS,
    axis="layer",
    x=lambda row: int(row["variant"].split("_")[1]),
    series=lambda row: f"{file_of(row)}, {row['variant'].split('_')[0]}",
    claim=claim,
    n=(50,),
)

if __name__ == "__main__":
    STUDY.main()
