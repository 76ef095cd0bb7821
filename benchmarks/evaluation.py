"""Times a full evaluation, before and after an edit: EasyEdit's loop against ours, in one run.

    python benchmarks/evaluation.py --data zsre.json --n 25 50 100 200

EasyEdit's loop is its `compute_edit_quality`, one record at a time, on the unedited and on the
edited model. All figures are compared. Times are of one run on one machine: read the ratios, not
the seconds.
"""

import json
import time
from contextlib import nullcontext

import torch
from shared import parser_of, timed, write_figures

from locft_easyedit.data.readers import read_requests
from locft_easyedit.easyedit.cuda_as_cpu import CudaAsCPU, needs_cuda_as_cpu
from locft_easyedit.easyedit.importing import load_easyedit
from locft_easyedit.evaluation.evaluation import Evaluation, finish_
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.modeling.loading import load_causal_lm
from locft_easyedit.modeling.places import find_layers
from locft_easyedit.prefix.cut import layer_cut


def main():
    parser = parser_of(__doc__, "model", "data", "device")
    parser.add_argument("--n", type=int, nargs="+", default=[25, 50, 100], help="records")
    parser.add_argument("--layer", type=int, default=27, help="the layer that an edit changes")
    parser.add_argument("--matrix", default="mlp.down_proj", help="its matrix")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--more", action="store_true", help="without prefix; generated metrics")
    options = parser.parse_args()

    easyedit = load_easyedit()
    model, tokenizer = load_causal_lm(options.model, device=options.device, dtype=options.dtype)
    layers = find_layers(model)
    matrix = layers.layers[options.layer].get_submodule(options.matrix).weight
    original = matrix.detach().clone()
    records = read_requests(options.data, max(options.n))

    def edit(share):  # an edit that every method could have made
        with torch.no_grad():
            matrix.copy_(original * share)

    def both(measure):
        """Seconds before, seconds after, and the records' metrics of both."""
        seconds, measured = [], []
        for share in (1.0, 0.5):
            edit(share)
            taken, records_metrics = timed(measure, model.device)
            seconds.append(taken)
            measured.append(records_metrics)
        return seconds, measured

    def theirs(n):
        hparams = LocFTBFHyperParams(
            layers=[options.layer], rewrite_module_tmp="{}", lr=1e-3, device=options.device
        )
        release_on_cpu = needs_cuda_as_cpu(easyedit)
        device = 0 if release_on_cpu else model.device

        def measure():
            with CudaAsCPU() if release_on_cpu else nullcontext():
                return [
                    easyedit.compute_edit_quality(
                        model, "llama", hparams, tokenizer, record, device
                    )
                    for record in records[:n]
                ]

        return both(measure)

    def ours(n, metrics=("accuracy",), frozen=True):
        start = time.perf_counter()
        how = EvalConfig(frozen=layer_cut(layers, options.layer) if frozen else None)
        evaluation = Evaluation(model, tokenizer, records[:n], how, metrics=metrics)
        prepared = time.perf_counter() - start
        seconds, measured = both(evaluation.measure)
        return [seconds[0] + prepared, seconds[1]], measured

    ours(4), theirs(4)  # warm up
    figures = []
    for n in options.n:
        (slow_pre, slow_post), expected = theirs(n)
        (pre, post), measured = ours(n)
        for phase in (0, 1):
            for mine, other in zip(measured[phase], expected[phase], strict=True):
                same = {key: mine[key] for key in other}
                assert json.dumps(same, sort_keys=True) == json.dumps(other, sort_keys=True)
        for one, two in zip(*measured, strict=True):
            finish_(one, two)
        figures.append(
            {
                "records": n,
                "easyedit": slow_pre + slow_post,
                "ours": pre + post,
                "ratio": (slow_pre + slow_post) / (pre + post),
                "before": pre,
                "after": post,
            }
        )
        print(
            f"{n:5} records: EasyEdit {slow_pre + slow_post:7.1f} s, ours {pre + post:6.1f} s "
            f"({pre:.1f} before, {post:.1f} after): {figures[-1]['ratio']:.1f}x",
            flush=True,
        )
        if options.more:
            (_, after), _ = ours(n, frozen=False)
            (one, two), _ = ours(n, metrics=("accuracy", "generated"))
            figures[-1] |= {"after, no frozen prefix": after, "with generated metrics": one + two}
            print(
                f"{'':14} after without the frozen prefix {after:.1f} s; with generated metrics "
                f"{one + two:.1f} s",
                flush=True,
            )
    edit(1.0)
    write_figures(options, figures)


if __name__ == "__main__":
    main()
