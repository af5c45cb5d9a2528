"""Text to ids and back: any ``tokenizer.json``, a byte-level fallback, and BPE training."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_idea import files
from megatron_idea.data.documents import DataError, Documents, hash_fraction, input_files

END_OF_DOCUMENT = "<|endoftext|>"
END_OF_DOCUMENT_NAMES = (
    END_OF_DOCUMENT,  # GPT-2, GPT-NeoX, OLMo, Qwen
    "<|end_of_text|>",  # Llama 3
    "</s>",  # Llama 2, Mistral
    "<eos>",  # Gemma
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
    "<|eos|>",
    "<eod>",
)
"""What public tokenizers call the token that ends a document; the first one present is taken."""
PADDING = "<|pad|>"
"""Not the end of a document: what masks padding must not mask ends, or they are never learned."""
SPECIAL = (
    END_OF_DOCUMENT, PADDING, "<|im_start|>", "<|im_end|>",
    "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>",
)  # fmt: skip
"""Of a tokenizer that is trained here. Pretraining sees the first; the others are there for
fine-tuning, which then need not change the size of the embeddings: ChatML's two and four free."""
SETTINGS = (
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json",
)  # fmt: skip
"""What other programs read beside a ``tokenizer.json``."""
_PIECE_CHARACTERS = 16_384
_MOST_BYTES = 1 << 28
"""Of a tokenizer.json; that of Gemma 3, with 262,144 tokens, has 33 MB."""
_MOST_GAPS = 1 << 20
"""Ids that stand for nothing: tables have a row for each."""


class Tokenizer(ABC):
    """Text to ids and back; text never turns into the end-of-document token."""

    name: str
    """What ``load_tokenizer`` was given."""
    vocab_size: int
    """One more than the largest id."""
    eod: int
    """Id of the end-of-document token."""
    digest: str
    """Names the content: equal digests give equal ids."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts at once; nothing is added, nothing truncated."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, special tokens spelled out."""

    @abstractmethod
    def token_bytes(self) -> list[int] | None:
        """UTF-8 bytes of text that each id stands for, special tokens 0.

        None where that depends on the tokens around it: only byte-level tokenizers can tell.
        """

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255 and the end of document as 256: no file, no dependency."""

    name = "byte"
    vocab_size = 257
    eod = 256
    digest = hashlib.sha256(b"byte: id = UTF-8 byte, 256 = end of document").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        eod = END_OF_DOCUMENT.encode()
        raw = b"".join(eod if i == self.eod else bytes((i,)) for i in ids)
        return raw.decode("utf-8", errors="replace")

    def token_bytes(self) -> list[int]:
        return [1] * 256 + [0]


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json`` as the tokenizers library writes it.

    Raises: DataError when the file cannot be read or has no end-of-document token.
    """

    def __init__(self, path: Path, name: str) -> None:
        import tokenizers  # here, so that the byte fallback works without it

        self._path = path
        with self._explained():
            content = files.read_bytes(path, _MOST_BYTES)
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        # A tokenizer.json can ask for cut or padded sequences; a corpus must be encoded whole.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A document that spells "<|endoftext|>" out must not end there.
        self._tokenizer.encode_special_tokens = True
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        present = [token for token in END_OF_DOCUMENT_NAMES if token in vocab]
        if not present:
            raise DataError(
                f"{path} has no end-of-document token; add one of: "
                f"{', '.join(END_OF_DOCUMENT_NAMES)}"
            )
        self.name = name
        self.eod = vocab[present[0]]
        # Not the number of tokens: ids may have gaps, and a model needs a row for each id.
        self.vocab_size = max(vocab.values()) + 1
        if self.vocab_size > len(vocab) + _MOST_GAPS:
            raise DataError(
                f"{path} has an id of {self.vocab_size - 1} among {len(vocab)} tokens; renumber "
                "the tokens with ids that far out, or remove them"
            )
        self.digest = hashlib.sha256(content).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's own copy of a tokenizer lacks ``encode_special_tokens``.
        return _same_tokenizer, (self._path, self.name, self.digest)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with self._explained():
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        with self._explained():
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """The library raises bare Exception for a malformed file, and panics at some."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"{self._path} is not a usable tokenizer.json: {reason}") from error

    def token_bytes(self) -> list[int] | None:
        decoder = json.loads(self._tokenizer.to_str())["decoder"] or {}
        if "ByteLevel" not in [d.get("type") for d in decoder.get("decoders", [decoder])]:
            return None
        sizes = [0] * self.vocab_size
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            sizes[i] = len(token)  # a letter stands for a byte
        for i, added in self._tokenizer.get_added_tokens_decoder().items():
            sizes[i] = 0 if added.special else len(added.content.encode())
        return sizes


def _same_tokenizer(path: Path, name: str, digest: str) -> JsonTokenizer:
    tokenizer = JsonTokenizer(path, name)
    if tokenizer.digest != digest:
        raise DataError(f"{path} has changed while it was in use")
    return tokenizer


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load ``byte``, a ``tokenizer.json``, or a folder that holds one.

    Raises: DataError when there is no such file or it cannot be used.
    """
    if str(name) == "byte":
        return ByteTokenizer()
    path = tokenizer_file(name)
    if not path.is_file():
        raise DataError(f"no tokenizer at {name}; legal: a tokenizer.json, its folder, or 'byte'")
    return JsonTokenizer(path, str(name))


def tokenizer_file(name: str | Path) -> Path:
    """The ``tokenizer.json`` that ``name`` means: itself, or the one in that folder."""
    path = Path(name)
    return path / "tokenizer.json" if path.is_dir() else path


def copy_tokenizer(name: str | Path, to: Path) -> None:
    """Copy a ``tokenizer.json`` and its settings into folder ``to``.

    Raises: UnsafeFileError for one that is no regular file, or larger than any tokenizer's.
    """
    path = tokenizer_file(name)
    if to.resolve() == path.parent.resolve() and path.name == "tokenizer.json":
        return
    to.mkdir(parents=True, exist_ok=True)
    for source, target in [(path, "tokenizer.json"), *((path.with_name(n), n) for n in SETTINGS)]:
        if source.is_file():
            part = to / f".{target}.{os.getpid()}.part"
            part.write_bytes(files.read_bytes(source, _MOST_BYTES))
            part.replace(to / target)


def train_tokenizer(
    inputs: Sequence[str | Path],
    vocab_size: int,
    out: Path,
    sample_bytes: int = 8_000_000,
    text_key: str = "text",
) -> Tokenizer:
    """Train byte-level BPE on a sample of the documents and write it as ``out``.

    The sample is a share of the text, chosen piece by piece by a hash, so the same documents give
    the same tokenizer. It spreads over all inputs. Bad documents are left out.

    ``vocab_size`` counts the 256 bytes and ``SPECIAL``. Few or short documents can
    end with fewer merges than asked for; the tokenizer's own ``vocab_size`` says how many.

    Raises: DataError for a vocabulary below 264 or inputs without text.
    Cost: about 1 s for 8 MB of Python sources and 4096 tokens on two CPU cores.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Engine

    smallest = 256 + len(SPECIAL)
    if vocab_size < smallest:
        raise DataError(
            f"vocab_size is {vocab_size}; byte-level BPE needs at least {smallest}: 256 bytes and "
            f"{len(SPECIAL)} special tokens"
        )
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(_sample(inputs, sample_bytes, text_key), trainer)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.write_text(engine.to_str(pretty=True), encoding="utf-8")
    part.replace(out)
    return load_tokenizer(out)


def _sample(inputs: Sequence[str | Path], sample_bytes: int, text_key: str) -> Iterator[str]:
    """Yield about ``sample_bytes`` of text: every piece with the same chance, by its hash."""
    # File sizes overstate text (markup) or understate it (compression): good enough for a share.
    available = sum(path.stat().st_size for path in input_files(inputs))
    share = min(1.0, sample_bytes / max(available, 1))
    taken = 0
    for document in Documents(inputs, text_key, skip_bad_documents=True):
        # Pieces, so that one huge file is sampled too, and not taken whole or not at all.
        for start in range(0, len(document.text), _PIECE_CHARACTERS):
            piece = document.text[start : start + _PIECE_CHARACTERS]
            if hash_fraction(piece, salt=b"tokenizer") < share:
                taken += len(piece.encode("utf-8"))
                yield piece
        if taken >= sample_bytes:
            break
    if not taken:
        raise DataError(
            f"no text to train a tokenizer on: {', '.join(map(str, inputs))} hold {available} "
            f"bytes, of which sample_bytes={sample_bytes} were to be taken"
        )
