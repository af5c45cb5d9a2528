"""Tokenizers: exact round trips, one end-of-document token, one digest."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_idea.data.documents import DataError, hash_fraction
from megatron_idea.data.tokenizer import SPECIAL, load_tokenizer, train_tokenizer

VOCAB_SIZE = 400
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    for i in range(30):
        text = f"def function_{i}(x):\n    return x + {i}\n\n" * 20
        (folder / f"{i:02}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def bpe(sample, tmp_path_factory):
    return train_tokenizer([sample], VOCAB_SIZE, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@given(text=unicode_text)
def test_bytes_round_trip(text):
    byte = load_tokenizer("byte")
    assert byte.decode(byte.encode(text)) == text
    assert byte.encode(text) == list(text.encode())


@given(text=unicode_text)
def test_trained_bpe_round_trips_on_any_text(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_trained_bpe_has_the_vocabulary_asked_for_and_compresses(bpe, sample):
    text = (sample / "07.py").read_text()
    assert bpe.vocab_size <= VOCAB_SIZE
    assert len(bpe.encode(text)) < len(text) / 2
    assert max(bpe.encode(text)) < bpe.vocab_size


def test_trained_bpe_reserves_tokens_within_the_size_asked_for(bpe, sample, tmp_path):
    smallest = train_tokenizer([sample], 264, tmp_path / "tokenizer.json")
    assert smallest.vocab_size == 256 + len(SPECIAL)
    for tokenizer in (smallest, bpe):
        assert tokenizer.decode(range(len(SPECIAL))) == "".join(SPECIAL)
        assert SPECIAL[tokenizer.eod] == "<|endoftext|>"
        assert tokenizer.token_bytes()[: len(SPECIAL)] == [0] * len(SPECIAL)
        for token in SPECIAL:
            assert min(tokenizer.encode(token)) >= len(SPECIAL)


def test_a_copy_in_another_process_is_the_same(bpe, tmp_path):
    text = "def f(x): <|endoftext|>"
    assert pickle.loads(pickle.dumps(bpe)).encode(text) == bpe.encode(text)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(Path(bpe.name).read_bytes())
    sent = pickle.dumps(load_tokenizer(path))
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DataError, match="has changed while it was in use"):
        pickle.loads(sent)


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_text_that_spells_the_special_token_does_not_end_a_document(bpe, name):
    tokenizer = bpe if name == "bpe" else load_tokenizer("byte")
    text = "before<|endoftext|>after"
    assert tokenizer.eod not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.eod]) == "<|endoftext|>"
    assert 0 <= tokenizer.eod < tokenizer.vocab_size


def test_a_batch_is_encoded_as_its_texts_are(bpe):
    texts = ["", "def f(x):", " \n\t", "\u4e2d"]
    assert bpe.encode_batch(texts) == [bpe.encode(text) for text in texts]


def test_training_again_on_the_same_text_gives_the_same_tokenizer(bpe, sample, tmp_path):
    again = train_tokenizer([sample], VOCAB_SIZE, tmp_path / "tokenizer.json")
    assert again.digest == bpe.digest
    assert list(tmp_path.iterdir()) == [tmp_path / "tokenizer.json"]
    assert load_tokenizer(tmp_path).digest == again.digest  # a folder names its tokenizer.json


def test_the_sample_bounds_what_training_reads(sample, tmp_path):
    few = train_tokenizer([sample], VOCAB_SIZE, tmp_path / "few.json", sample_bytes=1500)
    assert few.vocab_size < VOCAB_SIZE  # too little text for that many merges


def test_cutting_and_padding_that_a_file_asks_for_are_ignored(bpe, tmp_path):
    content = json.loads(Path(bpe.name).read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "def function(x): return x"
    assert load_tokenizer(tmp_path).encode(text) == bpe.encode(text)


def test_unusable_tokenizers_are_named(bpe, sample, tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer at nowhere; legal: .*'byte'"):
        load_tokenizer("nowhere")
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(DataError, match=r"broken\.json is not a usable tokenizer\.json"):
        load_tokenizer(broken)
    endless = tmp_path / "endless.json"
    endless.write_text(Path(bpe.name).read_text().replace("<|endoftext|>", "<|something|>"))
    with pytest.raises(DataError, match=r"has no end-of-document token; add one of: <\|endof"):
        load_tokenizer(endless)
    with pytest.raises(DataError, match=r"vocab_size is 263; .* at least 264"):
        train_tokenizer([sample], 263, tmp_path / "small.json")


@given(text=unicode_text)
def test_the_hash_of_a_text_is_a_share(text):
    assert 0 <= hash_fraction(text, b"held out") < 1


def test_the_hash_of_a_text_never_changes():
    assert hash_fraction("the same for ever", b"held out") == 0.35328470113402244


def test_corpus_and_tokenizer_start_without_torch():
    code = (
        "import sys, megatron_idea.data.corpus, megatron_idea.data.tokenizer;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'megatron', 'pyarrow', 'tokenizers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
