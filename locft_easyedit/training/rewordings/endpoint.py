"""An OpenAI-compatible chat-completions endpoint as a writer of rewordings."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...errors import RewordingsError
from ...utils.parsing import shown
from .instruction import Prompt, instruction

BASE_URL, API_KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"
SECONDS = 120.0  # that one answer may take
WAITS = (1.0, 4.0, 16.0)  # seconds before each further try
_LONGEST_WAIT = 60.0  # whatever the endpoint asks for
_AT_ONCE = 8
_MOST_BYTES = 2**22  # of an answer
# Time-outs, conflicts and limits of rate; what is wrong with the request itself stays wrong.
_PASSING = frozenset([408, 409, 425, 429])


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nothing: urllib would hand the key to wherever it is sent."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Passing(Exception):
    """A failure after which another try may succeed; never leaves this module."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Endpoint:
    """Asks an endpoint, several prompts at once.

    The base URL (with its `/v1` or whatever it has) is `OPENAI_BASE_URL`; the key, where one is
    needed, is `OPENAI_API_KEY`.

    Args:
        model: The name by which the endpoint knows the model.

    Raises:
        RewordingsError: The environment names no base URL, or one that is no address.
    """

    def __init__(self, model: str) -> None:
        base = os.environ.get(BASE_URL, "").strip().rstrip("/")
        if not base:
            raise RewordingsError(
                f"`augment_model=endpoint:{model}` needs the environment variable {BASE_URL}, for "
                "example http://localhost:8000/v1. Set it (and OPENAI_API_KEY, where the endpoint "
                "asks for a key), or name a local model folder."
            )
        if not base.startswith(("http://", "https://")):
            raise RewordingsError(
                f"{BASE_URL}={shown(base)} is no address that begins with http:// or https://. "
                "Correct it."
            )
        self._model, self._url = model, f"{base}/chat/completions"
        self._key = os.environ.get(API_KEY, "").strip()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[str, bool]]:
        """Yields each answer in order, and whether it came to its end.

        Args:
            prompts: The prompts to be reworded.

        Raises:
            RewordingsError: An answer does not come.
        """
        with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(prompts)))) as pool:
            running = [pool.submit(self._answer, prompt) for prompt in prompts]
            try:
                for future in running:
                    yield future.result()
            finally:
                for future in running:
                    future.cancel()

    def _answer(self, prompt: Prompt) -> tuple[str, bool]:
        example, message = instruction(prompt)
        messages = [
            {"role": "user", "content": example.question},
            {"role": "assistant", "content": example.answer},
            {"role": "user", "content": message},
        ]
        content = json.dumps({"model": self._model, "messages": messages}).encode()
        for wait in (*WAITS, None):
            try:
                return self._tried(content)
            except _Passing as failure:
                if wait is None:
                    raise RewordingsError(
                        f"{self._url} failed {1 + len(WAITS)} times in a row: {failure}."
                    ) from None
                time.sleep(wait if failure.wait is None else failure.wait)
        raise AssertionError("the last try returns or raises")

    def _tried(self, content: bytes) -> tuple[str, bool]:
        """Returns the answer to one request.

        Raises:
            _Passing: Another try may succeed.
            RewordingsError: None will.
        """
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, content, headers)
        try:
            with self._opener.open(request, timeout=SECONDS) as response:
                text = response.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code} {error.reason}: {self._without_key(error)}"
            if error.code in _PASSING or error.code >= 500:
                raise _Passing(said, _seconds(error.headers.get("Retry-After"))) from None
            raise RewordingsError(
                f"{self._url} refuses {shown(self._model)}: {said}. Check {BASE_URL}, {API_KEY} "
                "and the model's name."
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise _Passing(str(reason)) from None
        try:
            choice = json.loads(text)["choices"][0]
            answer, complete = choice["message"]["content"], choice.get("finish_reason") != "length"
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            answer = complete = None
        if not isinstance(answer, str) or complete is None:
            raise _Passing(f"it answered {shown(text[:200].decode(errors='replace'))}")
        return answer, complete

    def _without_key(self, error: urllib.error.HTTPError) -> str:
        """Returns the beginning of what an error says; some endpoints repeat the key."""
        try:
            said = error.read(_MOST_BYTES).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            said = ""
        said = said.replace(self._key, "...") if self._key else said
        return " ".join(said.split())[:200] or "no reason"


def _seconds(header: str | None) -> float | None:
    """Returns the seconds that an endpoint asks to be left alone; `None` if it names none."""
    try:
        return min(max(0.0, float(header or "")), _LONGEST_WAIT)
    except ValueError:  # none, or a date
        return None
