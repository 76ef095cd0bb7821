"""Runs EasyEdit's example scripts, unmodified, with `--editing_method=LocFT-BF` and `LocFT-BF+`.

    EASYEDIT_HOME=path/to/EasyEdit python benchmarks/checks/easyedit_scripts.py

Every script that takes `--editing_method` runs under what `locft run` does, on a few records that
are made here in the form of its data, and on a small random model (or `--hparams`). Told is the
file of results that it leaves, or the one message with which it says why it cannot. The status is
1 if a script ends in anything else, leaves no file that names the method, or one in another
method's name.
"""

import argparse
import contextlib
import csv
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from locft_easyedit.easyedit.script import run_script
from locft_easyedit.errors import LocFTError
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.hparams_rules import ALG_NAMES

CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FACTS = [
    # subject, relation, question, rephrased, former and new answer, another subject
    ("Vienna", "{} lies in", "Where does Vienna lie?", "Austria", "Norway", "Graz"),
    ("Ibsen", "{} was born in", "Where was Ibsen born?", "Skien", "Lima", "Grieg"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hparams", help="YAML of LocFT-BF, instead of a small random model")
    parser.add_argument("--methods", nargs="+", default=ALG_NAMES, help="what is asked for")
    parser.add_argument("--scripts", nargs="+", help="parts of the names of scripts to run alone")
    parser.add_argument("--verbose", action="store_true", help="show what the scripts print")
    options = parser.parse_args()
    home = os.environ.get("EASYEDIT_HOME")
    if not home:
        sys.exit("easyedit_scripts.py: set EASYEDIT_HOME to a clone of EasyEdit.")
    yaml = None if options.hparams is None else str(Path(options.hparams).resolve())
    if yaml is not None:
        model = LocFTBFHyperParams.from_hparams(yaml).model_name
        if Path(model).is_dir() and not Path(model).is_absolute():
            sys.exit("easyedit_scripts.py: `model_name` in --hparams must be an absolute path.")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    good = True
    print(f"{'script':27} {'arguments':28} {'method':9} outcome", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yaml = yaml or made_yaml(folder / "llama")
        write_data(folder)
        for script, arguments in SCRIPTS:
            if options.scripts and not any(part in script for part in options.scripts):
                continue
            for method in options.methods:
                outcome, as_it_should = run(
                    Path(home) / "examples" / script, arguments, method, yaml, folder, options
                )
                good &= as_it_should
                shown = " ".join(a for a in arguments if "data_dir" not in a and "path" not in a)
                print(f"{script:27} {shown[:28]:28} {method:9} {outcome}", flush=True)
    return 0 if good else 1


def run(script, arguments, method, yaml, folder, options):
    """Runs a script in a folder of its own; returns what came of it, and whether it should."""
    place = Path(tempfile.mkdtemp(dir=folder))
    (place / "output").mkdir()  # run_zsre_llama2.py makes none
    given = [f"--editing_method={method}", f"--hparams_dir={yaml}"]
    given += [argument.format(data=folder, model=folder / "llama") for argument in arguments]
    former, printed = Path.cwd(), io.StringIO()
    os.chdir(place)
    try:
        with contextlib.ExitStack() as quiet:
            if not options.verbose:
                logging.disable(logging.WARNING)
                quiet.callback(logging.disable, logging.NOTSET)
                quiet.enter_context(contextlib.redirect_stdout(printed))
                quiet.enter_context(contextlib.redirect_stderr(printed))
            run_script(script, given)
    except LocFTError as error:
        return f"refused: {error}", True
    except (Exception, SystemExit) as error:
        last = printed.getvalue().strip().split("\n")[-1] if isinstance(error, SystemExit) else ""
        return f"FAILED: {type(error).__name__}: {error} {last}", False
    finally:
        os.chdir(former)
    found = [p for p in place.rglob("*.json") if "pre_edit" not in p.name and "logs" not in p.parts]
    names = [path.name for path in found]
    good = len(found) == 1 and method in names[0] and f'"{method}"' in found[0].read_text("utf-8")
    return f"{'wrote' if good else 'FAILED: wrote'} {', '.join(names)}", good


def made_yaml(folder):
    """Makes a small random model with a token a byte; returns a YAML for it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=2048, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    yaml = folder / "hparams.yaml"
    yaml.write_text(
        f"alg_name: LocFT-BF\nmodel_name: {json.dumps(str(folder))}\ndevice: cpu\nlayers: [1]\n"
        "rewrite_module_tmp: model.layers.{}.mlp.down_proj.weight\nlr: 1e-3\nnum_steps: 2\n"
        f"preserve_dir: {json.dumps(str(folder / 'kept'))}\n",
        encoding="utf-8",
    )
    return str(yaml)


def write_data(folder):
    """Writes the facts in the form of each script's data."""
    for path, of in DATA.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        records = [of(*fact) for fact in FACTS]
        if file.suffix == ".csv":
            with file.open("w", encoding="utf-8", newline="") as out:
                writer = csv.DictWriter(out, records[0])
                writer.writeheader()
                writer.writerows(records)
        else:
            file.write_text(json.dumps(records), encoding="utf-8")


def zsre(subject, relation, question, old, new, other):
    return {
        "subject": subject, "src": question, "rephrase": f"Say: {question}", "alt": new,
        "ans": new, "answers": [old], "loc": f"nq question: where is {other}", "loc_ans": old,
        "portability": {"New Question": f"Who knows {subject}?", "New Answer": new},
    }  # fmt: skip


def counterfact(subject, relation, question, old, new, other):
    return {
        "requested_rewrite": {
            "subject": subject, "prompt": relation, "prompt_full": relation.format(subject),
            "target_new": {"str": new}, "target_true": {"str": old}, "question": question,
        },
        "paraphrase_prompts": [question], "neighborhood_prompts": [relation.format(other)],
    }  # fmt: skip


def flat(subject, relation, question, old, new, other):
    return {
        "subject": subject, "prompt": relation.format(subject), "target_new": new,
        "rephrase_prompt": question, "ood_rephrase": question, "ans": new,
        "locality_prompt": relation.format(other), "locality_ground_truth": old,
        "loc": relation.format(other), "loc_ans": old,
    }  # fmt: skip


def knowedit(subject, relation, question, old, new, other):
    return {
        "subject": subject, "prompt": relation.format(subject), "target_new": new,
        "ground_truth": old,
        "portability": {"Reasoning": [{"prompt": question, "ground_truth": [[new]]}]},
        "locality": {
            "Relation_Specificity": [{"prompt": relation.format(other), "ground_truth": [old]}]
        },
    }  # fmt: skip


def wikibigedit(subject, relation, question, old, new, other):
    return {
        "subject": subject, "update": question, "ans": new, "rephrase": f"Say: {question}",
        "personas": f"As a pirate: {question}", "mhop": None, "mhop_ans": None,
        "loc": relation.format(other), "loc_ans": old,
    }  # fmt: skip


def mquake(subject, relation, question, old, new, other):
    rewrite = counterfact(subject, relation, question, old, new, other)["requested_rewrite"]
    return {
        "requested_rewrite": [rewrite], "questions": [question, f"Say: {question}"],
        "answer": old, "new_answer": new, "loc": relation.format(other), "loc_ans": old,
    }  # fmt: skip


def wikiupdate(subject, relation, question, old, new, other):
    rewrite = {
        "subject": subject, "prompt": relation, "answer_new": new, "answer_true": old,
        "question": question,
    }  # fmt: skip
    return {"requested_rewrite": rewrite, "loc": relation.format(other), "loc_ans": old}


def cknowedit(subject, relation, question, old, new, other):
    return {
        "prompt": relation.format(subject), "target_new": new, "target_old": old,
        "rephrase": question, "portability": [{"prompt": question, "answer": new}],
        "locality": [{"prompt": relation.format(other), "answer": old}],
    }  # fmt: skip


def concept(subject, relation, question, old, new, other):
    return {
        "label": subject, "prompt": relation.format(subject), "phrase_prompt": question,
        "target_new_desc": new, "instance_prompt": f"Is {other} a {subject}?",
        "locality_prompt": relation.format(other), "locality_answer": old,
    }  # fmt: skip


def halluedit(subject, relation, question, old, new, other):
    return {
        "subject": subject, "relation": "place of birth", "object": new, "question": question,
        "paraphrased_question": f"Say: {question}", "locality_question": relation.format(other),
    }  # fmt: skip


def sentiment(subject, relation, question, old, new, other):
    return {"ent": subject, "pos": [f"I like {subject}."], "neg": [f"I hate {subject}."]}


DATA = {
    "zsre_mend_eval.json": zsre,
    "zsre_mend_eval_portability_gpt4.json": zsre,
    "zsre_eval_20k.json": zsre,
    "ZsRE/zsre_mend_edit.json": zsre,
    "ZsRE/zsre_mend_train.json": zsre,
    "counterfact.json": counterfact,
    "multi_counterfact.json": counterfact,
    "hallucination/hallucination-edit.json": flat,
    "hallucination/hallucination-train.json": flat,
    "temporal/temporal-edit.json": flat,
    "temporal/temporal-train.json": flat,
    "UltraEditBench_2M.json": flat,
    "knowedit.json": knowedit,
    "wikibigedit_eval_17k.json": wikibigedit,
    "mquake.json": mquake,
    "wikiupdate.json": wikiupdate,
    "cknowedit.json": cknowedit,
    "final_llama2chat_intra.json": concept,
    "halluedit.csv": halluedit,
    "blender_test.json": sentiment,
}
HERE = "--data_dir={data}"
SIZE = "--ds_size=2"
SCRIPTS = [
    ("run_knowedit_llama2.py", ["--data_dir={data}/knowedit.json", "--datatype=zsre", SIZE]),
    ("run_zsre_llama2.py", [HERE, SIZE]),
    *(
        ("run_wise_editing.py", [HERE, f"--data_type={kind}", SIZE, "--sequential_edit"])
        for kind in ("ZsRE", "hallucination", "temporal")
    ),
    *(
        ("run_AlphaEdit_editing.py", [HERE, f"--data_type={kind}", SIZE, "--sequential_edit"])
        for kind in ("ZsRE", "CF", "MCF")
    ),
    *(
        ("run_ultraedit_editing.py", [HERE, f"--data_type={kind}", SIZE, "--sequential_edit"])
        for kind in ("zsre", "wikibigedit", "ultraeditbench")
    ),
    ("run_WikiBigEdit.py", ["--data_dir={data}/wikibigedit_eval_17k.json", SIZE]),
    ("run_longform.py", ["--data_dir={data}/zsre_mend_eval.json", SIZE]),
    ("run_longform.py", ["--data_dir={data}/counterfact.json", "--dataset_type=counterfact"]),
    *(
        ("run_AKEW_both.py", ["--data_dir={data}/" + f"{kind}.json", f"--data_type={kind}"])
        for kind in ("counterfact", "mquake", "wikiupdate")
    ),
    ("run_AKEW_both.py", [HERE, "--data_type=unke", "--use_unstructured_data"]),
    ("run_concept_editing.py", [HERE, "--edited_model=llama2chat"]),
    (
        "run_Hallueditbench.py",
        ["--data_path={data}/halluedit.csv", "--data_size=1", "--eval_model_id={model}"],
    ),
    ("run_LLM_evaluation.py", ["--data_dir={data}/knowedit.json", "--datatype=zsre", SIZE]),
    ("run_SimIE_editing.py", [HERE, "--data_type=ZsRE", SIZE]),
    ("run_SPHERE_editing.py", [HERE, "--data_type=ZsRE", SIZE, "--sequential_edit"]),
    ("run_CKnowEdit.py", ["--data_dir={data}/cknowedit.json", "--chinese_ds_type=x", SIZE]),
    ("run_convsent_llama2.py", [HERE, SIZE]),
]


if __name__ == "__main__":
    sys.exit(main())
