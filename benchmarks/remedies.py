"""What other forms and a confined change cost: a step with each, and what goes before the first.

    python benchmarks/remedies.py --data zsre_1k.json --layer 24 --n 100

All edits are one mini-batch. The variants are those of generalization.py, and the last of them
with the beginnings that texts have in common run for each; their steps are interleaved, and ratios
are to the published method's. Before a change is trained it is nothing: a variant whose loss is not
that of the other variants with the same texts is said to be wrong.
Seconds are of one run on one machine: read the ratios.
"""

import math
import sys
from contextlib import ExitStack

from generalization import VARIANTS  # beside this file, as is what makes a step
from rich.table import Column, Table
from shared import interleaved, parser_of, write_figures
from step import Ours, one_step

from locft_easyedit.data.readers import read_requests
from locft_easyedit.modeling.loading import load_causal_lm
from locft_easyedit.utils.output import show

PLAIN = "published"
UNSHARED = "no beginning shared"  # of the last variant
# Of a loss near 9. Measured with SmolLM2: mostly the same, and at most 5e-3 apart in bfloat16.
SAME_LOSS = {"float32": 1e-4, "bfloat16": 2e-2}


def main():
    parser = parser_of(__doc__, "model", "template", "data", "row-tokens", "device", "preserve-dir")
    parser.add_argument("--layer", type=int, default=24)
    parser.add_argument("--n", type=int, default=100, help="edits, all in one mini-batch")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=SAME_LOSS, default="bfloat16")
    options = parser.parse_args()
    rows = measured(options)
    table = Table(Column("", no_wrap=True), "step s", "× published", "texts", "loss",
                  "preserve s", "prefix s", "both, ms an edit",
                  title=f"{options.n} edits in one mini-batch, layer {options.layer}")  # fmt: skip
    for row in rows:
        table.add_row(row["variant"], f"{row['step_seconds']:.3f}", f"{row['ratio']:.2f}",
                      str(row["texts"]), f"{row['loss']:.4f}", f"{row['preserve_seconds']:.1f}",
                      f"{row['prefix_seconds']:.1f}", f"{row['ms_an_edit']:.0f}")  # fmt: skip
    show(table)
    write_figures(options, rows)
    wrong = unlike(rows, SAME_LOSS[options.dtype])
    if wrong:
        sys.exit(f"These begin with another loss than variants with the same texts: {wrong}.")


def measured(options):
    """A row of figures for each variant."""
    model, tokenizer = load_causal_lm(options.model, device=options.device, dtype=options.dtype)
    requests = read_requests(options.data, options.n)
    with ExitStack() as stack:
        made = {}
        variants = {name: (changes, ()) for name, changes in VARIANTS.items()}
        variants[UNSHARED] = (list(VARIANTS.values())[-1], ("shared",))
        for name, (changes, without) in variants.items():
            hparams = one_step(options, options.layer, changes)
            hparams.preserve_dir = options.preserve_dir
            made[name] = stack.enter_context(Ours(model, tokenizer, requests, hparams, without))
        steps = {name: ours.step for name, ours in made.items()}
        median, losses = interleaved(steps, options.repeats, model.device)
    return [
        {"variant": name, "step_seconds": median[name], "ratio": median[name] / median[PLAIN],
         "texts": len(ours.texts), "loss": losses[name][0], **before(ours.session)}
        for name, ours in made.items()
    ]  # fmt: skip


def before(session):
    """What goes before the first step, in seconds and by edit."""
    found = {f"{p}_seconds": session.timings.get(p, 0.0) for p in ("preserve", "prefix")}
    return found | {"ms_an_edit": 1000 * sum(found.values()) / len(session.edits.edits)}


def unlike(rows, tolerance):
    """The variants that begin with another loss than the first one with as many texts."""
    first = {}
    return [row["variant"] for row in rows
            if not math.isclose(first.setdefault(row["texts"], row["loss"]), row["loss"],
                                rel_tol=0, abs_tol=tolerance)]  # fmt: skip


if __name__ == "__main__":
    main()
