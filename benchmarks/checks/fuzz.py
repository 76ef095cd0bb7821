"""Damaged and hostile input, thousands of times: a result or a typed error, and nothing else.

    python benchmarks/checks/fuzz.py --n 10000 [--kind hparams] [--seed 0] [--json OUT]

Each kind of input begins as valid files, which are then mutated: bytes flipped, cut and spliced,
and within JSON and YAML values exchanged for hostile ones. Every input is read in a folder of its
own. It is a violation if reading ends in anything but a result or a `LocFTError`, takes longer than
`--seconds`, changes or leaves a file, opens one elsewhere, starts a process or connects anywhere,
or tells the value of an environment variable. Exit status 1 if there was one.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from locft_easyedit.data.readers import read_requests
from locft_easyedit.data.requests import distinct_edits, make_requests
from locft_easyedit.delta.delta import Delta
from locft_easyedit.errors import LocFTError
from locft_easyedit.evaluation.prompts import Questions
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.modeling.model_name import check_model_name
from locft_easyedit.prefix.state_file import StateFile
from locft_easyedit.training.checkpoint_file import Saved, read_checkpoint, write_checkpoint
from locft_easyedit.training.identity import Identity
from locft_easyedit.training.progress import Progress
from locft_easyedit.training.result import EditResult

SECRET_NAME, SECRET = "LOCFT_FUZZ_SECRET", "c4nary-7d1f"

# The kinds of input. One more is one line more: valid files, how they are written, a reader.


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        seeds: Returns valid files' contents.
        read: Reads one; whatever it returns counts as accepted.
        suffix: Of the file.
        form: `json`, `yaml` or `bytes`: whether mutations know its structure.
        whole: Mutate the structure alone, never the text.
    """

    seeds: Callable[[], Sequence[bytes]]
    read: Callable[[Path], Any]
    suffix: str = ".json"
    form: str = "json"
    whole: bool = False


REQUESTS = make_requests(
    ["The capital of France is", "Who wrote Faust?"],
    ["Lyon", "Ibsen"],
    ground_truth=["Paris", "Goethe"],
    rephrase_prompts=["France's capital is", "Faust is by"],
    subject=["France", "Faust"],
    locality_inputs={
        "near": {"prompt": ["Oslo is in", ["a", "b"]], "ground_truth": ["N", ["c", "d"]]}
    },
    portability_inputs={"hop": {"prompt": ["x", "y"], "ground_truth": ["z", "w"]}},
)
ZSRE = [{
    "subject": "Faust", "src": "Who wrote Faust?", "pred": "Goethe", "rephrase": "Faust is by?",
    "alt": "Ibsen", "answers": ["Goethe"], "loc": "nq question: who is it", "loc_ans": "he",
    "cond": "Goethe >> Ibsen", "portability": {"New Question": "Where?", "New Answer": "Oslo"},
}]  # fmt: skip
COUNTERFACT = [{
    "case_id": 0, "requested_rewrite": {
        "prompt": "{} is in", "subject": "Oslo", "target_new": {"str": "Peru"},
        "target_true": {"str": "Norway"}},
    "paraphrase_prompts": ["Oslo lies in"], "neighborhood_prompts": ["Bergen is in"],
}]  # fmt: skip
KNOWEDIT = [{
    "subject": "Oslo", "prompt": "Oslo is in", "target_new": [["Peru", "P"]],
    "ground_truth": "Norway",
    "portability": {"Reasoning": [{"prompt": "a", "ground_truth": [["b"]]}]},
    "locality": {"Forgetfulness": [{"prompt": "c", "ground_truth": [["d", "e"]]}]},
}, {"text": "He was", "labels": "a poet", "concept": "Ibsen", "locality": {}}]  # fmt: skip
HPARAMS = {
    "alg_name": "LocFT-BF", "model_name": "./folder", "device": "cpu", "layers": [2],
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj.weight", "lr": 5e-4, "num_steps": 25,
    "batch_size": 100, "dtype": "float32", "prefix_dir": "states", "on_conflict": "train",
}  # fmt: skip


def _json(*values: Any) -> Callable[[], list[bytes]]:
    return lambda: [json.dumps(value).encode() for value in values]


def _edits(path: Path) -> Any:
    try:
        requests = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Refused("Requests come from a program: what is no JSON is no input.") from error
    return distinct_edits(requests), list(Questions(requests))


def _data(path: Path) -> Any:
    return read_requests(path)


def _trainable(path: Path) -> Any:
    requests = read_requests(path)
    return distinct_edits(requests), list(Questions(requests))


def _seal(path: Path) -> Any:
    """Reads states with this seal: they are refused in words, or the seal says what it said."""
    states = path.with_name("x.states")
    file, reason = StateFile.open_whole(states, "it", 3, 4, torch.float32)
    if file is None:
        raise Refused(reason)
    file.close()
    return file


def _state_file(folder: Path) -> Path:
    """Writes states with their seal; returns the seal."""
    file = StateFile.create(folder / "x.states", 3, 4, torch.float32)
    file.put(torch.arange(3), torch.ones(3, 4))
    file.seal("it")
    file.close()
    return folder / "x.states.json"


def _seal_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return [_state_file(Path(folder)).read_bytes()]


def _written(write: Callable[[Path], None]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "file"))
        return Path(folder, "file").read_bytes()


def _edit_seeds() -> list[bytes]:
    """Returns edits of a model of two matrices, with and without the values they replaced."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 4))
    name = "1.weight"
    original = {name: model[1].weight.detach().clone()}
    new = {name: torch.full((4, 3), 0.5)}
    edits = distinct_edits(REQUESTS)
    result = EditResult([2.0, 0.5], [], original, new, {}, 2, True, 2, edits, True, True)
    made = Delta.from_result(result, model, LocFTBFHyperParams(**HPARAMS))
    return [
        _written(made.save),
        _written(lambda path: made.save(path, originals=False)),
    ]


def _checkpoint_seeds() -> list[bytes]:
    progress = Progress.start(42, 4)
    progress.epoch, progress.losses, progress.step_losses = 1, [1.0], [1.5, 0.5]
    tensors = {f"{part}.a": torch.ones(3, 4) for part in ("master", "exp_avg", "exp_avg_sq")}
    identity = Identity({"precision": "float32"}, {"number of edits": 2}, {"lr": 1e-3}, {})
    saved = Saved(identity, {"cut": "mlp", "packed": True}, progress, tensors)
    return [_written(lambda path: write_checkpoint(path, saved))]


def _index(path: Path) -> Any:
    folder = path.parent
    shutil.copy(path, folder / "model.safetensors.index.json")
    try:
        check_model_name(str(folder))
    finally:
        (folder / "model.safetensors.index.json").unlink()
    return True


class Refused(LocFTError):
    """What a reader that raises nothing says no with."""


KINDS: dict[str, Kind] = {
    "requests": Kind(_json(REQUESTS, REQUESTS[:1]), _edits, whole=True),
    "hparams": Kind(
        lambda: [yaml.safe_dump(HPARAMS).encode(), b"# c\nlr: 5e-4\nlayers: [1, 2]\n"],
        LocFTBFHyperParams.from_hparams,
        ".yaml",
        "yaml",
    ),
    "hparams JSON": Kind(_json(HPARAMS), LocFTBFHyperParams.from_hparams),
    "data ZsRE": Kind(_json(ZSRE, ZSRE * 2), _trainable),
    "data CounterFact": Kind(_json(COUNTERFACT), _trainable),
    "data KnowEdit": Kind(_json(KNOWEDIT, KNOWEDIT[:1]), _trainable),
    "data JSON lines": Kind(
        lambda: [b"\n".join(json.dumps(r).encode() for r in KNOWEDIT)], _data, ".jsonl", "bytes"
    ),
    "prefix seal": Kind(_seal_seeds, _seal, ".states.json"),
    "edit": Kind(_edit_seeds, Delta.load, ".safetensors", "bytes"),
    "checkpoint": Kind(_checkpoint_seeds, read_checkpoint, ".safetensors", "bytes"),
    "model index": Kind(_json({"weight_map": {"a": "config.json", "b": "config.json"}}), _index),
}

# Mutations


def deep(depth: int) -> Any:
    """Returns lists in lists."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: list[Any] = [
    None, True, 0, -1, 2**31, 2**64, 10**400, 1e308, float("nan"), float("inf"), "", " ",
    "a" * 5000, "\ud800", "a\0b", "../../../etc/passwd", "/etc/passwd", "${lr}", "???", "1e-3",
    "${oc.env:LOCFT_FUZZ_SECRET}", "{}", "[bold]", "..", list, dict, lambda: [[]],
    lambda: {"": {}}, lambda: [None], lambda: deep(60), lambda: deep(900),
]  # fmt: skip
TOKENS = [
    b"[", b"]", b"{", b"}", b'"', b":", b",", b"null", b"NaN", b"-Infinity", b"1e999", b"\\ud800",
    b"\\u0000", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b"[" * 3000, b"9" * 5000,
    b"!!python/object/apply:os.system [x]", b"&a [*a]", b"*a", b"<<: *a", b"!!timestamp x", b"? ",
    b"- ", b"|\n", b"${oc.env:LOCFT_FUZZ_SECRET}", b"%", b"!!bool x", b"---\n", b"\xc3",
]  # fmt: skip


def mutated_bytes(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Returns other bytes, one to four changes away."""
    made = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        a, b = sorted(rng.randrange(len(made) + 1) for _ in range(2))
        what = rng.randrange(7)
        if what == 0 and made:
            made[min(a, len(made) - 1)] ^= 1 << rng.randrange(8)
        elif what == 1:
            del made[a:]
        elif what == 2:
            del made[a:b]
        elif what == 3:
            made[a:a] = made[a:b]
        elif what == 4:
            c, d = sorted(rng.randrange(len(other) + 1) for _ in range(2))
            made[a:b] = other[c:d]
        elif what == 5:
            made[a:a] = rng.choice(TOKENS)
        else:
            made[a:a] = rng.randbytes(rng.randint(1, 8))
    return bytes(made)


def hostile(rng: random.Random) -> Any:
    """Returns a value that nobody expects; lists and mappings are made anew."""
    value = rng.choice(HOSTILE)
    return value() if callable(value) else value


def mutated_value(value: Any, rng: random.Random) -> Any:
    """Returns a copy with one to three of its parts exchanged, renamed, repeated or gone."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        holders = list(_holders(value))
        if not holders:
            return hostile(rng)
        holder = rng.choice(holders)
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        what = rng.randrange(5)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[str(hostile(rng))[:99]] = holder.pop(key)
        elif what == 2:
            holder[key] = [holder[key]] * rng.randint(1, 3)
        elif what == 3:
            holder[key] = {"prompt": holder[key]}
        else:
            holder[key] = hostile(rng)
    return value


def _holders(value: Any) -> Any:
    waiting, depth = [value], 0
    while waiting and depth < 500:
        one, depth = waiting.pop(), depth + 1
        if isinstance(one, (dict, list)) and one:
            yield one
            waiting += one.values() if isinstance(one, dict) else one


def mutated(kind: Kind, seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Returns one input of a kind."""
    content = rng.choice(seeds)
    if kind.form != "bytes" and (kind.whole or rng.random() < 0.6):
        load = json.loads if kind.form == "json" else yaml.safe_load
        value = mutated_value(load(content), rng)
        try:
            text = json.dumps(value) if kind.form == "json" else yaml.safe_dump(value)
            content = text.encode("utf-8", "surrogatepass")
        except (RecursionError, ValueError, yaml.YAMLError):
            content = b"[" * 3000 + b"]" * 3000
        if kind.whole or rng.random() < 0.8:
            return content
    return mutated_bytes(content, rng.choice(seeds), rng)


# Watching


class TooSlow(BaseException):
    """The time of one input is over."""


class Watch:
    """Sees every file that is opened, and what else reaches beyond this process."""

    FORBIDDEN = (
        "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
        "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod",
        "os.truncate", "shutil.", "ctypes.dlopen",
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.on = False
        self.seen: list[str] = []
        self.known = tuple({sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), "/proc",
                            "/sys", *(p for p in sys.path if p)})  # fmt: skip
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            self._open(*args[:3])
        elif event.startswith(self.FORBIDDEN) and self.folder not in str(args):
            self.seen.append(f"{event} {args!r:.100}")

    def _open(self, path: Any, mode: Any, flags: Any) -> None:
        if isinstance(path, int):
            return
        name = os.path.abspath(os.fsdecode(path))
        writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        inside = name.startswith(self.folder + os.sep)
        if not inside and (writes or not name.startswith(self.known)):
            self.seen.append(f"opened {name!r:.100} to {'write' if writes else 'read'}")


def tree_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns every file below a folder with its size and time."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if not path.is_dir()
    }


@dataclass
class Counts:
    """What came of the inputs of one kind."""

    inputs: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    slowest_ms: float = 0.0
    first: str = ""


class Fuzzer:
    """Reads inputs, one after the other, in a folder that nothing may leave."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.outer = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.folder = self.outer / "a" / "b"
        self.folder.mkdir(parents=True)
        (self.outer / "canary").write_text("alive")
        (self.folder / "config.json").write_text("{}")
        _state_file(self.folder)
        self.watch = Watch(self.folder)
        os.environ[SECRET_NAME] = SECRET
        sys.dont_write_bytecode = True

        def over(*_: Any) -> None:
            raise TooSlow

        signal.signal(signal.SIGALRM, over)

    def run(self, kind: Kind, n: int, seed: int, name: str) -> Counts:
        """Returns what came of `n` inputs."""
        rng, counts = random.Random(f"{name} {seed}"), Counts()
        seeds = list(kind.seeds())
        path = self.folder / f"x{kind.suffix}"
        for content in tqdm([None] * n, desc=name, unit="input"):
            content = mutated(kind, seeds, rng)
            path.write_bytes(content)
            before = tree_of(self.outer)
            self._read(kind, path, counts)
            if tree_of(self.outer) != before:
                counts.violations.append("a file was changed, left behind or removed")
            if len(counts.violations) > counts.inputs - len(counts.violations) + 50:
                break
            if counts.violations and not counts.first:
                counts.first = repr(content[:300])
        path.unlink(missing_ok=True)
        return counts

    def _read(self, kind: Kind, path: Path, counts: Counts) -> None:
        counts.inputs += 1
        said, start = "", time.perf_counter()
        self.watch.seen = []
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        try:
            self.watch.on = True
            found = kind.read(path)
            counts.accepted += 1
            said = repr(found)[:10_000]
        except LocFTError as error:
            counts.refused[type(error).__name__] += 1
            said = str(error)
            if len(said) > 50_000:
                counts.violations.append(f"a message of {len(said)} characters")
        except TooSlow:
            counts.violations.append(f"longer than {self.seconds:g} s")
        except Exception as error:
            counts.violations.append(f"{type(error).__name__}: {error}"[:200])
        finally:
            self.watch.on = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        counts.slowest_ms = max(counts.slowest_ms, 1000 * (time.perf_counter() - start))
        if SECRET in said:
            counts.violations.append("the value of an environment variable was told")
        counts.violations += self.watch.seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10_000, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only these")
    parser.add_argument("--seconds", type=float, default=20.0, help="for one input at most")
    parser.add_argument("--json", type=Path, help="also write the counts here")
    options = parser.parse_args()
    fuzzer, found = Fuzzer(options.seconds), {}
    try:
        for name in options.kind or KINDS:
            found[name] = fuzzer.run(KINDS[name], options.n, options.seed, name)
    finally:
        shutil.rmtree(fuzzer.outer, ignore_errors=True)
    print(f"{'kind':18}{'inputs':>8}{'accepted':>10}{'violations':>12}{'slowest ms':>12}  refused")
    for name, counts in found.items():
        refused = ", ".join(f"{kind} {n}" for kind, n in counts.refused.most_common())
        print(
            f"{name:18}{counts.inputs:>8}{counts.accepted:>10}{len(counts.violations):>12}"
            f"{counts.slowest_ms:>12.0f}  {refused}"
        )
    for name, counts in found.items():
        for what, times in Counter(counts.violations).most_common(10):
            print(f"{name}: {times} times: {what}")
        if counts.first:
            print(f"{name}, the first: {counts.first}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory: {peak:.2f} GiB")
    if options.json is not None:
        options.json.write_text(json.dumps({k: vars(v) for k, v in found.items()}, indent=2))
    return 1 if any(counts.violations for counts in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
