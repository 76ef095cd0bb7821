"""Texts to measure key covariances on: a folder of plain text, or samples of the model itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..devices import input_device
from ..errors import DataError, ModelError, one_message
from ..files import output_errors, write_atomically
from ..modes import evaluation_mode

_HASH_LENGTH = 10
# Numbers that are read from each parameter to tell models apart.
_FINGERPRINT_NUMBERS = 64
# Keys of a configuration that say where the model came from or how it runs, not what it computes.
_NOT_COMPUTED = frozenset(
    ["transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "name_or_path"]
)


@dataclass(frozen=True)
class Corpus:
    """Texts, and what to call them.

    Attributes:
        name: Short, fit for a file name; it ends in a hash of the texts, so that two corpora never
            share a name.
        description: Where the texts are from, in one line.
        texts: The documents.
    """

    name: str
    description: str
    texts: list[str]


def corpus_from_folder(
    folder: str | Path, n_documents: int, *, document_chars: int = 2000
) -> Corpus:
    """Returns at most `n_documents` documents from all `*.txt` files below a folder.

    Files are read in the order of their paths. A long file becomes several documents, divided at
    line ends or spaces. Of more documents than asked for, evenly spread ones are taken.

    Args:
        folder: The folder.
        n_documents: Documents to take.
        document_chars: Characters of a document at most.

    Raises:
        DataError: The folder does not exist or holds no text, files are not UTF-8, or a number is
            below 1.
    """
    path = Path(folder)
    _check_counts(n_documents=n_documents, document_chars=document_chars)
    if not path.is_dir():
        raise DataError(f"`corpus={folder}` is not a folder. Give a folder of .txt files.")
    files = sorted(
        (file for file in path.rglob("*.txt") if file.is_file()),
        key=lambda file: file.relative_to(path).as_posix(),
    )
    documents: list[str] = []
    problems = []
    for file in files:
        try:
            documents += _documents(file.read_text(encoding="utf-8"), document_chars)
        except UnicodeDecodeError as error:
            problems.append(f"{file} is not UTF-8 (byte {error.start}). Convert or remove it.")
        except OSError as error:
            problems.append(f"{file} cannot be read: {error.strerror}. Correct or remove it.")
    if problems:
        raise DataError(one_message(f"`corpus={folder}`:", problems))
    if not documents:
        found = f"its {len(files)} .txt files are blank" if files else "it has no .txt files"
        raise DataError(f"`corpus={folder}` holds no text: {found}. Give a folder with some.")
    n = min(n_documents, len(documents))
    taken = [documents[i * len(documents) // n] for i in range(n)]
    description = f"{n} of {len(documents)} documents in {len(files)} .txt files of {folder}"
    return Corpus(f"folder-{_hash(taken)}", description, taken)


def corpus_from_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    n_documents: int,
    *,
    tokens_per_document: int = 128,
    seed: int = 0,
    batch_size: int = 16,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Corpus:
    """Returns `n_documents` documents sampled from the model itself.

    Ancestral sampling at temperature 1, from BOS (or EOS where there is no BOS) until EOS: text
    with the model's own statistics, which needs no data. Random states are left as they were.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        n_documents: Documents to sample; a blank one is sampled anew.
        tokens_per_document: Tokens of a document at most.
        seed: Seed of the sampling.
        batch_size: Documents sampled together.
        cache: A folder where the texts are kept, so that they are sampled once.
        progress: Show a progress bar.

    Raises:
        DataError: A number is below 1.
        ModelError: There is no token to begin with, or the model samples blank texts only.
        OutputError: The texts cannot be kept in `cache`.
    """
    _check_counts(
        n_documents=n_documents, tokens_per_document=tokens_per_document, batch_size=batch_size
    )
    sampling = f"{n_documents}-{tokens_per_document}-{seed}-{batch_size}"
    key = _hash([model_fingerprint(model), sampling])
    file = None if cache is None else Path(cache) / f"sampled-{key}.jsonl"
    texts = None if file is None else _read_texts(file, n_documents)
    if texts is None:
        with _seeded(model, seed):
            texts = _sample(
                model, tokenizer, n_documents, tokens_per_document, batch_size, progress
            )
        if file is not None:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            with output_errors(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, lines.encode())
    description = (
        f"{n_documents} documents of at most {tokens_per_document} tokens sampled from the model"
    )
    return Corpus(f"sampled-{_hash(texts)}", description, texts)


def model_fingerprint(model: Any) -> str:
    """Returns a short hash that changes with the model's configuration or weights.

    Of every parameter some numbers spread over it are read, not all: an edit of one matrix shows,
    a change of single numbers may not.

    Raises:
        ModelError: The weights are not loaded.
    """
    digest = hashlib.sha256()
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if not key.startswith("_") and key not in _NOT_COMPUTED
    }
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    loaded = 0
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.is_meta:  # kept on disk, or not loaded
            continue
        loaded += 1
        flat = parameter.detach().reshape(-1)
        # An odd step, so that the numbers are not all of one column.
        step = flat.numel() // _FINGERPRINT_NUMBERS | 1
        digest.update(flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    if not loaded:
        raise ModelError("The model's weights are not loaded (meta device). Load them first.")
    return digest.hexdigest()[:_HASH_LENGTH]


def _check_counts(**counts: int) -> None:
    problems = [f"`{name}={n}` must be 1 or more." for name, n in counts.items() if n < 1]
    if problems:
        raise DataError(one_message("The corpus cannot be made:", problems))


def _hash(texts: Sequence[str]) -> str:
    # As JSON, so that ["ab", "c"] and ["a", "bc"] differ.
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:_HASH_LENGTH]


def _documents(text: str, limit: int) -> list[str]:
    """Returns the pieces of a text, each at most `limit` characters, without blank ones."""
    pieces = []
    while text := text.strip():
        end = len(text)
        if end > limit:
            # A space or line end just behind the limit still divides there.
            window = text[: limit + 1]
            end = max(window.rfind("\n"), window.rfind(" "))
            end = end if end > 0 else limit
        pieces.append(text[:end].rstrip())
        text = text[end:]
    return pieces


def _read_texts(file: Path, n: int) -> list[str] | None:
    """Returns the texts in a cache file, or `None` if it is not there or not whole."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return texts if len(texts) == n and all(isinstance(text, str) for text in texts) else None


@contextmanager
def _seeded(model: Any, seed: int) -> Iterator[None]:
    """Seeds torch for a while; its random states and the model's settings are put back after."""
    device = input_device(model)
    devices = [device] if device.type == "cuda" else []
    settings = model.generation_config
    # A model's own top_k or repetition penalty would make its text unlike what it was trained on.
    model.generation_config = GenerationConfig()
    try:
        with torch.random.fork_rng(devices=devices), evaluation_mode(model), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        model.generation_config = settings


def _sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    n_tokens: int,
    batch_size: int,
    progress: bool,
) -> list[str]:
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ModelError("The tokenizer has neither BOS nor EOS to begin with. Set `bos_token`.")
    end = first if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    texts: list[str] = []
    blank = 0
    with tqdm(total=n, desc="sampling a corpus", unit="document", disable=not progress) as bar:
        while len(texts) < n:
            size = min(batch_size, n - len(texts))
            ids = torch.full((size, 1), first, device=input_device(model))
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=n_tokens,
                eos_token_id=end,
                pad_token_id=end,
            )
            drawn = tokenizer.batch_decode(output[:, 1:], skip_special_tokens=True)
            kept = [text for text in drawn if text.strip()]
            blank += len(drawn) - len(kept)
            if blank > 10 * n + 100:
                raise ModelError("The model samples blank texts. Give a folder of texts instead.")
            texts += kept
            bar.update(len(kept))
    return texts
