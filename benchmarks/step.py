"""Times one training step: the published algorithm against ours, and ours part by part.

    python benchmarks/step.py --model models/SmolLM2-135M-Instruct --layer 20 27

The published algorithm is a full forward pass over the padded batch with logits everywhere, in
float32 with PyTorch's Adam. All variants make the same step on the same edits from the same
weights, interleaved; their losses are compared. Then: the part of this machine's own rate for
matrix products that a step reaches. Times are of one run on one machine: read the ratios.
"""

from contextlib import ExitStack, nullcontext

import numpy as np
import torch
from shared import interleaved, matmul_rate, parser_of, write_figures
from torch.nn import functional as F

from locft_easyedit.data.readers import read_requests
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.modeling.forward import give_masks
from locft_easyedit.modeling.loading import load_causal_lm
from locft_easyedit.training.session import EditSession
from locft_easyedit.training.step import TrainingStep
from locft_easyedit.training.trained_weights import TrainedWeights

PUBLISHED = "published algorithm"
# What is set otherwise than in ours, and parts of a fast forward pass that are left out: from ours
# on each variant takes one more thing away, down to a full padded forward pass.
OURS = {
    "ours with compiled layers": ({"compile_layers": True}, ()),
    "ours": ({}, ()),
    "- cut at the layer": ({"prefix_cut": "layer"}, ()),
    "- whole last layer": ({"prefix_cut": "layer"}, ("tail",)),
    "- logits not in chunks": ({"prefix_cut": "layer"}, ("tail", "head")),
    "- padded": ({"prefix_cut": "layer", "packing": False}, ("tail", "head")),
    "- no frozen prefix": ({"frozen_prefix": False, "packing": False}, ("tail", "head")),
}


def main():
    parser = parser_of(__doc__, "model", "template", "data", "row-tokens", "device")
    parser.add_argument("--layer", type=int, nargs="+", default=[20, 27])
    parser.add_argument("--n", type=int, default=100, help="edits, all in one mini-batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--ours-only", action="store_true", help="no ablation")
    options = parser.parse_args()
    figures = []
    for layer in options.layer:
        figures += one_layer(options, layer)
    write_figures(options, figures)


def one_layer(options, layer):
    models = {d: load_causal_lm(options.model, device=options.device, dtype=d)
              for d in dict.fromkeys(["float32", *options.dtype])}  # fmt: skip
    requests = read_requests(options.data, options.n)
    device = models["float32"][0].device
    variants = {k: v for k, v in OURS.items() if k == "ours" or not options.ours_only}
    with ExitStack() as stack:
        steps = {PUBLISHED: published(*models["float32"], requests, layer, options)}
        for dtype in options.dtype:
            model, tokenizer = models[dtype]
            for name, (changes, without) in variants.items():
                hparams = one_step(options, layer, changes)
                made = stack.enter_context(Ours(model, tokenizer, requests, hparams, without))
                if hparams.compile_layers and made.session.shortcuts.compiled is None:
                    raise SystemExit("No layer was compiled; the warning above says why.")
                steps[f"{name}, {dtype}"] = made.step
        rates = dict.fromkeys(options.dtype, 0.0)

        def measure_rates():
            rates.update({d: max(rate, matmul_rate(device, d)) for d, rate in rates.items()})

        median, losses = interleaved(steps, options.repeats, device, measure_rates)
    print(f"\n{options.model}, layer {layer}, {len(requests)} edits in one mini-batch, {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    flop = step_flop(models["float32"][0], layer, requests, models["float32"][1])
    rows = []
    for name, value in median.items():
        row = {"layer": layer, "variant": name, "seconds": value,
               "ratio": median[PUBLISHED] / value, "loss": losses[name][-1]}  # fmt: skip
        line = f"{name:36s} {value:8.3f} s {row['ratio']:6.1f}x   loss {row['loss']:.5f}"
        if name.startswith("ours"):
            rate = rates[name.split(", ")[1]]
            row |= {"flop": flop, "matmul_rate": rate, "share_of_rate": flop / value / rate}
            line += f"   {row['share_of_rate']:.0%} of {rate / 1e9:.0f} GFLOP/s"
        print(line, flush=True)
        rows.append(row)
    return rows


def one_step(options, layer, changes):
    """Hyper-parameters of a training that is one step on all edits, and hardly moves a weight."""
    return LocFTBFHyperParams(
        layers=[layer], rewrite_module_tmp=options.template, lr=1e-9, num_steps=1,
        batch_size=options.n, row_tokens=options.row_tokens, batch_loss_threshold=0.0, **changes,
    )  # fmt: skip


class Ours:
    """A step of the training loop itself, on all edits; the weights stay as they are.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        requests: The edits.
        hparams: See `one_step`.
        without: Parts of a fast forward pass that are left out: `tail`, `head`, `shared`, `masks`,
            `fused`.
        fused: As for `EditSession`.
    """

    def __init__(self, model, tokenizer, requests, hparams, without=(), fused=None):
        self.session = EditSession(model, tokenizer, requests, hparams, progress=False, fused=fused)
        self.without = without

    def __enter__(self):
        session = self.session.__enter__()
        give_masks(session.model, "masks" not in self.without)
        for name in set(self.without) - {"masks"}:
            setattr(session._runner, name, None)
        edits, protection = np.arange(len(session.edits.edits)), session._protection
        self.change = session._edit_runner.confined_()
        self.weights = (
            TrainedWeights(session.place.parameters) if self.change is None else self.change.weights
        )
        variants = session.training_texts.variants
        self.texts = variants.texts(edits, epoch=0)
        self.loop_step = TrainingStep(
            session._runner, self.weights, session.hparams, session._share,
            texts_per_edit=variants.most,
            adam=None if protection is None else protection.adam(len(edits), session.hparams),
        )  # fmt: skip
        return self

    def step(self):
        in_force = nullcontext() if self.change is None else self.change.in_force()
        with in_force, self.session._runner.running():
            outcome = self.loop_step.take_(self.loop_step.prepared(self.texts))
        value = outcome.loss.item()
        self.weights.clear_gradients_()
        return value

    def __exit__(self, *exc):
        self.weights.restore_()
        self.session.__exit__(*exc)


def published(model, tokenizer, requests, layer, options):
    """The algorithm as published: full forward over the padded batch, logits everywhere."""
    parameter = dict(model.named_parameters())[options.template.format(layer)]
    texts = [f"{r['prompt']} {r['target_new'].lstrip()}" for r in requests]
    n_prompt = [len(ids) for ids in tokenizer([r["prompt"] for r in requests])["input_ids"]]
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=model.device)
    labels = ids.masked_fill(mask == 0, -100)
    for line, n in zip(labels, n_prompt, strict=True):
        line[:n] = -100
    adam = torch.optim.Adam([parameter], lr=1e-9)

    def step():
        for p in model.parameters():
            p.requires_grad_(p is parameter)
        adam.zero_grad()
        with torch.enable_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            token_losses = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none"
            ).view(len(rows), -1)
            counts = (labels[:, 1:] != -100).sum(1)
            loss = (token_losses.sum(1) / counts).mean()
            loss.backward()
        adam.step()
        parameter.grad = None
        return loss.item()

    return step


def step_flop(model, layer, requests, tokenizer):
    """The floating-point work that a step cannot do without, in matrix products alone."""
    texts = [f"{r['prompt']} {r['target_new'].lstrip()}" for r in requests]
    tokens = sum(len(ids) for ids in tokenizer(texts)["input_ids"])  # EOS is only a label
    prompts = sum(len(ids) for ids in tokenizer([r["prompt"] for r in requests])["input_ids"])
    scored = tokens - prompts + len(requests)
    base = model.get_decoder()
    inner = base.layers[layer]
    weights = sum(p.numel() for p in inner.parameters() if p.dim() == 2)
    everywhere = sum(p.numel() for n, p in inner.self_attn.named_parameters() if "o_proj" not in n)
    n_above = len(base.layers) - 1 - layer
    head = model.get_output_embeddings().weight.numel()
    down = inner.mlp.down_proj.weight.numel()
    last = everywhere * tokens + (weights - everywhere) * scored if n_above else 0
    whole = weights * tokens * max(0, n_above - 1)
    # Forward and backward to the activations, and the gradient of the trained matrix.
    return 4 * (whole + last + head * scored) + 4 * down * tokens


if __name__ == "__main__":
    main()
