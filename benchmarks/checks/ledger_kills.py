"""Kills `locft ledger add` and `retract` at random moments, and compares what the next ones make.

    python benchmarks/checks/ledger_kills.py --kills 30
    python benchmarks/checks/ledger_kills.py --model FOLDER --data zsre_1k.json --layer 24

First a ledger that nobody disturbs: facts in a few commits, and some of them taken out again, each
a command of its own. Then the same commands in other folders, each ended by SIGKILL at a moment
drawn at random from its whole run (start, recording, training, check, writing), and given again,
until it is left alone. After every kill the log has to be whole, with the event or without it; at
the end the facts, and the matrices after every event, have to be those of the first ledger bit for
bit. Without `--model` the model is a small llama of random weights: nothing is downloaded. Exit
status 1 if anything differs.
"""

import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kill import log_of, parser_of, prepared, run_apart

PRELOADED = ["locft_easyedit.cli.ledger", "locft_easyedit.modeling.loading"]


def main():
    parser = parser_of(__doc__, kills=30, n=12, lr=3e-3, epochs=10, batch_size=4)
    parser.add_argument("--kills-a-command", type=int, default=2, help="at most")
    parser.add_argument("--commits", type=int, default=3)
    with tempfile.TemporaryDirectory(prefix="locft-ledger-kills-") as scratch:
        return checked(parser.parse_args(), Path(scratch))


def checked(options, scratch):
    commands = commands_of(options, scratch)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # each start costs no import
    reference, seconds = scratch / "reference", []
    for command in commands:
        start = time.perf_counter()
        if run(context, command, reference) != 0:
            print(log_of(reference))
            raise SystemExit("The ledger that nobody disturbed failed.")
        seconds.append(time.perf_counter() - start)
    expected = events_of(reference)
    print(f"undisturbed: {sum(seconds):.1f} s, {len(expected)} events", flush=True)

    draw, moments = random.Random(options.seed), Counter()
    wrong, ledgers, kills = [], 0, 0
    while kills < options.kills:
        folder = scratch / f"ledger-{ledgers}"
        ledgers += 1
        for i, command in enumerate(commands):
            done = False
            for _ in range(options.kills_a_command if i else 0):
                if kills == options.kills or done:
                    break
                if run(context, command, folder, draw.uniform(0, seconds[i])) is not None:
                    done = True
                    break
                kills += 1
                moment, problem = state_of(folder, i)
                moments[moment] += 1
                wrong += [f"{folder.name}, {command[1]} killed {moment}: {problem}"] * bool(problem)
                done = len(events_of(folder)) > i
            if not done and (status := run(context, command, folder)) != 0:
                wrong.append(f"{folder.name}: {command[1]} gave {status}\n{log_of(folder)}")
        if events_of(folder) != expected:
            wrong.append(f"{folder.name}: facts or matrices are others")
        print(f"{ledgers} ledgers, {kills} kills, {len(wrong)} wrong", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    for moment, count in moments.most_common():
        print(f"{count:5}  killed {moment}")
    print("\n".join(wrong) or "every ledger: facts and matrices equal bit for bit")
    if options.json:
        figures = {"kills": kills, "ledgers": ledgers, "moments": dict(moments), "wrong": wrong}
        Path(options.json).write_text(json.dumps(figures, indent=1))
    return 1 if wrong else 0


def commands_of(options, scratch):
    """Writes what the commands need; returns their arguments, with LEDGER where the folder goes."""
    yaml, data = prepared(options, scratch)
    commands = [["ledger", "init", "LEDGER", "--config-name", yaml]]
    each = -(-options.n // options.commits)
    for i in range(options.commits):
        # Each holds what came before as well: that is in already.
        n = min(options.n, each * (i + 1))
        commands.append(["ledger", "add", "LEDGER", f"data={data}", f"n={n}"])
    return [*commands, ["ledger", "retract", "LEDGER", "1", str(each + 1)]]


def run(context, command, folder, kill_after=None):
    """Runs a command on a ledger; returns its exit status, or `None` if it was killed."""
    given = [str(folder) if word == "LEDGER" else word for word in command]
    return run_apart(context, given, folder, kill_after)


def events_of(folder):
    """What each event of a ledger says of facts and matrices."""
    from locft_easyedit.ledger.log import LOG, Log

    if not (folder / LOG).exists():
        return []
    keys = ("facts", "superseded", "exact", "state")
    return [
        (event.kind, {key: event.said.get(key) for key in keys})
        for event in Log.read(folder).events
    ]


def state_of(folder, n_before):
    """Returns how far a killed command had come, and what is not as it should be."""
    from locft_easyedit.ledger.ledger import Ledger
    from locft_easyedit.ledger.states import States

    try:
        ledger = Ledger.open(folder)
        n_events = len(ledger.log.events)
        damaged = [line for line in ledger.log.damage if "copy is" in line]
        last = ledger.log.events[-1]
        if "state" in last.said and States(folder).load(last.number, last.said["state"]) is None:
            damaged.append("the last event's matrices are not whole")
    except ValueError as error:
        return "in an unknown state", f"{type(error).__name__}: {error}"
    if n_events not in (n_before, n_before + 1):
        damaged.append(f"{n_events} events after {n_before}")
    written = any(number >= n_events for number in States(folder).kept())
    moments = {True: "after its event", False: "before its event"}
    moment = moments[n_events > n_before]
    return ("between matrices and event" if written else moment), "; ".join(damaged) or None


if __name__ == "__main__":
    sys.exit(main())
