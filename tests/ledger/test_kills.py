"""A process that is killed while it writes: the log is whole, and the next one makes the same."""

import os
import signal

import pytest
import torch
from helpers.ledgers import filled_ledger, matrix, opened
from helpers.toys import toy_requests

from locft_easyedit.ledger import ledger as ledger_module
from locft_easyedit.ledger import log as log_module
from locft_easyedit.ledger.log import COPY, LOG
from locft_easyedit.ledger.states import States
from locft_easyedit.ledger.trainer import Trainer

REQUESTS = toy_requests(5)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment, monkeypatch):
    """Lets this process end at a moment of its next command."""
    write = log_module._append

    def torn(path, line):
        if moment == "in the line" and path.name == LOG:
            with path.open("ab") as file:
                file.write(line[: len(line) // 2])
            die()
        if moment == "before the copy" and path.name == COPY:
            die()
        write(path, line)

    if moment == "in the check":
        monkeypatch.setattr(Trainer, "wrong", die)
    elif moment == "in the matrices":
        monkeypatch.setattr("locft_easyedit.utils.files.os.replace", die)
    elif moment == "before the line":
        monkeypatch.setattr(ledger_module.Log, "append", die)
    else:
        monkeypatch.setattr(log_module, "_append", torn)


def act(ledger, action):
    return ledger.add(REQUESTS[3:5]) if action == "add" else ledger.retract([2])


MOMENTS = ["in the check", "in the matrices", "before the line", "in the line", "before the copy"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The matrices after a command that nobody disturbed, by command."""
    found = {}
    for action in ("add", "retract"):
        ledger = filled_ledger(tmp_path_factory.mktemp("reference"), n_commits=1)
        act(ledger, action)
        found[action] = matrix(ledger.model)
    return found


@pytest.mark.parametrize(
    ("action", "moment"), [*(("add", moment) for moment in MOMENTS), ("retract", MOMENTS[2])]
)
def test_killed(tmp_path, reference, action, moment, monkeypatch):
    ledger = filled_ledger(tmp_path, n_commits=1)
    child = os.fork()
    if not child:
        try:
            die_at(moment, monkeypatch)
            act(ledger, action)
        finally:
            os._exit(1)  # it should not have come here
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    again = opened(tmp_path)
    committed = moment == "before the copy"
    assert len(again.log.events) == 2 + committed
    assert bool(again.log.damage) == (moment == "in the line")
    if not committed:
        act(again, action)
    assert torch.equal(matrix(again.model), reference[action])
    assert not [number for number in States(tmp_path).kept() if number > 2]
    found = again.verify()
    assert (found.n_events, found.problems, found.lost) == (3, [], [])
