"""Models that cannot be loaded: what is said."""

import json

import pytest
from helpers.toys import toy_model, toy_tokenizer

from locft_easyedit.errors import ModelError
from locft_easyedit.modeling.loading import load_causal_lm


def test_code_of_its_own_is_told_with_the_key_that_allows_it(tmp_path):
    toy_model().save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "of_its_own", "auto_map": {"AutoConfig": "conf.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"custom code.*set trust_remote_code=true"):
        load_causal_lm(str(tmp_path), device="cpu")
