"""That sampling is announced, and that its bar moves while it runs."""

import logging

from helpers.toys import toy_model, toy_tokenizer

from locft_easyedit.training.preserve import sampled_text as module
from locft_easyedit.training.preserve.sampled_text import sampled_text


class Bar:
    """Stands for a bar on a terminal."""

    def __init__(self, total, **_):
        self.total, self.n, self.seen = total, 0, []

    def update(self, n=1):
        self.n += n
        self.seen.append(self.n)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_each_forward_pass_moves_the_bar_and_the_first_ones_tell_the_time(
    tmp_path, monkeypatch, caplog
):
    bars = []
    monkeypatch.setattr(
        module, "progress_bar", lambda **given: bars.append(Bar(**given)) or bars[-1]
    )
    model, tokenizer = toy_model(), toy_tokenizer()
    with caplog.at_level(logging.INFO):
        text = sampled_text(model, tokenizer, 100, cache=tmp_path, progress=True)
    [bar] = bars
    assert bar.n == bar.total
    # One by one but for the ends of rounds, of which there are four at least.
    assert sum(b - a == 1 for a, b in zip(bar.seen, bar.seen[1:], strict=False)) > 4 * 100
    [message] = [m for m in caplog.messages if "sampled once per model" in m]
    assert f"kept in {tmp_path}" in message
    assert message.endswith("about a minute or less.")

    caplog.clear()
    again = sampled_text(model, tokenizer, 100, cache=tmp_path, progress=True)
    assert again == text
    assert bars[1].n == bars[1].total
    assert caplog.messages == []  # what is kept takes no time


def test_watching_changes_no_text():
    model, tokenizer = toy_model(), toy_tokenizer()
    watched = sampled_text(model, tokenizer, 100, cache=None, progress=True)
    assert watched == sampled_text(model, tokenizer, 100, cache=None, progress=False)
