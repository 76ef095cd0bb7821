"""What the processes of tests/ledger/test_processes.py do; each function runs as one rank."""

import os
from pathlib import Path
from unittest import mock

import torch

from helpers.ledgers import NAME, ledger_hparams, matrix, new_ledger, opened, superseding
from helpers.toys import toy_requests
from locft_easyedit.distributed.world import get_world
from locft_easyedit.errors import LocFTError
from locft_easyedit.ledger import trainer
from locft_easyedit.ledger.ledger import Ledger

REQUESTS = toy_requests(12)
FEW_ROUNDS = 3  # of repair: those that settle nothing take time alone


def begun(folder, base=None, **changes):
    """Returns a new ledger of a wide toy, or of the model in a folder."""
    if base is None:
        return new_ledger(folder, **changes)
    hparams = ledger_hparams(model_name=base, device="cpu", **changes)
    return Ledger.init(folder, hparams, progress=False)


def life(folder, **case):
    """Returns a ledger in which facts have come, were replaced and have gone.

    Six facts come at first, then one alone, and one that replaces another.
    """
    ledger = begun(folder, repairs=FEW_ROUNDS, **case)
    ledger.add(REQUESTS[:6], source="first")
    ledger.add(REQUESTS[6:7])
    ledger.add(superseding(REQUESTS[1:2]) + REQUESTS[7:9])
    ledger.retract([1, 7])
    return ledger


def of_events(ledger):
    """Returns what the log says of each event that is the same when it is repeated."""
    keys = ("facts", "trained", "how", "state", "moments")
    return [{key: event.said.get(key) for key in keys} for event in ledger.log.events[1:]]


def lives(folder, cases):
    """Makes a ledger of each case; returns, of each, its events, checks and the matrix's bits."""
    found = []
    for number, case in enumerate(cases):
        ledger = life(Path(folder, str(number)), **case)
        checked = ledger.verify()
        path = ledger.export(Path(folder, f"edit {number}"))
        value = next(iter(ledger.matrices().values()))
        found.append(
            [
                of_events(ledger),
                checked.lost,
                checked.problems,
                str(path),
                value.double().sum().item(),
            ]
        )
    return found


def replayed(folder):
    """Returns what a ledger that is there says of itself when every event is made anew."""
    ledger = opened(folder)
    found = ledger.verify(replay=True)
    return [found.problems, found.lost, ledger.matrices().keys() == ledger.matrices(1).keys()]


def exactly(folder):
    """Takes facts out exactly; returns the states after it, and those without these facts."""
    ledger = begun(Path(folder, "ledger"))
    ledger.add(REQUESTS[:3])
    ledger.add(REQUESTS[3:5])
    ledger.retract([2, 4], exact=True)
    never = begun(Path(folder, "never"))
    never.add([REQUESTS[0], REQUESTS[2]])
    never.add(REQUESTS[4:5])
    return [one.log.events[-1].said["state"] for one in (ledger, never)]


def after_damage(folder):
    """Opens a ledger of which files are gone, and goes on with it; returns its last state."""
    ledger = opened(folder)
    ledger.add(REQUESTS[9:11])
    return [ledger.log.events[-1].said[key] for key in ("state", "moments")]


def failures(folder):
    """Returns what each rank meets where something is wrong with one; nothing may be changed."""
    rank = get_world().rank
    ledger = begun(Path(folder, "ledger"))
    ledger.add(REQUESTS[:2])
    found = []

    def attempt(act):
        one = opened(ledger.path)
        before = matrix(one.model)
        try:
            act(one)
            message = ""
        except LocFTError as error:
            message = f"{type(error).__name__}: {error}"
        value = dict(one._given[0].named_parameters())[NAME]
        whole = torch.equal(value, before)
        found.append([message, whole and len(opened(ledger.path).log.events) == 2])

    def without_room(one):
        recorder = one._ready().changes.trainer.facts.recorder
        if rank == 1:
            recorder.budget.host_gib = recorder.budget.disk_gib = 0.0
        one.add(REQUESTS[2:4])

    def unwritable(one):
        if rank == 0:
            one._ready().states.folder.joinpath("state-000002.safetensors").mkdir()
        else:
            one._ready()
        try:
            one.add(REQUESTS[2:4])
        finally:
            if rank == 0:
                one.path.joinpath("state-000002.safetensors").rmdir()

    def of_another_model(one):
        if rank == 1:
            with torch.no_grad():
                one._given[0].model.layers[0].mlp.down_proj.weight.mul_(2)
        one._bound = None
        one.add(REQUESTS[2:4])

    attempt(lambda one: one.add(REQUESTS[2 + rank : 4 + rank]))
    attempt(without_room)
    attempt(unwritable)
    attempt(lambda one: one.retract([3]))
    attempt(of_another_model)
    again = opened(ledger.path)
    again.add(REQUESTS[2:4])  # all is as if nothing had been
    return [found, again.verify().lost]


def one_dies(folder):
    """Adds facts, and ends rank 1 while they are checked; returns what rank 0 is told."""
    ledger, wrong = opened(folder), trainer.Trainer.wrong

    def dying(self, *args, **options):
        if get_world().rank == 1:
            os._exit(9)
        return wrong(self, *args, **options)

    with mock.patch.object(trainer.Trainer, "wrong", dying):
        try:
            ledger.add(REQUESTS[9:11])
        except LocFTError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def in_use(folder):
    """Returns what each rank is told of a ledger in which another run writes."""
    try:
        opened(folder).add(REQUESTS[10:11])
    except LocFTError as error:
        return str(error)
    return ""


def editor_calls(folder):
    """Edits twice through EasyEdit's editor with `ledger_dir`; returns the accuracies."""
    import locft_easyedit
    from helpers.ledgers import wide_model
    from helpers.toys import toy_tokenizer

    easyedit = locft_easyedit.register()
    pair = (wide_model(), toy_tokenizer(pad_is_eos=True))
    hparams = ledger_hparams(model_name=pair, device="cpu", ledger_dir=folder)
    found = []
    for part in (REQUESTS[:3], REQUESTS[3:5]):
        editor = easyedit.BaseEditor.from_hparams(hparams)
        metrics, *_ = editor.edit_requests(part, sequential_edit=True, verbose=False)
        found.append([entry["post"]["rewrite_acc"] for entry in metrics])
    return found


def chooses(folder):
    """Lets the first facts choose the place; returns the rank's settings and states."""
    auto = {"layers": "auto", "rewrite_module_tmp": "auto", "lr": "auto", "num_steps": 5}
    ledger = begun(folder, **auto)
    ledger.add(REQUESTS[:8])
    ledger.add(REQUESTS[8:9])
    h = ledger.hparams
    states = [event.said["state"] for event in ledger.log.events[1:]]
    return [h.layers, h.rewrite_module_tmp, h.lr, states]
