"""What `model_name` names, and how soon it is told that it names nothing."""

import pytest

from locft_easyedit.errors import ModelError
from locft_easyedit.modeling import model_name
from locft_easyedit.modeling.loading import load_causal_lm
from locft_easyedit.modeling.model_name import check_model_name


class Hub:
    """Stands for the session that asks a hub: one that answers, or cannot be reached."""

    def __init__(self, reached):
        self.reached, self.asked = reached, 0

    def head(self, url, **options):
        self.asked += 1
        if not self.reached:
            raise OSError("Name or service not known")


@pytest.mark.parametrize("name", ["modles/SmolLM2-135M", "nosuch"])
def test_without_a_hub_a_wrong_path_is_told_at_once(monkeypatch, name):
    hub = Hub(reached=False)
    monkeypatch.setattr(model_name, "get_session", lambda: hub)
    with pytest.raises(ModelError, match="there is no such folder here, and no model hub"):
        load_causal_lm(name, device="cpu")
    assert hub.asked == 1


def test_with_a_hub_a_name_is_left_to_it(monkeypatch):
    hub = Hub(reached=True)
    monkeypatch.setattr(model_name, "get_session", lambda: hub)
    assert check_model_name("someone/some-model") == "someone/some-model"
    assert hub.asked == 1


def test_what_was_downloaded_needs_no_hub(monkeypatch):
    monkeypatch.setattr(model_name, "get_session", lambda: Hub(reached=False))
    monkeypatch.setattr(model_name, "try_to_load_from_cache", lambda name, file: f"/cache/{file}")
    assert check_model_name("someone/some-model") == "someone/some-model"
