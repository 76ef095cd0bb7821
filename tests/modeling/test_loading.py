"""Models that cannot be loaded: what is said, and how soon."""

import json

import pytest
from helpers.toys import toy_model, toy_tokenizer

from locft_easyedit.errors import ModelError
from locft_easyedit.modeling import loading
from locft_easyedit.modeling.loading import check_model_name, load_causal_lm


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
    monkeypatch.setattr(loading, "get_session", lambda: hub)
    with pytest.raises(ModelError, match="there is no such folder here, and no model hub"):
        load_causal_lm(name, device="cpu")
    assert hub.asked == 1


def test_with_a_hub_a_name_is_left_to_it(monkeypatch):
    hub = Hub(reached=True)
    monkeypatch.setattr(loading, "get_session", lambda: hub)
    assert check_model_name("someone/some-model") == "someone/some-model"
    assert hub.asked == 1


def test_what_was_downloaded_needs_no_hub(monkeypatch):
    monkeypatch.setattr(loading, "get_session", lambda: Hub(reached=False))
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda name, file: f"/cache/{file}")
    assert check_model_name("someone/some-model") == "someone/some-model"


def test_code_of_its_own_is_told_with_the_key_that_allows_it(tmp_path):
    toy_model().save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "of_its_own", "auto_map": {"AutoConfig": "conf.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"custom code.*set trust_remote_code=true"):
        load_causal_lm(str(tmp_path), device="cpu")
