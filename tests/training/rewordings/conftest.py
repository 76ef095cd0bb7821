import pytest
from helpers.chat_endpoint import fake_endpoint

from locft_easyedit.training.rewordings import endpoint


def prompt_of(message):
    """Returns the prompt that an instruction ends with."""
    return message.rpartition("\n")[2]


def three_of(message, number=0):
    """Returns an answer with three rewordings, of which each keeps all words of the prompt."""
    prompt = prompt_of(message)
    return f"1. Well, {prompt}\n2. Now, {prompt}\n3. So, {prompt}"


@pytest.fixture
def served(monkeypatch):
    """A fake endpoint that the environment names; tries come without a pause."""
    monkeypatch.setattr(endpoint, "WAITS", (0.0, 0.0))
    with fake_endpoint(three_of) as found:
        monkeypatch.setenv("OPENAI_BASE_URL", found.url)
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        yield found
