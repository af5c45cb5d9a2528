"""Tokenized datasets: a stable split, whole files, and refusal of everything else."""

import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_idea.data.documents import BadDocumentError, DataError
from megatron_idea.data.indexed import check_dataset
from megatron_idea.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from megatron_idea.data.tokenizing import tokenize

BYTE = load_tokenizer("byte")
TEXTS = [f"document {i} \u00fc " + "x" * (i % 7) for i in range(200)]


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(prefix, tokenizer=BYTE):
    dataset = IndexedDataset(str(prefix))  # must outlive its rows: it unmaps them when it goes
    documents = [dataset[i].copy() for i in range(len(dataset))]
    assert all(ids[-1] == tokenizer.eod for ids in documents)
    return [tokenizer.decode(ids[:-1].tolist()) for ids in documents]


@pytest.fixture
def dataset(tmp_path):
    tokenize([jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "set", BYTE, held_out=0.2)
    return tmp_path / "set_train"


def test_every_document_is_on_one_side_and_comes_back_in_order(tmp_path):
    summary = tokenize([jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out" / "set.v2", BYTE, 0.2)
    train, held = texts_of(summary.train_prefix), texts_of(summary.held_out_prefix)
    assert sorted(train + held) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in set(train)]
    assert summary.documents == 200 and summary.held_out_documents == len(held)
    assert 20 <= len(held) <= 60
    assert summary.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert summary.train_tokens + summary.held_out_tokens == summary.text_bytes + 200
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"set.v2_{side}.{kind}" for side in ("heldout", "train") for kind in ("bin", "idx", "json")
    ]
    info = check_dataset(summary.train_prefix, BYTE)
    assert (info.documents, info.tokens) == (len(train), summary.train_tokens)
    assert info.text_bytes == sum(len(text.encode()) for text in train)


def test_the_split_depends_on_the_text_alone(tmp_path):
    first = tokenize([jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "a", BYTE, 0.2)
    mixed = [*reversed(TEXTS), *TEXTS[:100], *(f"new {i}" for i in range(50))]
    second = tokenize([jsonl(tmp_path / "b.jsonl", mixed)], tmp_path / "b", BYTE, 0.2)
    held = {text for text in texts_of(second.held_out_prefix) if text in TEXTS}
    assert held == set(texts_of(first.held_out_prefix))
    assert held.isdisjoint(texts_of(second.train_prefix))


def test_a_larger_share_holds_out_a_superset(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    small = tokenize([source], tmp_path / "a", BYTE, 0.1)
    large = tokenize([source], tmp_path / "b", BYTE, 0.3)
    assert set(texts_of(small.held_out_prefix)) < set(texts_of(large.held_out_prefix))


def test_holding_nothing_out_removes_the_held_out_side_of_an_earlier_call(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    tokenize([source], tmp_path / "set", BYTE, 0.2)
    summary = tokenize([source], tmp_path / "set", BYTE, 0)
    assert summary.held_out_prefix is None and summary.held_out_tokens == 0
    assert texts_of(summary.train_prefix) == TEXTS
    assert not list(tmp_path.glob("set_heldout*"))


def test_bad_and_empty_documents_are_skipped_and_counted(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [*TEXTS, "", ""])
    with source.open("a") as stream:
        stream.write('{"text": "cut')
    with pytest.raises(BadDocumentError, match=r"a\.jsonl:203"):
        tokenize([source], tmp_path / "set", BYTE)
    assert list(tmp_path.iterdir()) == [source]
    summary = tokenize([source], tmp_path / "set", BYTE, skip_bad_documents=True)
    assert (summary.documents, summary.skipped_documents) == (200, 3)


def test_a_failed_call_leaves_the_earlier_dataset_alone(dataset, tmp_path):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match="no file or folder"):
        tokenize([tmp_path / "a.jsonl", tmp_path / "gone"], tmp_path / "set", BYTE)
    (tmp_path / "a.jsonl").write_text('{"text": "cut')
    with pytest.raises(BadDocumentError):
        tokenize([tmp_path / "a.jsonl"], tmp_path / "set", BYTE)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {**after, "a.jsonl": before["a.jsonl"]} == before


@pytest.mark.parametrize(
    ("texts", "held_out", "message"),
    [
        ([], 0.05, "nothing to tokenize"),
        ([""], 0.05, "nothing to tokenize"),
        (["a"], 1e-9, "none of 1 documents fell on the held-out side"),
        (["a"], 1 - 1e-9, "none of 1 documents fell on the training side"),
        (["a"], 1.0, r"held_out is 1\.0; legal: .* \[0, 1\)"),
    ],
)
def test_an_empty_side_is_refused(tmp_path, texts, held_out, message):
    with pytest.raises(DataError, match=message):
        tokenize([jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "set", BYTE, held_out)
    assert not list(tmp_path.glob("*set*"))


def test_progress_counts_text_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_idea.data.shards.SHARD_CHARACTERS", 500)
    seen = []
    summary = tokenize(
        [jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "set", BYTE, progress=seen.append
    )
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1] == summary.text_bytes


class Wide(ByteTokenizer):
    """Bytes, spread over a vocabulary of any size."""

    name = "wide"

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1
        self.digest = f"{vocab_size:064}"


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, np.uint16), (70_000, np.int32)])
def test_tokens_take_two_bytes_until_the_vocabulary_needs_four(tmp_path, vocab_size, dtype):
    tokenizer: Tokenizer = Wide(vocab_size)
    summary = tokenize([jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "set", tokenizer, 0)
    assert IndexedDataset(str(summary.train_prefix)).index.dtype == dtype
    assert texts_of(summary.train_prefix, tokenizer) == TEXTS


def test_a_vocabulary_that_no_token_type_counts_is_refused(tmp_path):
    with pytest.raises(DataError, match="has 3000000000 ids, Megatron's token type int32"):
        tokenize([jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "set", Wide(3_000_000_000))


def test_a_truncated_bin_is_refused_with_both_sizes(dataset):
    path = Path(f"{dataset}.bin")
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=f"{len(whole) - 2} bytes, .* promises {len(whole)}"):
        check_dataset(dataset, BYTE)


@pytest.mark.parametrize("keep", [0, 20, 34, 100])
def test_a_truncated_index_is_refused(dataset, keep):
    path = Path(f"{dataset}.idx")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"_train\.idx (is not a Megatron index|has \d+ bytes)"):
        check_dataset(dataset, BYTE)


def test_a_foreign_index_is_refused(dataset):
    path = Path(f"{dataset}.idx")
    whole = path.read_bytes()
    path.write_bytes(b"PK" + whole[2:])
    with pytest.raises(DataError, match="does not begin with MMIDIDX"):
        check_dataset(dataset, BYTE)
    path.write_bytes(whole[:17] + b"\x63" + whole[18:])
    with pytest.raises(DataError, match=r"token type 99; legal: .*8 \(uint16\)"):
        check_dataset(dataset, BYTE)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(dataset, suffix):
    Path(f"{dataset}{suffix}").unlink()
    with pytest.raises(DataError, match=rf"no .*set_train\{suffix}"):
        check_dataset(dataset, BYTE)


def test_another_tokenizer_is_refused(dataset):
    with pytest.raises(DataError, match=r"made with tokenizer 'byte' .* this run has 'wide'"):
        check_dataset(dataset, Wide(257))


def test_a_sidecar_of_another_dataset_is_refused(dataset):
    path = Path(f"{dataset}.json")
    sidecar = json.loads(path.read_text())
    path.write_text(json.dumps({**sidecar, "tokens": 5}))
    with pytest.raises(DataError, match="tells of 5 tokens"):
        check_dataset(dataset, BYTE)
    path.write_text("{}")
    with pytest.raises(DataError, match="is not a dataset's sidecar"):
        check_dataset(dataset, BYTE)


def megatron_dataset(prefix, documents, dtype=np.int32):
    """A dataset as other tools write it: no sidecar."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        builder.add_document(np.array(document, dtype), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_a_dataset_made_elsewhere_is_taken_if_its_tokens_fit(tmp_path):
    prefix = megatron_dataset(tmp_path / "theirs", [[1, 2, 256], [250] * 100_000])
    info = check_dataset(prefix, BYTE)
    assert (info.documents, info.tokens, info.text_bytes) == (2, 100_003, None)
    prefix = megatron_dataset(tmp_path / "large", [[1, 2, 256], [5] * 100_000, [257]])
    with pytest.raises(DataError, match="holds token 257, tokenizer 'byte' has ids below 257"):
        check_dataset(prefix, BYTE)


@pytest.mark.parametrize("documents", [[], [[]]])
def test_an_empty_dataset_is_refused(tmp_path, documents):
    with pytest.raises(DataError, match="is empty"):
        check_dataset(megatron_dataset(tmp_path / "theirs", documents), BYTE)
