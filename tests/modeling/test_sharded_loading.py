"""Which layers are sharded, what is refused, and that no process ever holds the whole model."""

import sys

import pytest
import torch
from helpers.launching import launch
from helpers.toys import toy_hparams, toy_model, toy_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from locft_easyedit.api import check_save
from locft_easyedit.distributed.world import SINGLE_PROCESS, World
from locft_easyedit.errors import HyperParamsError, ModelError
from locft_easyedit.modeling.fsdp import ShardedLayers, note_sharded
from locft_easyedit.modeling.loading import load_model, model_without_weights
from locft_easyedit.modeling.sharded_loading import places

CPU = torch.device("cpu")
GIB = 2**30


class Four(World):
    """Four processes on two machines, of which this one speaks for all."""

    def __init__(self):
        super().__init__(rank=1, size=4, local_rank=1, local_size=2)

    def all_max(self, values):
        return [int(value) for value in values]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a toy llama."""
    where = tmp_path_factory.mktemp("toy")
    toy_model("llama").save_pretrained(where, max_shard_size="50KB")
    toy_tokenizer().save_pretrained(where)
    return str(where)


def decided(folder, *, world=None, free=None, monkeypatch=None, **changes):
    h = toy_hparams(model_name=folder, device="cpu", **changes)
    if free is not None:
        for module in ("device_map", "sharded_loading"):
            target = f"locft_easyedit.modeling.{module}.free_memory"
            monkeypatch.setattr(target, lambda device: free)
    skeleton = model_without_weights(folder)
    return places(skeleton, h, CPU, Four() if world is None else world)


def sizes(folder):
    """Returns the bytes of the whole model, and of one layer."""
    skeleton = model_without_weights(folder)
    layer = sum(p.numel() for p in skeleton.model.layers[0].parameters())
    return 4 * sum(p.numel() for p in skeleton.parameters()), 4 * layer


def on_disk(device_map):
    return {name for name, place in (device_map or {}).items() if place == "disk"}


def test_what_is_sharded_is_left_on_disk_to_be_read_in_turn(folder):
    device_map, sharding = decided(folder, shard_frozen=True, layers=[1])
    assert sharding.layers == (2, 3)
    assert on_disk(device_map) == {"model.layers.2", "model.layers.3"}
    device_map, sharding = decided(folder, shard_frozen=True, stream_frozen=True, layers=[1])
    assert sharding.layers == (2, 3)
    assert on_disk(device_map) == {
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in (0, 2, 3)),
    }
    # What is trained in a higher layer stays whole; there may be nothing else in it.
    _, sharding = decided(folder, shard_frozen=True, layers=[0, 2])
    assert sharding.layers == (1, 2, 3)
    assert sharding.whole == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 2)}
    whole = {"rewrite_module_tmp": "model.layers.{}.", "layers": [1, 3]}
    assert decided(folder, shard_frozen=True, **whole)[1].layers == (2,)
    assert decided(folder, shard_frozen=True, layers=[3]) == (None, None)


def test_by_itself_where_what_must_be_resident_does_not_fit(folder, monkeypatch):
    whole, layer = sizes(folder)

    def by_itself(free, **changes):
        # A CPU's memory is shared by the two processes of a machine; nine tenths are taken.
        free = int(2 * free / 0.9) + 100
        return decided(folder, free=free, monkeypatch=monkeypatch, layers=[1], **changes)

    streams = {"stream_frozen": False}
    assert by_itself(whole, **streams)[1] is None
    assert by_itself(whole - 1000, **streams)[1].layers == (2, 3)
    assert by_itself(whole - 1000, shard_frozen=False, **streams)[1] is None
    # Layers below the place that are left on disk need no room.
    embedding = 4 * 400 * 32
    above = whole - layer - embedding
    assert by_itself(above, stream_frozen=True)[1] is None
    device_map, sharding = by_itself(above - 1000, stream_frozen=True)
    assert sharding.layers == (2, 3)
    assert on_disk(device_map) >= {"model.layers.0", "model.layers.2", "model.layers.3"}
    # Shares of a machine's processes, where these have room for all of it; else of all processes.
    assert sharding.within_machines
    assert by_itself(above - layer, stream_frozen=True)[1].within_machines
    assert not by_itself(above - layer - 1000, stream_frozen=True)[1].within_machines
    # Alone it is as before.
    assert by_itself(above - 1000, world=SINGLE_PROCESS, stream_frozen=True)[1] is None


def test_processes_decide_alike(folder, monkeypatch):
    class Tight(Four):
        """The others have less room."""

        def all_max(self, values):
            return [1] * len(values)

    device_map, sharding = decided(
        folder, world=Tight(), free=100 * GIB, monkeypatch=monkeypatch, layers=[1]
    )
    assert on_disk(device_map) >= {"model.layers.0", "model.embed_tokens"}
    assert sharding.layers == (2, 3)
    assert not sharding.within_machines


def test_what_it_does_not_go_with():
    with pytest.raises(HyperParamsError, match="`shard_frozen=True` does not go with `model_para"):
        toy_hparams(shard_frozen=True, model_parallel=True)
    assert toy_hparams(shard_frozen=False, model_parallel=True).shard_frozen is False


def test_other_things_that_are_refused(folder):
    with pytest.raises(HyperParamsError, match="`shard_frozen=True` does not go with `quantize_"):
        toy_hparams(shard_frozen=True, quantize_frozen="8bit")
    with pytest.raises(
        HyperParamsError, match="`shard_frozen=True` does not go with `layers=auto`"
    ):
        toy_hparams(shard_frozen=True, layers="auto", rewrite_module_tmp="auto", lr="auto")
    with pytest.raises(ModelError, match="`shard_frozen=true` needs several processes"):
        load_model(toy_hparams(model_name=folder, device="cpu", shard_frozen=True))
    pair = (toy_model("llama"), toy_tokenizer())
    with pytest.raises(ModelError, match="this one is whole on every process already"):
        load_model(toy_hparams(model_name=pair, shard_frozen=True))


def test_a_model_without_a_list_of_layers(folder):
    skeleton = model_without_weights(folder)
    skeleton.config.num_hidden_layers = 99
    h = toy_hparams(model_name=folder, device="cpu", shard_frozen=True)
    with pytest.raises(ModelError, match="does not suit this model and place: no list of layers"):
        places(skeleton, h, CPU, Four())
    with pytest.raises(ModelError, match="does not suit this model and place: no list of layers"):
        places(None, h, CPU, Four())
    h.shard_frozen = None
    assert places(skeleton, h, CPU, Four()) == (None, None)


def test_layers_that_share_weights_are_refused(folder):
    h = toy_hparams(model_name=folder, device="cpu", shard_frozen=True, layers=[1])
    skeleton = model_without_weights(folder)
    skeleton.model.layers[3].mlp.up_proj.weight = skeleton.model.layers[2].mlp.up_proj.weight
    with pytest.raises(ModelError, match="a layer above the place shares parameters with another"):
        places(skeleton, h, CPU, Four())
    h.shard_frozen = None
    assert places(skeleton, h, CPU, Four())[1] is None


@pytest.mark.processes
def test_each_machine_holds_a_copy(folder):
    changes = {"layers": [1], "shard_frozen": True}
    ranks = launch(4, "helpers.sharded_ranks:shares", folder, changes, machines=2, timeout=200)
    numel = {n: p.numel() for n, p in model_without_weights(folder).named_parameters()}
    for name, whole in numel.items():
        held = [rank.value[name] for rank in ranks]
        if ".layers.2." in name or ".layers.3." in name:
            assert held == [whole // 2] * 4
        else:
            assert held == [whole] * 4


@pytest.mark.processes
def test_the_command_line_writes_the_whole_model(toy_folder):
    arguments = ("-m", "locft_easyedit", "edit", "--config-name", "toy.yaml", "data=edits.json")
    once = ("num_steps=1", "n=4", "layers=[1]", "save=model")
    command = [*arguments, *once, "output=several", "shard_frozen=true"]
    launch(2, command, timeout=200)
    launch(1, [*arguments, *once, "output=one"], timeout=200)
    one, several = (
        AutoModelForCausalLM.from_pretrained(toy_folder / which / "model").state_dict()
        for which in ("one", "several")
    )
    assert one.keys() == several.keys()
    trained = "model.layers.1.mlp.down_proj.weight"
    for name, value in one.items():
        if name == trained:
            assert torch.allclose(several[name], value, rtol=0, atol=1e-5)
        else:
            assert torch.equal(several[name], value)
    original = AutoModelForCausalLM.from_pretrained(toy_folder / "toy").state_dict()
    assert not torch.allclose(several[trained], original[trained], rtol=0, atol=1e-3)
    AutoTokenizer.from_pretrained(toy_folder / "several" / "model")


def test_a_model_whose_folder_is_not_there_cannot_be_saved():
    model = toy_model()
    h = toy_hparams(model_name="somebody/a-model")
    check_save("model", model, h)
    note_sharded(model, ShardedLayers(2, SINGLE_PROCESS, None))
    check_save("matrices", model, h)
    with pytest.raises(ModelError, match="`save=model`: no process holds the whole model"):
        check_save("model", model, h)


LAYERS, LAYER = 12, 49 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak by itself")
@pytest.mark.processes
def test_no_process_ever_holds_the_whole(tmp_path):
    model = toy_model(
        "llama",
        num_hidden_layers=LAYERS,
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    sizes = [sum(p.numel() for p in layer.parameters()) * 4 for layer in model.model.layers]
    assert sizes[0] == pytest.approx(LAYER, rel=0.02)
    model.save_pretrained(tmp_path, max_shard_size="30MB")
    toy_tokenizer().save_pretrained(tmp_path)
    del model
    # Freed memory goes back to the system at once: the allocator's hoard is not what is measured.
    options = {"timeout": 200, "environment": {"MALLOC_MMAP_THRESHOLD_": "131072"}}
    [whole] = launch(1, "helpers.sharded_ranks:most_memory", str(tmp_path), None, **options)
    assert whole.value["grown"] > LAYERS * LAYER  # the measurement sees it
    for rank in launch(3, "helpers.sharded_ranks:most_memory", str(tmp_path), True, **options):
        held = rank.value["held"]
        assert held == pytest.approx((1 + (LAYERS - 1) / 3) * LAYER, rel=0.1)
        # The shares and one layer, as it is read or gathered: 1.25 layers were measured.
        assert held < rank.value["grown"] < held + 2 * LAYER
