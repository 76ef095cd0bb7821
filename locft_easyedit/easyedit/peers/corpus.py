"""Texts to measure key covariances on: a folder of plain text, or samples of the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...errors import DataError, ModelError, one_message
from ...modeling.sampling import TextKind, TextSampler, first_token
from ...utils.hashing import json_sha256
from ...utils.parsing import pieces_of
from ...utils.progress import progress_bar

_HASH_LENGTH = 10
_DOCUMENT_CHARS = 2000  # of a document from a file, at most


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


def corpus_from_folder(folder: str | Path, n_documents: int) -> Corpus:
    """Returns at most `n_documents` documents from all `*.txt` files below a folder.

    Files are read in the order of their paths. A long file becomes several documents, divided at
    line ends or spaces. Of more documents than asked for, evenly spread ones are taken.

    Raises:
        DataError: The folder holds no text, or files are not UTF-8.
    """
    path = Path(folder)
    files = sorted(
        (file for file in path.rglob("*.txt") if file.is_file()),
        key=lambda file: file.relative_to(path).as_posix(),
    )
    documents: list[str] = []
    problems = []
    for file in files:
        try:
            documents += pieces_of(file.read_text(encoding="utf-8"), _DOCUMENT_CHARS)
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
    return Corpus(f"folder-{json_sha256(taken)[:_HASH_LENGTH]}", description, taken)


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

    They go from BOS (or EOS where there is no BOS) until EOS (see `TextSampler`): text with the
    model's own statistics, which needs no data. A blank document is sampled anew. In the folder
    `cache` the texts are kept, so that they are sampled once.

    Raises:
        ModelError: There is no token to begin with, or the model samples blank texts only.
        OutputError: The texts cannot be kept in `cache`.
    """
    size = min(batch_size, n_documents)
    kind = TextKind("documents", [[first_token(tokenizer)]], size, tokens_per_document)
    folder = None if cache is None else Path(cache)
    sampler = TextSampler(model, tokenizer, [kind], cache=folder, seed=seed)
    texts: list[str] = []
    n_blank = number = 0
    with progress_bar(
        total=n_documents, desc="sampling a corpus", unit="document", show=progress
    ) as bar:
        while len(texts) < n_documents:
            sampled = sampler.round(number)[kind.name]
            kept = [text for text in sampled if text.strip()][: n_documents - len(texts)]
            texts += kept
            n_blank += sum(not text.strip() for text in sampled)
            number += 1
            if n_blank > 10 * n_documents + 100:
                raise ModelError("The model samples blank texts. Give a folder of texts instead.")
            bar.update(len(kept))
    description = (
        f"{n_documents} documents of at most {tokens_per_document} tokens sampled from the model"
    )
    return Corpus(f"sampled-{json_sha256(texts)[:_HASH_LENGTH]}", description, texts)
