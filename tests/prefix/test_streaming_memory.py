"""A model that does not fit: the system itself refuses memory beyond a limit.

RLIMIT_DATA binds here: it counts what a process allocates and its private maps of files, which is
how weights are loaded, and not the shared maps of states. RLIMIT_AS would count code as well. The
limit begins when the model is loaded, because loading maps all parts of a checkpoint at once
without reading them; what loading really takes is seen in the most memory that was resident.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers.toys import REPOSITORY, toy_hparams, toy_model, toy_requests, toy_tokenizer
from safetensors.torch import load_file

from locft_easyedit.api import edit_model
from locft_easyedit.modeling.loading import load_model

# Bytes beyond what interpreter and libraries take. Streaming needs 350 to 400 MiB, by how far
# the thread that reads is ahead.
LIMIT = 450 * 2**20
FROZEN = 12
SCRIPT = """
    import json, resource, sys
    import torch
    from safetensors.torch import save_file
    from helpers.toys import toy_hparams, toy_requests
    from locft_easyedit.api import edit_model
    from locft_easyedit.modeling.loading import load_model

    def taken(key):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    folder, stream, limit, out = sys.argv[1:]
    torch.set_num_threads(1)
    h = toy_hparams(
        model_name=folder, device="cpu", layers=[12], num_steps=2, stream_frozen=stream == "stream"
    )
    data, resident = taken("VmData"), taken("VmRSS")
    model, tokenizer = load_model(h)
    resource.setrlimit(resource.RLIMIT_DATA, (data + int(limit), data + int(limit)))
    try:
        result = edit_model(model, tokenizer, toy_requests(8), h, progress=False)
    except (MemoryError, RuntimeError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
    else:
        save_file(result.new, out)
        grown = taken("VmHWM") - resident
        print(json.dumps({"losses": result.step_losses, "grown": grown}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The folder of a model of 12 layers of 49 MiB below the one that is trained."""
    folder = tmp_path_factory.mktemp("large")
    model = toy_model(
        "llama",
        num_hidden_layers=FROZEN + 1,
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=8,
        num_key_value_heads=8,
        initializer_range=0.02,
    )
    frozen = [p for layer in model.model.layers[:FROZEN] for p in layer.parameters()]
    assert sum(p.numel() for p in frozen) * 4 > 1.2 * LIMIT
    model.save_pretrained(folder, max_shard_size="30MB")
    toy_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 10
    return folder


def run(folder, how, out):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), how, str(LIMIT), str(out)],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    # Where it is the C library that is refused memory, for a thread, no exception is raised.
    if done.returncode and "cannot allocate memory" in done.stderr:
        return {"error": done.stderr}
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts maps of files as data")
def test_a_model_that_does_not_fit_is_edited_to_the_bit(large, tmp_path):
    refused = run(large, "resident", tmp_path / "none")
    assert "error" in refused
    assert "memory" in refused["error"]
    streamed = run(large, "stream", tmp_path / "streamed")
    assert "error" not in streamed
    assert streamed["grown"] < LIMIT  # loading included

    h = toy_hparams(model_name=str(large), device="cpu", layers=[FROZEN], num_steps=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as above: products are added up in one order
    try:
        model, tokenizer = load_model(h)
        expected = edit_model(model, tokenizer, toy_requests(8), h, progress=False)
    finally:
        torch.set_num_threads(threads)
    assert streamed["losses"] == expected.step_losses
    found = load_file(tmp_path / "streamed")
    assert found.keys() == expected.new.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.new.items())
    assert all(not torch.equal(found[n], value) for n, value in expected.original.items())
