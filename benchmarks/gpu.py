"""Times a whole edit on one GPU, on random weights of a real model's shape; no download.

    python benchmarks/gpu.py                       # Llama-3-8B's shape, 3,000 edits
    python benchmarks/gpu.py --streamed            # Qwen2.5-72B's shape, layers from disk
    python benchmarks/gpu.py --device cpu --layers 4 --layer 2 --hidden 64 --inner 128 \
        --heads 2 --kv-heads 1 --vocabulary 1000 --edits 60 --epochs 2 --row-tokens 64

The weights are drawn on the device in bfloat16, and the edits are random words in ZsRE's lengths
(15.6 tokens an edit, 4.3 of them the target and its end): what a step costs depends on neither.
Told are the seconds of prefix and epochs, tokens a second, the part of the card's own rate for
matrix products that the training reaches, peak memory, and, step by step and interleaved, the ratio
to the published algorithm (a full forward pass over padded batches with logits everywhere) in
float32 and in bfloat16. `--streamed` first writes a checkpoint of random weights, of which
`--frozen-layers` layers stay on disk; a whole model's seconds follow from those of a layer.
"""

import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import torch
from random_inputs import random_requests, word_tokenizer
from safetensors.torch import save_file
from shared import interleaved, matmul_rate, parser_of, synchronize, write_figures
from step import Ours, one_step, published, step_flop
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.modeling.loading import load_model
from locft_easyedit.training.session import EditSession
from locft_easyedit.utils.memory import peak_memory

TEMPLATE = "model.layers.{}.mlp.down_proj.weight"
LLAMA_3_8B = {
    "config": LlamaConfig, "layers": 32, "layer": 22, "hidden": 4096, "inner": 14336, "heads": 32,
    "kv_heads": 8, "vocabulary": 128_256, "epochs": 25,
}  # fmt: skip
# Of the real model's 80 layers, the frozen ones that are asked for and two that are trained in.
QWEN_72B = {
    "config": Qwen2Config, "layers": None, "layer": None, "hidden": 8192, "inner": 29_568,
    "heads": 64, "kv_heads": 8, "vocabulary": 152_064, "epochs": 2,
}  # fmt: skip


def main():
    options = arguments()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; {options.layers} layers of width {options.hidden}, "
          f"{options.edits} edits, place: layer {options.layer}, {options.dtype}")  # fmt: skip
    figures = streamed(options) if options.streamed else resident(options, device)
    write_figures(options, figures, device=name)


def arguments():
    parser = parser_of(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--edits", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--epochs", type=int, help="25; 2 with --streamed")
    for key in ("layers", "layer", "hidden", "inner", "heads", "kv-heads", "vocabulary"):
        parser.add_argument(f"--{key}", type=int, help="of the model; its real value if not given")
    parser.add_argument("--steps", type=int, default=5, help="steps of each algorithm; 0: none")
    parser.add_argument("--no-float32", action="store_true", help="no float32 copy of the model")
    parser.add_argument("--streamed", action="store_true", help="frozen layers from disk")
    parser.add_argument("--frozen-layers", type=int, default=8, help="layers on disk")
    parser.add_argument("--folder", help="where the checkpoint and hidden states go")
    options = parser.parse_args()
    shape = QWEN_72B if options.streamed else LLAMA_3_8B
    for key, value in shape.items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)
    if options.streamed:
        options.layer = options.frozen_layers
        options.layers = options.frozen_layers + 2
    options.template = TEMPLATE  # for the steps
    return options


def config_of(options):
    return options.config(
        vocab_size=options.vocabulary, hidden_size=options.hidden, num_hidden_layers=options.layers,
        intermediate_size=options.inner, num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads, max_position_embeddings=8192, rope_theta=500_000.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip


def random_model(options, device, dtype):
    """Drawn where it is used: nothing of it is ever on the host."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config_of(options), dtype=dtype).eval()


def hparams_of(options, **more):
    # No threshold stops it: every epoch makes all its updates.
    return LocFTBFHyperParams(
        layers=[options.layer], rewrite_module_tmp=TEMPLATE, lr=5e-4, num_steps=options.epochs,
        batch_size=options.batch, row_tokens=options.row_tokens, epoch_loss_threshold=0.0,
        batch_loss_threshold=0.0, prefix_dir=options.folder, **more,
    )  # fmt: skip


def edit(model, tokenizer, requests, hparams, device):
    """A whole edit: seconds by phase, losses and peak memory."""
    with peak_memory(device) as peak:
        started = time.perf_counter()
        with EditSession(model, tokenizer, requests, hparams) as session:
            result = session.train_()
            texts, store = session._texts, session._runner.prefix.store
            n_tokens, where = int(texts.input_offsets[-1]), store.where()
            session._runner.prefix.store.close()
        synchronize(device)
        whole = time.perf_counter() - started
    result.restore_(model)
    seconds = dict(result.timings) | {"all": whole}
    epochs = len(result.losses)
    rate = n_tokens * epochs / seconds["train"]
    print(f"checks and tokens {seconds['prepare']:.2f} s, prefix {seconds['prefix']:.2f} s, "
          f"{epochs} epochs {seconds['train']:.2f} s ({seconds['train'] / epochs:.3f} s each); all "
          f"{seconds['all']:.2f} s\n{n_tokens} tokens, {rate:,.0f} a second of training; states: "
          f"{where}\nloss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}; peak "
          f"{peak.gib:.2f} GiB ({peak.of})", flush=True)  # fmt: skip
    return {
        "seconds": seconds, "epochs": epochs, "tokens": n_tokens, "tokens_per_second": rate,
        "losses": result.losses, "peak_gib": peak.gib, "peak_of": peak.of, "states": where,
        "updates": result.n_updates,
    }  # fmt: skip


def resident(options, device):
    tokenizer = word_tokenizer(options.vocabulary)
    requests = random_requests(options.edits, options.vocabulary)
    model = random_model(options, device, getattr(torch, options.dtype))
    edit(model, tokenizer, requests[: options.batch],
         hparams_of(SimpleNamespace(**vars(options) | {"epochs": 2})), device)  # fmt: skip
    print("(that was to warm up)\n")
    figures = {"edit": edit(model, tokenizer, requests, hparams_of(options), device)}
    flop = step_flop(model, options.layer, requests, tokenizer)
    ceiling = matmul_rate(device, options.dtype)
    reached = flop * figures["edit"]["epochs"] / figures["edit"]["seconds"]["train"]
    print(f"{reached / 1e12:.2f} TFLOP/s of matrix products that training cannot do without: "
          f"{reached / ceiling:.0%} of the measured {ceiling / 1e12:.2f}\n",
          flush=True)  # fmt: skip
    figures["work"] = {"flop_an_epoch": flop, "rate": reached, "ceiling": ceiling}
    if options.steps:
        figures["steps"] = against_published(options, model, tokenizer, requests, device)
    return figures


def against_published(options, model, tokenizer, requests, device):
    """One mini-batch again and again: the published algorithm and ours, in turn."""
    batch = requests[: options.batch]
    models = {options.dtype: model}
    if not options.no_float32 and options.dtype != "float32":
        models = {"float32": random_model(options, device, torch.float32)} | models
    options.n = len(batch)
    with ExitStack() as stack:
        steps = {}
        for dtype, one in models.items():
            steps[f"published, {dtype}"] = published(one, tokenizer, batch, options.layer, options)
            hparams = one_step(options, options.layer, {})
            steps[f"ours, {dtype}"] = stack.enter_context(Ours(one, tokenizer, batch, hparams)).step
        median, losses = interleaved(steps, options.steps, device)
    slowest = f"published, {next(iter(models))}"
    rows = []
    for name, value in median.items():
        loss = losses[name][-1]
        same = median[f"published, {name.split(', ')[1]}"]
        rows.append({
            "step": name, "seconds": value, "loss": loss,
            "ratio": median[slowest] / value, "ratio_same_dtype": same / value,
        })  # fmt: skip
        print(f"{name:24} {value * 1e3:9.1f} ms {median[slowest] / value:7.1f}x of {slowest}, "
              f"{same / value:5.1f}x in its own precision; loss {loss:.4f}")  # fmt: skip
    return rows


def streamed(options):
    """A checkpoint of random weights, edited with its frozen layers left on disk."""
    device = torch.device(options.device)
    tokenizer = word_tokenizer(options.vocabulary)
    requests = random_requests(options.edits, options.vocabulary)
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name) / "model"
        folder.mkdir()
        start = time.perf_counter()
        layer_bytes = write_checkpoint(options, folder, device)
        tokenizer.save_pretrained(folder)
        print(f"checkpoint written in {time.perf_counter() - start:.1f} s, "
              f"{layer_bytes / 2**30:.2f} GiB a layer", flush=True)  # fmt: skip
        options.folder = None  # states are not kept
        hparams = hparams_of(
            options, stream_frozen=True, dtype=options.dtype, device=options.device
        )
        hparams.model_name = str(folder)
        start = time.perf_counter()
        model, _ = load_model(hparams)  # the tokenizer of the edits is the one above
        loading = time.perf_counter() - start
        print(f"loaded without its frozen layers in {loading:.1f} s", flush=True)
        found = edit(model, tokenizer, requests, hparams, device)
    per_layer = found["seconds"]["prefix"] / options.frozen_layers
    print(f"prefix: {per_layer:.2f} s a layer, {layer_bytes / per_layer / 1e9:.2f} GB/s read (the "
          "system may still hold what was just written)")  # fmt: skip
    return {"edit": found, "loading": loading, "layer_bytes": layer_bytes,
            "seconds_a_layer": per_layer}  # fmt: skip


def write_checkpoint(options, folder, device):
    """A shard for each layer and one for the rest, of random weights; returns a layer's bytes."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config_of(options))
    shards = {}
    for name, value in skeleton.state_dict().items():
        parts = name.split(".")
        part = f"layer-{int(parts[2]):03d}" if parts[1] == "layers" else "rest"
        shards.setdefault(part, {})[name] = value.shape
    weight_map, sizes = {}, {}
    dtype = getattr(torch, options.dtype)
    for part, shapes in shards.items():
        tensors = {
            # What has one dimension is a norm's scale, or a bias.
            name: torch.zeros(shape, dtype=dtype) if name.endswith("bias")
            else torch.ones(shape, dtype=dtype) if len(shape) == 1
            else torch.randn(shape, dtype=dtype, device=device).mul_(0.02).cpu()
            for name, shape in shapes.items()
        }  # fmt: skip
        file = f"model-{part}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        sizes[part] = sum(value.numel() * value.element_size() for value in tensors.values())
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = config_of(options)
    config.architectures = [type(skeleton).__name__]
    config.dtype = options.dtype
    config.save_pretrained(folder)
    return sizes["layer-000"]


if __name__ == "__main__":
    main()
