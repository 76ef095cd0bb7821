"""Edits that are made in a model, measured and taken back: one run of generalization.py."""

import dataclasses
import math
from contextlib import contextmanager

import numpy as np

from locft_easyedit.api import edit_model
from locft_easyedit.data.tokenization import Asked
from locft_easyedit.errors import NonFiniteLossError
from locft_easyedit.evaluation.capability.harness import measure_prepared
from locft_easyedit.evaluation.capability.metrics import OWN_TASKS
from locft_easyedit.evaluation.capability.prepared_tasks import prepare_tasks
from locft_easyedit.evaluation.divergence import BeforeEdit, Divergence
from locft_easyedit.evaluation.evaluation import Evaluation, PairedMetrics
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.evaluation.summary import summarize
from locft_easyedit.evaluation.wrappers import CHAT, wrappers_for

CHATS = (CHAT, "chat_system", "chat_later")
WRAPPERS, CAPABILITY = MEASURED = ("wrappers", "capability")


class Bench:
    """Edits, and the model that each variant makes them in; its weights are the same after each.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        edits: The requests.
        measured: Those of them that metrics are taken on.
        hparams: How prompts are run.
        more: What is measured besides, of `MEASURED`.

    Attributes:
        answers: What was found of the generated answers at last, by record.
    """

    def __init__(self, model, tokenizer, edits, measured, hparams, more=(WRAPPERS,)):
        self.model, self.tokenizer = model, tokenizer
        self.edits, self.measured = edits, measured
        how = EvalConfig(hparams.eval_batch_size, hparams.row_tokens, progress=True)
        self.by_token = Evaluation(model, tokenizer, measured, how, metrics=["accuracy"])
        # Answers to the other prompts would take most of the time, and nobody looks at them.
        asked = [request | {"locality": {}, "portability": {}} for request in measured]
        how = dataclasses.replace(how, packed=self.by_token.packed)
        none = [{} for _ in asked]
        self.by_answer = Evaluation(
            model, tokenizer, asked, how, metrics=["generated"], before=none
        )
        # Before an edit nothing holds in a wrapper, and long answers take long.
        self.in_wrappers = (
            Evaluation(model, tokenizer, asked, how, metrics=["wrapped"])
            if WRAPPERS in more
            else None
        )
        self.tasks = prepare_tasks(OWN_TASKS, progress=False) if CAPABILITY in more else None
        self.moved = Moved(model, tokenizer, measured, how)
        self.before = self.by_token.measure("before")
        self.figures_before = self.shares("before", self.before) | self.capability()

    def run(self, hparams):
        """Makes the edits with our method, measures, and takes them back."""
        try:
            with self.edited(hparams, self.edits) as result:
                figures = self.after()
        except NonFiniteLossError as error:
            return self.line({}, diverged=str(error))
        if result.health is not None and result.health.perplexity_ratio is not None:
            figures["ppl_ratio"] = result.health.perplexity_ratio
        figures |= {"epochs": len(result.losses), "seconds": sum(result.timings.values())}
        phases = ("train", "preserve")
        figures |= {f"{p}_seconds": result.timings[p] for p in phases if p in result.timings}
        return self.line(figures, trained=result.n_trained, seconds=result.timings,
                         updates=result.n_updates, converged=result.converged,
                         repairs=result.repairs)  # fmt: skip

    @contextmanager
    def edited(self, hparams, edits):
        """Context manager in which edits are in the model; afterwards they are taken back."""
        result = edit_model(self.model, self.tokenizer, edits, hparams)
        try:
            yield result
        finally:
            result.restore_(self.model)

    def after(self):
        """The figures of the model as it is now."""
        figures = self.shares("after", self.by_token.measure("after"))
        if self.in_wrappers is not None:
            wrapped = summarize([{"post": one} for one in self.in_wrappers.measure("after")])
            figures |= wrapped_shares(wrapped["post"].get("wrapped", {}))
        return figures | self.capability() | self.moved.measure()

    def capability(self):
        """The share of a few tasks' questions that the model as it is now gets right."""
        if self.tasks is None:
            return {}
        mean = measure_prepared(self.model, self.tokenizer, self.tasks, progress=False)["mean"]
        return {} if mean is None else {"capability": mean}

    def line(self, figures, diverged=None, **more):
        """What a run's line says: its figures, as far as they are numbers, and `more`."""
        finite = {key: value for key, value in figures.items() if math.isfinite(value)}
        return {
            "edits": len(self.edits), "measured": len(self.measured), "diverged": diverged,
            "figures": finite, "not_finite": sorted(figures.keys() - finite.keys()),
            "before": self.figures_before, **more,
        }  # fmt: skip

    def shares(self, when, by_token):
        """The figures between 0 and 1, with those by token measured already."""
        self.answers = [{"post": one} for one in self.by_answer.measure(when)]
        answers = summarize(self.answers)["post"]
        tokens = summarize(PairedMetrics(self.measured, self.before, by_token))["post"]
        shares = {key: tokens[key] for key in ("rewrite_acc", "rephrase_acc") if key in tokens}
        for key in ("reliability", "generalization"):
            if key in answers["generated"]:
                shares[key] = answers["generated"][key]
        for key in ("portability", "locality"):
            if tokens.get(key):
                shares[key] = float(np.mean(list(tokens[key].values())))
        return shares


def wrapped_shares(found):
    """The figures of what was asked in wrappers: their mean, those in chat, and generalization."""
    by_wrapper = found.get("reliability_in", {})
    shares = dict(by_wrapper)
    others = [share for name, share in by_wrapper.items() if name not in CHATS]
    if others:
        shares["wrappers"] = float(np.mean(others))
    if "chat_generalization" in found:
        shares["chat_generalization"] = found["chat_generalization"]
    return shares


class Moved:
    """How far an edit moved what follows the locality prompts, asked plainly and in chat.

    The distributions before are recorded when this is made (see `Divergence`).
    """

    def __init__(self, model, tokenizer, records, how):
        chat = wrappers_for(tokenizer, [CHAT])
        prompts = [prompt for record in records for entry in record["locality"].values()
                   for prompt in entry["prompt"]]  # fmt: skip
        self.ways = {"kl": [Asked(prompt, "") for prompt in prompts]}
        if chat:
            self.ways["chat_kl"] = [chat[0].ask(prompt, "") for prompt in prompts]
        self.found = {}
        for key, asked in self.ways.items():
            self.found[key] = Divergence(model, tokenizer, asked, how, BeforeEdit([]))
            self.found[key].keep(f"{key} before")

    def measure(self):
        """The mean KL in nats of the token after each prompt: `kl`, and in chat `chat_kl`."""
        measured = {key: found.measure(key) for key, found in self.found.items()}
        return {key: float(np.mean(kl)) for key, kl in measured.items() if kl is not None}
