"""Several stores as one."""

import torch

from locft_easyedit.prefix.joined_store import JoinedStore
from locft_easyedit.prefix.store import Budget, StateStore

CPU = torch.device("cpu")


def test_joined(tmp_path):
    values = torch.randn(12, 5)
    # In memory; in a file that stays; in a temporary file alone.
    budgets = [Budget(), Budget(folder=str(tmp_path)), Budget(host_gib=0.0, folder=str(tmp_path))]
    edges, stores = [0, 3, 4, 12], []
    for i, budget in enumerate(budgets):
        path = tmp_path / "kept.safetensors" if i == 1 else None
        store = StateStore(edges[i + 1] - edges[i], 5, values.dtype, CPU, budget, path=path)
        store.put(torch.arange(store.n_tokens), values[edges[i] : edges[i + 1]])
        stores.append(store)
    joined = JoinedStore(stores)
    where = torch.tensor([[11, 0, 3], [2, 4, 11]])
    assert torch.equal(joined.get(where), values[where])
    assert joined.get(torch.zeros(0, dtype=torch.long)).shape == (0, 5)
    assert joined.n_tokens == 12
    assert joined.file is stores[2].file  # that one is read whenever states are asked for
    joined.close()
    assert torch.equal(stores[0].get(torch.arange(3)), values[:3])
