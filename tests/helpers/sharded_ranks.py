"""What each of several processes does in the tests of sharded layers."""

import os
import signal
from contextlib import contextmanager

import torch
from safetensors.torch import save_file

from helpers.toys import DOWN_PROJECTION, toy_hparams, toy_requests
from locft_easyedit.api import edit_and_measure, edit_model
from locft_easyedit.delta.metadata import frozen_samples
from locft_easyedit.distributed.world import get_world
from locft_easyedit.evaluation.evaluation import PLAIN_METRICS, SharedMeasurement
from locft_easyedit.modeling.device_map import left_on_disk
from locft_easyedit.modeling.fsdp import sharded_layers
from locft_easyedit.modeling.loading import load_model
from locft_easyedit.modeling.places import find_layers


def runs(out, *wanted):
    """Edits and measures, once for each of `wanted`; returns what came out.

    Args:
        out: A folder in which rank 0 puts the trained matrices, by the run's name.
        wanted: Runs: `name`, `kind` and `folder` of the model, `n` requests, `changes` of the
            hyper-parameters, whether to `measure`, and a `fault` (see `failing`).
    """
    world = get_world()
    found = {}
    for run in wanted:
        try:
            found[run["name"]] = _run(world, out, **run)
        except Exception as error:
            found[run["name"]] = {"error": f"{type(error).__name__}: {error}"}
    world.close()
    return found


def _run(world, out, name, kind, folder, n, changes, measure, fault):
    values = {"rewrite_module_tmp": DOWN_PROJECTION[kind], "device": "cpu"} | changes
    h = toy_hparams(model_name=folder, **values)
    model, tokenizer = load_model(h)
    sharded = sharded_layers(model)
    originals = {n: p.detach().clone() for n, p in model.named_parameters() if whole_here(p)}
    faults = []
    try:
        with failing(world, model, fault, faults):
            given = (model, tokenizer, toy_requests(n), h)
            run = (
                edit_and_measure(*given, metrics=PLAIN_METRICS, progress=False) if measure else None
            )
            result = run.result if run is not None else edit_model(*given, progress=False)
    except Exception:
        now = dict(model.named_parameters())
        assert all(torch.equal(value, now[n]) for n, value in originals.items()), "not restored"
        raise
    if world.is_main_process:
        save_file(result.new, f"{out}/{name}")
    return {
        "losses": result.step_losses,
        "metrics": None if run is None else list(run.metrics),
        "perplexity": result.health.perplexity_after,
        "frozen": frozen_samples(model, result.new),
        "sharded": 0 if sharded is None else len(sharded),
        "taken_part": 0 if sharded is None else sharded.n_taken_part,
        "numel": {n: local(p).numel() for n, p in model.named_parameters()},
        "streamed": left_on_disk(model),
        "faults": len(faults),
    }


def local(parameter):
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def whole_here(parameter):
    return local(parameter) is parameter and not parameter.is_meta


@contextmanager
def failing(world, model, fault, faults):
    """Within, a module of the first sharded layer that runs fails as `fault` says.

    Args:
        world: The processes.
        model: The model.
        fault: `rank`, `when` (`forward` or `backward` of training, or `evaluation`), how many
            `times`, and whether for want of `memory`; or `None`.
        faults: Gets an entry for each time.
    """
    if fault is None or fault["rank"] != world.rank:
        yield
        return
    measure, measuring = SharedMeasurement.stream, []

    def fail():
        if len(faults) < fault["times"]:
            faults.append(fault["when"])
            raise (torch.OutOfMemoryError if fault["memory"] else RuntimeError)("on purpose")

    def seen(module, args, output):
        trains = torch.is_grad_enabled()
        if (fault["when"], trains) in (("forward", True), ("evaluation", False)):
            if trains or measuring:
                fail()
        elif fault["when"] == "backward" and trains:
            output.register_hook(lambda gradient: fail())

    def noted(self, when=""):
        measuring.append(when)
        yield from measure(self, when)
        measuring.clear()

    # The first that runs: what is gathered beyond the next layer is still owed then.
    number = 3 if fault["when"] == "backward" else 1
    hook = find_layers(model).layers[number].mlp.register_forward_hook(seen)
    SharedMeasurement.stream = noted
    try:
        yield
    finally:
        SharedMeasurement.stream = measure
        hook.remove()


def most_memory(folder, shard):
    """Returns the bytes of what this process holds, and by how much loading raised the peak."""
    world = get_world()
    torch.set_num_threads(1)
    h = toy_hparams(model_name=folder, device="cpu", layers=[0], shard_frozen=shard)
    before = peak()
    model, _ = load_model(h)
    for parameter in model.parameters():
        local(parameter).sum()  # a file that is mapped takes memory once it is read
    grown = peak() - before
    sizes = {n: local(p).numel() * p.element_size() for n, p in model.named_parameters()}
    world.close()
    return {"grown": grown, "held": sum(sizes.values())}


def peak():
    """Returns the most bytes that this process, and none before it, has held in memory."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def shares(folder, changes):
    """Returns this process's numbers of each parameter."""
    world = get_world()
    model, _ = load_model(toy_hparams(model_name=folder, device="cpu", **changes))
    numel = {n: local(p).numel() for n, p in model.named_parameters()}
    world.close()
    return numel


def interrupted(out, run, step):
    """Edits until a signal comes at a step; returns what was said. The checkpoint is left."""
    from locft_easyedit.errors import EditInterrupted
    from locft_easyedit.training.step import TrainingStep

    take, taken = TrainingStep.take_, []

    def signalled(self, *args):
        taken.append(1)
        if get_world().is_main_process and len(taken) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *args)

    TrainingStep.take_ = signalled
    try:
        _run(get_world(), out, **run)
    except EditInterrupted as stopped:
        return [str(stopped), len(taken)]
    return None
