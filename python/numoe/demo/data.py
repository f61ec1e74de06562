"""Real text that every Python has, cut into a training and a held-out part, and the n-gram yardsticks on it.

Four kinds: the prose of the language reference (`pydoc_data.topics`), source code and character tables of the
standard library, and the names of Unicode characters.  Much of it is repeated verbatim in several places, so every
paragraph (of tables and names: every line) is used once only; no held-out paragraph was seen in training.
"""

from __future__ import annotations

import importlib
import re
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

KINDS = ("prose", "code", "tables", "names")
MAX_BYTES = 360_000  # per kind, so that no kind dominates
MIN_BYTES = 20_000  # below this a kind is left out: a Python without its standard library's sources
HELD_OUT = 0.1  # share of every kind's bytes, whole documents
_ALGORITHMIC = ("CJK ", "HANGUL SYLLABLE", "TANGUT ", "NUSHU ", "KHITAN ")  # names that are only a code number


class NoTextError(RuntimeError):
    """Raised if Python came without the text that the demo trains on."""


@dataclass(frozen=True)
class Corpus:
    """Bytes of each kind, training and held out."""

    kinds: tuple[str, ...]
    train: tuple[Bytes, ...]
    held_out: tuple[Bytes, ...]


def load_corpus() -> Corpus:
    """Read the text of this Python; the same every time, whatever the seed.

    Raises
    ------
    NoTextError
        If this Python carries fewer than two kinds of text.
    """
    parts = {kind: _split(_unique(documents, kind)) for kind, documents in _sources().items()}
    parts = {kind: part for kind, part in parts.items() if len(part[0]) >= MIN_BYTES}
    if len(parts) < 2:
        raise NoTextError(
            f"the demo needs text from the standard library; found only {list(parts)} below "
            f"{sysconfig.get_path('stdlib')}.  Use a Python that has its .py files and pydoc_data."
        )
    train, held_out = zip(*parts.values(), strict=True)
    return Corpus(tuple(parts), train, held_out)


def _sources() -> dict[str, Iterable[str]]:
    library = Path(sysconfig.get_path("stdlib"))
    return {
        "prose": _topics(),
        "code": _files(p for p in library.glob("*.py") if not p.name.startswith("_sysconfigdata")),
        "tables": _files((library / "encodings").glob("*.py")),
        "names": _names(),
    }


def _topics() -> Iterator[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(topics):
        yield topics[name]


def _files(paths: Iterable[Path]) -> Iterator[str]:
    for path in sorted(paths):
        yield path.read_text(encoding="utf-8", errors="replace")


def _names(per_document: int = 64) -> Iterator[str]:
    names = (unicodedata.name(chr(code), "") for code in range(0x20000))  # planes 0 and 1: all but ideographs
    kept = [name for name in names if name and not name.startswith(_ALGORITHMIC)]
    for start in range(0, len(kept), per_document):
        yield "\n".join(kept[start : start + per_document]) + "\n"


def _unique(documents: Iterable[str], kind: str) -> list[bytes]:
    """Documents without the paragraphs (or lines) that an earlier one had already."""
    seen: set[str] = set()
    result = []
    for text in documents:
        pieces = re.split(r"(?<=\n)\n+", text) if kind in ("prose", "code") else text.splitlines(keepends=True)
        fresh = []
        for piece in pieces:
            key = " ".join(piece.split())
            if key and key not in seen:
                seen.add(key)
                fresh.append(piece)
        gap = "\n" if kind in ("prose", "code") else ""
        result.append((gap.join(fresh) + gap).encode())
    return [document for document in result if document.strip()]


def _split(documents: list[bytes]) -> tuple[Bytes, Bytes]:
    """Shuffle whole documents with a fixed seed; the first ones are held out, the next ones train."""
    order = np.random.default_rng(0).permutation(len(documents))
    total = min(MAX_BYTES, sum(map(len, documents)))
    held_out, train = bytearray(), bytearray()
    for i in order:
        (held_out if len(held_out) < HELD_OUT * total else train).extend(documents[i])
    limit = total - min(len(held_out), int(HELD_OUT * total))
    return np.frombuffer(bytes(train[:limit]), np.uint8), np.frombuffer(bytes(held_out[: total - limit]), np.uint8)


# ------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """T windows: the previous bytes, the byte to predict, and which kind of text they are from."""

    contexts: Bytes  # (T, n), oldest byte first; 0 before the start of a text
    targets: Bytes  # (T,)
    kinds: Ints  # (T,), index into Corpus.kinds


def _windows(texts: tuple[Bytes, ...], positions: list[Ints], width: int) -> Batch:
    rows = []
    for text, at in zip(texts, positions, strict=True):
        padded = np.concatenate([np.zeros(width, np.uint8), text])
        rows.append(padded[at[:, None] + np.arange(width + 1)])  # window ends at text[at]
    windows = np.concatenate(rows)
    kinds = np.repeat(np.arange(len(texts)), [len(at) for at in positions])
    return Batch(np.ascontiguousarray(windows[:, :-1]), windows[:, -1].copy(), kinds)


def training_batch(corpus: Corpus, seed: int, step: int, num_tokens: int, width: int) -> Batch:
    """Batch number `step`: a function of (seed, step) alone, so the position in the data is the step number."""
    rng = np.random.default_rng([seed, step])
    share = -(-num_tokens // len(corpus.kinds))
    positions = [rng.integers(0, len(text), share) for text in corpus.train]
    return _windows(corpus.train, positions, width)


def held_out_batch(corpus: Corpus, per_kind: int, width: int) -> Batch:
    """Take at most `per_kind` evenly spaced positions of each kind's held-out text."""
    positions = [np.linspace(0, len(text) - 1, min(per_kind, len(text))).astype(np.int64) for text in corpus.held_out]
    return _windows(corpus.held_out, positions, width)


# ---------------------------------------------------------------------------------------------- yardsticks


def ngram_bits(corpus: Corpus, batch: Batch) -> dict[str, npt.NDArray[np.float64]]:
    """Bits of every target under byte frequencies and byte-pair frequencies of the training text, (T,) each.

    Kinds weigh the same in the counts, as they do in training batches.  Unseen bytes: add-one for the unigram;
    the bigram is smoothed towards the unigram with the weight of one observation (Bayes with a Dirichlet prior).
    """
    one, two = np.zeros(256), np.zeros((256, 256))
    for text in corpus.train:
        weight = np.mean([len(t) for t in corpus.train]) / len(text)
        one += weight * np.bincount(text, minlength=256)
        pairs = text[:-1].astype(np.int64) * 256 + text[1:]
        two += weight * np.bincount(pairs, minlength=65536).reshape(256, 256)
    unigram = (one + 1) / (one + 1).sum()
    bigram = (two + unigram) / (two.sum(axis=1, keepdims=True) + 1)
    last = batch.contexts[:, -1]
    return {"unigram": -np.log2(unigram[batch.targets]), "bigram": -np.log2(bigram[last, batch.targets])}
