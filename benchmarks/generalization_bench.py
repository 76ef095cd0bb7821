"""Edits that are made in a model, measured and taken back: one run of generalization.py."""

import dataclasses
import math

import numpy as np
import torch

from locft_easyedit.api import edit_model
from locft_easyedit.data.augment.reword import reword_edits
from locft_easyedit.data.requests import Edit
from locft_easyedit.data.tokenization import TokenizedTexts, ids_of
from locft_easyedit.errors import NonFiniteLossError
from locft_easyedit.evaluation.evaluation import Evaluation, PairedMetrics
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.evaluation.summary import summarize
from locft_easyedit.modeling.modes import evaluation_mode
from locft_easyedit.prefix.runner import TextRunner


class Bench:
    """Edits, and the model that each variant makes them in; its weights are the same after each.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        edits: The requests.
        measured: Those of them that metrics are taken on.
        hparams: How prompts are run.
    """

    def __init__(self, model, tokenizer, edits, measured, hparams):
        self.model, self.tokenizer = model, tokenizer
        self.edits, self.measured = edits, measured
        how = EvalConfig(hparams.eval_batch_size, hparams.row_tokens, progress=True)
        self.by_token = Evaluation(model, tokenizer, measured, how, metrics=["accuracy"])
        # Answers to the other prompts would take most of the time, and nobody looks at them.
        asked = [request | {"locality": {}, "portability": {}} for request in measured]
        how = dataclasses.replace(how, packed=self.by_token.packed)
        self.by_answer = Evaluation(
            model, tokenizer, asked, how, metrics=["generated"], before=[{} for _ in asked]
        )
        prompts = [prompt for request in measured for entry in request["locality"].values()
                   for prompt in entry["prompt"]]  # fmt: skip
        self.next = NextTokens(model, tokenizer, prompts, how) if prompts else None
        self.new = [not is_trained(request, hparams.seed) for request in measured]
        self.before = self.by_token.measure("before")
        self.figures_before = self.shares("before", self.before)

    def run(self, hparams):
        """Makes the edits with our method, measures, and takes them back."""
        try:
            result = edit_model(self.model, self.tokenizer, self.edits, hparams)
        except NonFiniteLossError as error:
            return self.line({}, diverged=str(error))
        try:
            figures = self.after()
        finally:
            result.restore_(self.model)
        if result.health is not None and result.health.perplexity_ratio is not None:
            figures["ppl_ratio"] = result.health.perplexity_ratio
        figures |= {"epochs": len(result.losses), "seconds": sum(result.timings.values())}
        phases = ("train", "preserve")
        figures |= {f"{p}_seconds": result.timings[p] for p in phases if p in result.timings}
        return self.line(figures, trained=result.n_trained, seconds=result.timings,
                         updates=result.n_updates, converged=result.converged)  # fmt: skip

    def after(self):
        """The figures of the model as it is now."""
        figures = self.shares("after", self.by_token.measure("after"))
        return figures if self.next is None else figures | self.next.measure()

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
        posts = [{"post": one} for one in self.by_answer.measure(when)]
        answers = summarize(posts)["post"]
        new = [post for post, is_new in zip(posts, self.new, strict=True) if is_new]
        tokens = summarize(PairedMetrics(self.measured, self.before, by_token))["post"]
        shares = {key: tokens[key] for key in ("rewrite_acc", "rephrase_acc") if key in tokens}
        for key in ("reliability", "generalization"):
            if key in answers["generated"]:
                shares[key] = answers["generated"][key]
        if new and "generalization" in answers["generated"]:
            found = summarize(new)["post"]["generated"]
            shares["generalization_new"] = found["generalization"]
        for key in ("portability", "locality"):
            if tokens.get(key):
                shares[key] = float(np.mean(list(tokens[key].values())))
        return shares


def is_trained(request, seed):
    """Whether `augment` may train what the data's rephrase prompt says from the subject on.

    The prompts of a benchmark are themselves made from a few forms, which rules of English find
    as well: such a rephrase prompt says less of wordings that nobody has thought of.
    """
    rephrase, subject = request.get("rephrase_prompt"), request.get("subject")
    if not rephrase or not subject:
        return True
    edit = Edit(request["prompt"], request["target_new"], 0)
    [made] = reword_edits([edit], [subject], seed=seed).prompts
    return said(rephrase, subject) in {said(text, subject) for text in (edit.prompt, *made)}


def said(text, subject):
    """A text from its subject on, without regard to case and punctuation around it."""
    return text[max(text.find(subject), 0) :].strip(" \n.,:;?!'\"").casefold()


class NextTokens:
    """What follows prompts by the model's reckoning, before an edit and after it.

    The distributions before are recorded when this is made: 4 bytes a prompt and a token of the
    vocabulary, on the host.
    """

    def __init__(self, model, tokenizer, prompts, how):
        sequences = ids_of(tokenizer, prompts)
        # A stand-in follows each prompt: what is looked at is all that predicts it.
        texts = TokenizedTexts.from_lists(
            [[*s, s[-1]] for s in sequences], list(map(len, sequences))
        )
        self.runner = TextRunner(
            model, texts, row_tokens=how.row_tokens, packed=how.packed, prefix=None
        )
        self.batch_size = how.batch_size
        self.before = [log_p.cpu() for log_p in self.distributions()]

    def measure(self):
        """The share of prompts whose first choice is what it was, and the mean KL in nats."""
        n, kept, kl = 0, 0, 0.0
        for before, after in zip(self.before, self.distributions(), strict=True):
            before = before.to(after.device)
            n += len(before)
            kept += int((before.argmax(-1) == after.argmax(-1)).sum())
            kl += float((before.exp() * (before - after)).sum(dtype=torch.float64))
        return {"top1_kept": kept / n, "kl": max(kl / n, 0.0) if math.isfinite(kl) else math.nan}

    @torch.no_grad()
    def distributions(self):
        """Yields log probabilities of what follows each prompt, [B, V] float32 a batch."""
        n = len(self.runner.texts)
        with evaluation_mode(self.runner.model), self.runner.running():
            for start in range(0, n, self.batch_size):
                batch = np.arange(start, min(start + self.batch_size, n))
                logits, _ = self.runner.logits(batch)
                yield torch.log_softmax(logits.float(), dim=-1)
