"""What `locft COMMAND --help` says. Nothing here needs torch: help is there at once."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Sequence

from ..evaluation.capability.metrics import OWN_TASKS, PAPER_TASKS
from ..evaluation.metric_names import DEFAULT_METRICS, METRICS
from ..hparams import LocFTBFHyperParams, shipped_yamls
from ..hparams_rules import ALG_NAME, DTYPES, PLUS_NAME
from ..plan.workload import ASSUMED_DISK, ASSUMED_HOST, Machine

_OPTIONS = ("-h", "--help")
# `modeling.locations` has them, which takes seconds to import.
MODULES = (
    "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down",
    "shared_gate", "shared_up", "shared_gate_up", "shared_down",
    "expert_gate", "expert_up", "expert_gate_up", "expert_down", "mlp", "layer",
)  # fmt: skip

EDIT = f"""Edits a model with {ALG_NAME}.

Usage: locft edit --config-name NAME data=FILE [n=N] [output=DIR] [save=matrices|model|none]
                  [metrics=[A,B,...]] [resume=true|false] [KEY=VALUE ...]

Interrupted by whatever (Ctrl-C, a kill, a full disk), the same command goes on where it stopped.

  --config-name NAME   one of the hparams YAMLs below, or the path of one
  --config-dir DIR     also look for YAMLs in DIR
  data=FILE            a JSON file: ZsRE, CounterFact, KnowEdit, WikiBigEdit or a list of requests
  n=N                  only the first N edits
  output=DIR           where results go (outputs/DATE/TIME)
  resume=BOOL          go on with an interrupted run of the same command (default), or begin anew
  metrics=[A,B,...]    of {", ".join(METRICS)};
                       default [{",".join(DEFAULT_METRICS)}]. `wrapped` asks in chat and in other
                       wrappers too, and takes most of the time of measuring: leave it out to save
                       it
  save=WHAT            the edited matrices (default), the whole edited model, or none
  alg_name=NAME        {ALG_NAME}, or {PLUS_NAME}, which trains other forms of each prompt
                       (forms=[chat,question_answer,context]) and confines the change
                       (preserve=[sampled,neighbours,FILE,...])
  tuning=lora          train a low-rank change (lora_rank=R) in place of the matrices
  KEY=VALUE            any hyper-parameter: lr=1e-3 layers=[22] model_name=FOLDER device=cpu;
                       layers=auto finds the layer, rewrite_module_tmp=auto the module and
                       lr=auto the rate with a few of the edits
  -m, --cfg job, ...   any option of Hydra (https://hydra.cc): `-m lr=1e-3,2e-3` edits once for each
                       value, and ends with one table
"""

PLAN = f"""Says what an edit will take, from the model's config.json alone.

Usage: locft plan --config-name NAME n=N gpu=SIZE [KEY=VALUE ...]

  --config-name NAME   one of the hparams YAMLs below, or the path of one
  --config-dir DIR     also look for YAMLs in DIR
  n=N                  edits
  gpu=SIZE             memory of a GPU: 80GiB, 80GB, 80G or 80; left out for device=cpu
  gpus=N               GPUs of a node (1)
  nodes=N              nodes (1)
  host=SIZE            memory of a node's host ({ASSUMED_HOST})
  disk=SIZE            room on a node's disk for the frozen prefix ({ASSUMED_DISK})
  rate=R               TFLOP/s that a GPU reaches (an assumption by precision and device)
  read=R               GB/s that a node's disk reads ({Machine.read:g})
  bandwidth=R          GB/s that a GPU's memory moves ({Machine.bandwidth:g})
  launch=R             ms to start a layer's kernels, forward and backward ({Machine.launch:g})
  nvlink=R             GB/s of rings between the GPUs of a node ({Machine.nvlink:g})
  network=R            GB/s of a node's network each way, all cards together ({Machine.network:g})
  tokens=T             mean tokens an edit (15.6), with EOS
  targets=T            how many of them are targets (4.3)
  epochs=N             passes over all edits (num_steps of the YAML)
  evaluate=false       no metrics before and after
  verbose=true         also every setting that was looked at, memory by part, the work, a step, and
                       what is assumed
  output=FILE          also write everything as JSON
  KEY=VALUE            any hyper-parameter: layers=[22] dtype=bfloat16 model_name=FOLDER

`model_name` needs no weights: a folder with a config.json will do, or the name of a model whose
shapes are shipped.
"""

LOCATE = f"""Finds the place to edit: tries layers, modules and learning rates, and measures each.

Usage: locft locate --config-name NAME data=FILE [n=N] [output=DIR] [KEY=VALUE ...]

  --config-name NAME     hparams: the model, its device and the training are those of every cell
  data=FILE              a JSON file: ZsRE, CounterFact, KnowEdit, WikiBigEdit or requests
  n=N                    only the first N edits
  output=DIR             where results go (outputs/locate); the same command goes on there
  sweep_layers=[A,B,...] layers to visit; all of them by default
  every=N                of these every N-th, counted from the last
  sweep_modules=[A,...]  of {", ".join(MODULES[:9])},
                         {", ".join(MODULES[9:13])},
                         {", ".join(MODULES[13:])};
                         by default all that the model has
  sweep_lrs=[A,B,...]    learning rates; by default 0.1, 0.3, 1 and 3 times `lr`
  text=FILE              plain text on which the drift is measured; a fixed one by default
  capability=[A,...]     tasks of lm-evaluation-harness in every cell (slow), capability_limit=N
                         items a task, tasks_dir=DIR for tasks of your own
  devices=[0,1,...]      a process on each; the same device may be named twice
  retry=true             try cells again that diverged, ran out of memory or failed
  KEY=VALUE              any hyper-parameter: num_steps=10 batch_size=50 device=cpu dtype=bfloat16
  -m, ...                any option of Hydra; with -m hydra.sweep.subdir=. worker=1,2,3,4 and a
                         launcher of your cluster, its jobs work on one study
"""

COMPARE = f"""Edits the same model with several methods of EasyEdit, and measures all of them alike.

Usage: locft compare --config-name NAME data=FILE [methods=[...]] [n=N] [output=DIR] [KEY=VALUE ...]

  --config-name NAME   hparams of {ALG_NAME}: its model, device and dtype are everybody's
  data=FILE            a JSON file: ZsRE, CounterFact, KnowEdit, WikiBigEdit or a list of requests
  n=N                  only the first N edits
  methods=[A,B,...]    default: [{ALG_NAME},FT,LoRA,ROME,MEMIT,AlphaEdit]
  stream=N             the edits come in N commits, and after each all so far are measured; methods
                       may then be LocFT-BF@ledger and LocFT-BF+@ledger as well, which keep the
                       facts of former commits in a ledger
  output=DIR           where results go (outputs/compare); the same command goes on there
  metrics=[A,B,...]    of {", ".join(METRICS)};
                       default [{",".join(DEFAULT_METRICS)}]. `wrapped` asks in chat and in other
                       wrappers too, after all edits, and multiplies the time of measuring
  peers.METHOD.KEY=V   a hyper-parameter of another method, as in EasyEdit's YAML, or
                       peers.METHOD.hparams=FILE to start from a YAML of EasyEdit
  text=DIR             *.txt files for MEMIT's and AlphaEdit's key covariances; else they come from
                       text that the model itself writes
  documents=N          documents for them (400), document_tokens=N tokens of a sampled one (150)
  stats_dir=DIR        where key covariances are kept (data/stats)
  capability=[A,...]   tasks of lm-evaluation-harness before and after, capability_limit=N items
                       a task, tasks_dir=DIR for tasks of your own
  devices=[0,1,...]    methods beside one another, one on each device; the same device may be
                       named twice, which makes the seconds of its methods longer
  KEY=VALUE            any hyper-parameter of {ALG_NAME}: lr=1e-3 layers=[22] device=cpu

Set EASYEDIT_HOME to a clone of EasyEdit for methods that its PyPI release does not have.
"""

EVALUATE = f"""Measures a model on editing data; nothing is edited.

Usage: locft evaluate MODEL data=FILE [KEY=VALUE ...]

  MODEL               a model's folder (a PEFT adapter's too) or hub name, edited by any method
  data=FILE           a JSON file: ZsRE, CounterFact, KnowEdit, WikiBigEdit or a list of requests
  n=N                 only the first N records
  delta=FILE          an edit (the edit.safetensors of `locft edit`) to put into MODEL; MODEL itself
                      is measured first, for locality
  original=MODEL|FILE the model before editing, or the metrics.json of an earlier `locft evaluate`
                      of it: locality compares with it
  metrics=[A,B,...]   of {", ".join(METRICS)};
                      default [{",".join(DEFAULT_METRICS)}]. `wrapped` asks in chat and in other
                      wrappers too, and takes most of the time: leave it out to save it
  batch_size=N        prompts together (64); figures do not depend on it
  device=D            cpu, cuda, or the number of a GPU; a GPU if there is one
  dtype=T             float32 (default), bfloat16 or float16
  model_parallel=true spread the model over the visible GPUs
  trust_remote_code=true
  output=DIR          where metrics.json goes (outputs/evaluate)
"""

CAPABILITY = f"""Measures general capability with lm-evaluation-harness.

Usage: locft capability MODEL [original=MODEL] [KEY=VALUE ...]

  MODEL                  folder or hub name of the (edited) model
  original=MODEL         the model before the edit: measured first, and compared with
  tasks=[NAME,...]       tasks or groups of the harness, or {", ".join(OWN_TASKS)}
                         (these need no download). Default, as in the paper:
                         [{",".join(PAPER_TASKS)}]
  tasks_dir=DIR          also look for task YAMLs in DIR
  limit=N                documents of each task at most (all); of each task below a group
  num_fewshot=N          solved examples in each prompt (each task's own number)
  batch_size=N           prompts run together (8)
  device=DEVICE          cpu, cuda, cuda:N or N (a GPU if there is one)
  dtype=DTYPE            {", ".join(DTYPES)} (float32)
  model_parallel=true    spread the model over the visible GPUs
  trust_remote_code=true allow the model folder's own code
  output=DIR             where capability.json goes (outputs/capability)

The mean counts each task once: mmlu and sst2 with accuracy, nq_open and gsm8k with exact match
(of gsm8k the last number), wmt16-de-en with BLEU / 100.
"""

DELTA = """Handles an edit that is a file of its own: the edit.safetensors of `locft edit`.

Usage: locft delta show FILE [json=FILE]
       locft delta verify FILE [model=FOLDER]
       locft delta apply FILE [FILE ...] model=FOLDER output=DIR
       locft delta revert FILE [FILE ...] model=FOLDER output=DIR [base=FOLDER]
       locft delta export FILE model=FOLDER output=DIR as=model|adapter|lora [rank=R]

  show                what was edited, where, when and how well
  verify              whether the file is whole, and with a model whether the edit is in it, could
                      be put into it, or neither and why (exit status 1)
  apply               writes the model with the edits, in the order in which they were made
  revert              writes the model without them; the last one comes first
  export as=model     writes the edited model (as `apply`)
         as=adapter   a PEFT adapter with the edited matrices themselves: exact, can be switched off
         as=lora      a PEFT adapter with their change at a rank: that of an edit trained as LoRA,
                      or rank=R; `locft evaluate DIR data=FILE` measures what a rank keeps

  FILE                an edit; nothing in it is believed before it is checked
  model=FOLDER        a model's folder
  output=DIR          a folder that is new or empty
  base=FOLDER         the model before the edits, for files that leave out what they replaced
  json=FILE           also write what is shown as JSON
  trust_remote_code=true

Nothing is ever changed in FOLDER, and DIR is there whole or not at all.
"""

ASK = """Asks a model, and with an edit asks it before and after: plain and in chat, side by side.

Usage: locft ask MODEL [delta=FILE | original=MODEL] [prompt=TEXT] [KEY=VALUE ...]

  MODEL               a model's folder (a PEFT adapter's too) or hub name
  delta=FILE          an edit (the edit.safetensors of `locft edit`) of MODEL; if MODEL has it
                      already, it is taken out for the answers before
  original=MODEL      the model before editing, where MODEL is a whole edited one
  prompt=TEXT         a question, or the beginning of a sentence; without it, one line after another
                      is read until an empty one
  tokens=N            tokens of an answer at most (48)
  device=D            cpu, cuda, or the number of a GPU; a GPU if there is one
  dtype=T             float32, bfloat16 or float16; that of the edit, or float32
  model_parallel=true spread the model over the visible GPUs
  trust_remote_code=true
"""

RUN = f"""Runs one of EasyEdit's scripts, unmodified, with {ALG_NAME} registered.

Usage: locft run SCRIPT [OPTION ...]

  SCRIPT              a Python file, such as EasyEdit/examples/run_zsre_llama2.py
  OPTION ...          the script's own, as `python SCRIPT OPTION ...` takes them

EasyEdit is taken from EASYEDIT_HOME, else from the clone that holds SCRIPT, else from the installed
packages. `locft run SCRIPT --help` is the script's own help.
"""

DEMO = f"""Edits counterfactual facts into SmolLM2-135M-Instruct through EasyEdit.

Usage: locft demo [--n N] [--output DIR] [--model DIR] [--save matrices|model|none] [--plus]

  --n N               facts to edit (100)
  --output DIR        where results go (outputs/demo)
  --model DIR         the model's folder (as in the YAML), where it is put first if need be
  --save WHAT         the edited matrices (default), the whole edited model, or none
  --plus              edit with {PLUS_NAME} instead of {ALG_NAME}
"""

LEDGER = """Keeps a ledger of the facts in a model: which, since when and from where.

Usage: locft ledger init LEDGER --config-name NAME [KEY=VALUE ...]
       locft ledger add LEDGER data=FILE [n=N] [source=TEXT]
       locft ledger retract LEDGER FACT ... [exact=true]
       locft ledger retract LEDGER [subject=TEXT] [source=TEXT] [since=DAY] [exact=true]
       locft ledger show LEDGER [at=WHEN] [subject=TEXT] [source=TEXT] [all=true] [json=FILE]
       locft ledger log LEDGER [json=FILE]
       locft ledger diff LEDGER WHEN [WHEN]
       locft ledger verify LEDGER [replay=true]
       locft ledger export LEDGER output=DIR as=edit|model|adapter [at=WHEN] [model=FOLDER]

  init      binds the base model, its tokenizer, the place and the settings of a YAML
  add       trains new facts beside old ones, checks every fact, and trains again what is lost; a
            prompt that is in with another target is superseded (on_conflict=error, given to
            init, refuses that)
  retract   takes facts out: their prompts get the base model's own answers again; exact=true
            trains all others anew, as if these had never been in, to the bit
  show      the facts that are in; all=true those as well that no longer are
  log       what happened; json=FILE has all of it, with hashes
  diff      which facts came and went between two events
  verify    the chain of hashes, the files, the model and every fact (exit status 1 if something is
            wrong); replay=true makes every event's matrices anew as well, and compares them
  export    the facts as an edit (see locft delta), an edited model, or a PEFT adapter

  LEDGER          a folder
  FACT            a fact's number, as `show` gives it
  WHEN            an event's number, or a day or time, UTC: 2030-01-31, 2030-01-31T12:00
  model_name=M    where the base model is, if it has moved; device=D another device

A command that is interrupted, however that comes about, has changed nothing: give it again.
"""

_TEXTS = {
    "edit": EDIT,
    "ask": ASK,
    "plan": PLAN,
    "locate": LOCATE,
    "compare": COMPARE,
    "evaluate": EVALUATE,
    "delta": DELTA,
    "ledger": LEDGER,
    "capability": CAPABILITY,
    "run": RUN,
    "demo": DEMO,
}
_OF_A_YAML = ("edit", "plan", "locate", "compare", "ledger")
COMMANDS = tuple(_TEXTS)


def wants_help(command: str, arguments: Sequence[str]) -> bool:
    """Returns whether a command's arguments ask for its help; most need some to do anything."""
    if command == "run":  # what follows the script is the script's own
        return bool(arguments) and arguments[0] in _OPTIONS
    return bool(set(_OPTIONS) & {*arguments}) or (not arguments and command != "demo")


def help_of(command: str) -> str:
    """Returns what `locft COMMAND --help` prints, for one of `COMMANDS`."""
    text = _TEXTS[command]
    if command in _OF_A_YAML:
        keys = [field.name for field in dataclasses.fields(LocFTBFHyperParams)]
        text += _listed("NAME", shipped_yamls()) + _listed("Hyper-parameters", keys)
        text += "docs/hyperparameters.md explains them, as does help() of LocFTBFHyperParams.\n"
    return text


def _listed(what: str, names: Iterable[str]) -> str:
    text = f"{what}: {', '.join(names)}."
    lines = textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
    return "\n" + "\n".join(lines) + "\n"
