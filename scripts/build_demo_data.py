"""Makes the demo records: counterfactual edits drawn from the true facts in `demo_facts.yaml`.

About a third of the facts stay unedited. Neighborhood prompts ask only about those, so that
locality can be measured after all records have been applied together.

`python scripts/build_demo_data.py` writes the two JSON files again.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf

from locft_easyedit.utils.files import write_atomically

FACTS = Path(__file__).resolve().with_name("demo_facts.yaml")
FOLDER = FACTS.parents[1] / "locft_easyedit" / "cli"
HELD_OUT_SHARE = 1 / 3
REPHRASES = 2
NEIGHBORS = 2

Record = dict[str, Any]
T = TypeVar("T")


def load_relations() -> dict[str, dict[str, Any]]:
    """Returns the table of `demo_facts.yaml`, by relation name; its header explains the fields."""
    table = OmegaConf.to_container(OmegaConf.load(FACTS))
    return cast(dict[str, dict[str, Any]], table)


def true_answers(relation: dict[str, Any]) -> dict[str, str]:
    """Returns subject -> true answer for one relation."""
    return {
        subject: answer for answer, subjects in relation["facts"].items() for subject in subjects
    }


def possible_targets(relation: dict[str, Any], subject: str) -> list[str]:
    """Returns the answers of the relation that make a false statement about `subject`.

    Where the relation has a portability prompt, its answer must change as well: an edited model
    that kept the old fact then cannot be right by chance.
    """
    truth = true_answers(relation)[subject]
    also_true = relation.get("also_true", {})
    excluded = {truth, *also_true.get(truth, []), *also_true.get(subject, [])}
    targets = [answer for answer in relation["facts"] if answer not in excluded]
    if "portability" not in relation:
        return targets
    hop = relation["portability"]["values"]
    return [answer for answer in targets if hop[answer] != hop[truth]]


def held_out(relation: dict[str, Any], rng: random.Random) -> list[str]:
    """Returns the subjects that stay unedited, in random order.

    Every answer with several subjects gives some of them; the rest of the share is filled from
    all others, so that a neighbor with the same true answer exists wherever there can be one.
    """
    truth = true_answers(relation)
    chosen: list[str] = []
    for subjects in relation["facts"].values():
        if len(subjects) > 1:
            count = max(1, round(len(subjects) * HELD_OUT_SHARE))
            chosen += _shuffled(subjects, rng)[:count]
    missing = max(0, round(len(truth) * HELD_OUT_SHARE) - len(chosen))
    chosen += _shuffled((s for s in truth if s not in chosen), rng)[:missing]
    return _shuffled(chosen, rng)


def build_records(seed: int = 0) -> list[Record]:
    """Returns the counterfactual records, shuffled over all relations; the same for one `seed`.

    Keys of a record: `subject`, `relation`, `prompt`, `ground_truth`, `target_new`,
    `rephrase_prompts` (two), `neighborhood` (two `{prompt, ground_truth}` about unedited
    subjects) and `portability` (`{prompt, ground_truth}`, the answer that follows from
    `target_new`, or None).
    """
    records: list[Record] = []
    for name, relation in load_relations().items():
        # A generator of its own: adding a relation leaves the records of the others alone.
        rng = random.Random(f"{seed}:{name}")
        neighbors = held_out(relation, rng)
        for subject in true_answers(relation):
            if subject not in neighbors:
                records.append(_record(name, relation, subject, neighbors, rng))
    return _shuffled(records, random.Random(seed))


def to_counterfact(records: list[Record]) -> list[Record]:
    """Returns the records in the flat form that EasyEdit's `CounterFactDataset` reads.

    `locality_prompt` is the first of `neighborhood_prompts`; records without a portability prompt
    lack its two keys.
    """
    return [_counterfact_row(case_id, record) for case_id, record in enumerate(records)]


def to_knowedit(records: list[Record]) -> list[Record]:
    """Returns the records in the nested form that EasyEdit's `KnowEditDataset` reads.

    Answers below `portability` and `locality` are one-element lists: the dataset's two collate
    functions take the first element, which of a plain string would be its first letter.
    """
    return [_knowedit_row(record) for record in records]


def main() -> None:
    """Writes `demo_counterfact.json` and `demo_knowedit.json` next to this file."""
    records = build_records()
    for name, rows in (
        ("counterfact", to_counterfact(records)),
        ("knowedit", to_knowedit(records)),
    ):
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        write_atomically(FOLDER / f"demo_{name}.json", text.encode())


def _record(
    name: str, relation: dict[str, Any], subject: str, neighbors: list[str], rng: random.Random
) -> Record:
    """Returns one record about `subject`, in the form that `build_records` describes."""
    truth = true_answers(relation)
    target = _shuffled(possible_targets(relation, subject), rng)[0]
    others = [other for other in _shuffled(neighbors, rng) if truth[other] != target]
    others.sort(key=lambda other: truth[other] != truth[subject])  # stable: same answer first
    hop = relation.get("portability")
    return {
        "subject": subject,
        "relation": name,
        "prompt": relation["prompt"].format(subject),
        "ground_truth": truth[subject],
        "target_new": target,
        "rephrase_prompts": [
            template.format(subject)
            for template in _shuffled(relation["rephrase"], rng)[:REPHRASES]
        ],
        "neighborhood": [
            {"prompt": relation["prompt"].format(other), "ground_truth": truth[other]}
            for other in others[:NEIGHBORS]
        ],
        "portability": hop
        and {"prompt": hop["prompt"].format(subject), "ground_truth": hop["values"][target]},
    }


def _counterfact_row(case_id: int, record: Record) -> Record:
    """Returns one record in CounterFact form."""
    near = record["neighborhood"]
    row = {
        "case_id": case_id,
        "subject": record["subject"],
        "prompt": record["prompt"],
        "target_new": record["target_new"],
        "ground_truth": record["ground_truth"],
        "rephrase_prompt": record["rephrase_prompts"][0],
        "locality_prompt": near[0]["prompt"],
        "locality_ground_truth": near[0]["ground_truth"],
        "neighborhood_prompts": [item["prompt"] for item in near],
        "neighborhood_answers": [item["ground_truth"] for item in near],
    }
    if record["portability"]:
        row["portability_prompt"] = record["portability"]["prompt"]
        row["portability_ground_truth"] = record["portability"]["ground_truth"]
    return row


def _knowedit_row(record: Record) -> Record:
    """Returns one record in KnowEdit form."""
    hops = [record["portability"]] if record["portability"] else []
    return {
        "subject": record["subject"],
        "prompt": record["prompt"],
        "target_new": record["target_new"],
        "ground_truth": record["ground_truth"],
        "rephrase_prompt": record["rephrase_prompts"][0],
        "portability": {"Reasoning": [_listed(item) for item in hops]} if hops else {},
        "locality": {"Relation_Specificity": [_listed(item) for item in record["neighborhood"]]},
    }


def _listed(item: Record) -> Record:
    return {"prompt": item["prompt"], "ground_truth": [item["ground_truth"]]}


def _shuffled(items: Iterable[T], rng: random.Random) -> list[T]:
    """Returns the items in random order; only `rng.random()` is the same on every Python."""
    return sorted(items, key=lambda _: rng.random())


if __name__ == "__main__":
    main()
