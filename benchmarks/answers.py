"""Times generated answers in half precision: rows that are filled again against whole batches.

    python benchmarks/answers.py --data counterfact.json --n 50

The answers are those to each record's edit in all wrappers, and to its rewordings in chat, of a
model that was not edited: few are as expected, so that most are written token by token. Both ways
make them in turn; the first round, which is not counted, measures whether the caches suit the
model. Read the ratio, not the seconds.
"""

from functools import partial
from unittest.mock import patch

import torch
from shared import interleaved, parser_of, write_figures

from locft_easyedit.data.readers import read_requests
from locft_easyedit.evaluation import decoding
from locft_easyedit.evaluation.evaluation import Evaluation
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.modeling.loading import load_causal_lm

WHOLE, REFILLED = "batches that stay whole", "rows filled again"


def main():
    parser = parser_of(__doc__, "model", "data", "device")
    parser.add_argument("--n", type=int, default=50, help="records")
    parser.add_argument("--repeats", type=int, default=2, help="rounds that are counted")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 or float16")
    options = parser.parse_args()
    model, tokenizer = load_causal_lm(options.model, device=options.device, dtype=options.dtype)
    records = [one | {"locality": {}} for one in read_requests(options.data, options.n)]
    evaluation = Evaluation(model, tokenizer, records, EvalConfig(), metrics=["wrapped"])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    passes = {}

    def answers(name, span):
        calls.clear()
        with patch.object(decoding, "static_span", span):
            measured = evaluation.measure()
        passes[name] = len(calls)
        return [one["wrapped"]["answers"] for one in measured]

    ways = {WHOLE: lambda *_: 0, REFILLED: decoding.static_span}
    seconds, found = interleaved(
        {name: partial(answers, name, span) for name, span in ways.items()},
        options.repeats,
        model.device,
    )
    whole, refilled = (
        [text for answered in found[name][-1] for text in answered.values()]
        for name in (WHOLE, REFILLED)
    )
    same = sum(one == other for one, other in zip(whole, refilled, strict=True)) / len(whole)
    figures = [
        {"way": name, "seconds": seconds[name], "passes": passes[name],
         "times faster": seconds[WHOLE] / seconds[name]}
        for name in seconds
    ]  # fmt: skip
    for row in figures:
        print(f"{row['way']:25} {row['seconds']:8.1f} s {row['passes']:6} passes "
              f"{row['times faster']:6.2f} times faster")  # fmt: skip
    print(f"the same answer, to the letter: {same:.1%} of {len(whole)}")
    write_figures(options, figures, same=same, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
