"""Corpus and documents: every format, and errors that name the line."""

import gzip
import importlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_idea.data.corpus import build_corpus
from megatron_idea.data.documents import _ZSTD, BadDocumentError, DataError, Documents, by_suffix

zstd_module = importlib.import_module(_ZSTD)

TEXTS = ["one\ntwo", "drei \u00fc\u4e2d\U0001f600", "", "last"]
JSONL = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


def zstd(raw):
    return pa.compress(raw, codec="zstd", asbytes=True)


def texts_of(*inputs, **options):
    return [document.text for document in Documents(inputs, **options)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstd)], ids=["", "gz", "zst"]
)
def test_json_lines_are_read_plain_and_compressed(tmp_path, name, suffix, pack):
    documents = list(Documents([write(tmp_path / f"a{name}{suffix}", pack(JSONL))]))
    assert [document.text for document in documents] == TEXTS
    assert documents[3].where == f"{tmp_path}/a{name}{suffix}:4"
    assert texts_of(tmp_path) == TEXTS


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_concatenated_compressed_files_are_read_to_the_end(tmp_path, pack):
    suffix = ".gz" if pack is gzip.compress else ".zst"
    assert texts_of(write(tmp_path / f"a.jsonl{suffix}", pack(JSONL) + pack(JSONL))) == 2 * TEXTS


def test_any_window_of_zstd_is_read(tmp_path):
    stream = zstd_module.ZstdCompressor(
        options={
            zstd_module.CompressionParameter.window_log: 31,
            zstd_module.CompressionParameter.enable_long_distance_matching: 1,
        }
    )
    packed = stream.compress(JSONL) + stream.flush()  # of a size that was not known, as from a pipe
    assert texts_of(write(tmp_path / "a.jsonl.zst", packed)) == TEXTS


def test_parquet_is_read_by_column(tmp_path):
    pq.write_table(pa.table({"id": range(4), "body": TEXTS}), tmp_path / "a.parquet")
    documents = list(Documents([tmp_path / "a.parquet"], text_key="body"))
    assert [document.text for document in documents] == TEXTS
    assert documents[2].where.endswith("a.parquet:2")
    with pytest.raises(DataError, match="no column 'text', only 'id', 'body'"):
        texts_of(tmp_path / "a.parquet")


def test_a_folder_is_walked_in_sorted_order_and_ignores_other_files(tmp_path):
    write(tmp_path / "b" / "z.md", b"third")
    write(tmp_path / "b" / "a.py", b"second")
    write(tmp_path / "a.txt", b"first")
    write(tmp_path / "c.rst.gz", gzip.compress(b"fourth"))
    write(tmp_path / "photo.png", b"\x89PNG")
    assert texts_of(tmp_path) == ["first", "second", "third", "fourth"]


def test_reading_goes_on_after_any_document(tmp_path):
    write(tmp_path / "a.json", b"\n" + JSONL + b"\nnot JSON\n")
    write(tmp_path / "b.jsonl.gz", gzip.compress(JSONL))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "c.parquet")
    write(tmp_path / "d.txt", b"text")
    documents = Documents([tmp_path], skip_bad_documents=True)
    reached, texts = [documents.reached], []
    for document in documents:
        reached.append(documents.reached)
        texts.append(document.text)
    assert len(texts) == 13 and documents.reached == (4, 0)
    for count, begin in enumerate([*reached, documents.reached]):
        rest = Documents([tmp_path], skip_bad_documents=True, begin=begin)
        assert [document.text for document in rest] == texts[count:]
        assert rest.skipped == (1 if count <= 4 else 0)


def test_what_tokenize_writes_is_no_text(tmp_path):
    write(tmp_path / "a.json", JSONL)
    for name in ("set_train.idx", "set_train.json", "set_train.bin", "tokenizer.json"):
        write(tmp_path / name, b"{}")
    assert texts_of(tmp_path) == TEXTS


def test_what_is_left_aside_is_counted_by_suffix(tmp_path):
    for name in ("a.png", "b.png", "c.csv.gz", "d.parquet.gz", "Makefile", ".git", "e.txt"):
        write(tmp_path / name, b"")
    (tmp_path / "f.txt").symlink_to(tmp_path / "e.txt")
    documents = Documents([tmp_path])
    assert len(list(documents)) == 1
    assert by_suffix(documents.passed_over) == (
        "2 .png, 1 hidden, 1 without suffix, 1 .csv.gz, 1 .parquet.gz, 1 read already"
    )
    assert by_suffix(documents.passed_over, most=2) == "2 .png, 1 hidden, 4 of other kinds"


def test_hidden_names_in_a_folder_are_left_out_and_read_when_they_are_named(tmp_path):
    write(tmp_path / "a.jsonl", JSONL)
    hidden = [write(tmp_path / "._a.jsonl", b"\0\5\x16\7"), tmp_path / ".Trash-1000"]
    copy = write(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.jsonl", JSONL)
    write(tmp_path / ".Trash-1000" / "deleted.jsonl", JSONL)
    photo = write(tmp_path / "photo.png", b"\x89PNG")
    documents = Documents([tmp_path])
    assert [document.text for document in documents] == TEXTS
    assert set(documents.passed_over) == {*hidden, copy.parent, photo}
    assert texts_of(copy) == texts_of(copy.parent) == TEXTS
    with pytest.raises(BadDocumentError, match=r"\._a\.jsonl:1 is not"):
        texts_of(hidden[0])


def test_links_are_followed_and_each_target_is_read_once(tmp_path):
    elsewhere = tmp_path / "disk"
    write(elsewhere / "sub" / "b.txt", b"second")
    write(elsewhere / "a.txt", b"first")
    data = tmp_path / "data"
    data.mkdir()
    (data / "1.txt").symlink_to(elsewhere / "a.txt")
    (data / "2").symlink_to(elsewhere / "sub")
    (data / "3").symlink_to(elsewhere / "sub")
    (data / "4.txt").symlink_to(data / "1.txt")
    (elsewhere / "sub" / "loop").symlink_to(data)
    documents = Documents([data])
    assert [document.text for document in documents] == ["first", "second"]
    assert documents.passed_over == [data / "2" / "loop", data / "3", data / "4.txt"]
    (data / "5.txt").symlink_to(elsewhere / "gone.txt")
    with pytest.raises(DataError, match=r"5\.txt is a link to .*gone\.txt, which is not there"):
        texts_of(data)


def test_missing_unknown_and_empty_inputs_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no file or folder at .*nowhere\.jsonl"):
        texts_of(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"a\.csv is of no known format; legal: \.jsonl"):
        texts_of(write(tmp_path / "a.csv", b"x"))
    write(tmp_path / "b.CSV", b"x")
    with pytest.raises(DataError, match=r"no file of a known format, only 1 \.csv, 1 \.CSV; legal"):
        texts_of(tmp_path)
    write(tmp_path / "empty" / "a", b"").unlink()
    with pytest.raises(DataError, match="empty holds no file of a known format; legal"):
        texts_of(tmp_path / "empty")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "is not a line of JSON"),
        (b'{"content": "x"}', "no key 'text', only 'content'"),
        (b'{"text": null}', "'text' is a NoneType, not a string"),
        (b'["x"]', "holds a list, not a JSON object"),
        (b'{"text": "\xff"}', "is not UTF-8 text"),
        (b'{"text": "\\ud800"}', "is not Unicode text"),
    ],
)
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + line + b'\n{"text": "too"}\n')
    with pytest.raises(BadDocumentError, match=message) as error:
        texts_of(path)
    assert f"{path}:3" in str(error.value)
    documents = Documents([path], skip_bad_documents=True)
    for _ in range(2):  # the count is of one iteration
        assert [document.text for document in documents] == ["good", "too"]
        assert documents.skipped == 1


def test_a_text_file_that_is_not_utf8_is_a_bad_document(tmp_path):
    write(tmp_path / "a.txt", "\u00fc".encode("latin-1"))
    write(tmp_path / "b.txt", b"good")
    with pytest.raises(BadDocumentError, match=r"a\.txt is not UTF-8 text"):
        texts_of(tmp_path)
    assert texts_of(tmp_path, skip_bad_documents=True) == ["good"]


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstd)], ids=["gz", "zst"]
)
def test_a_truncated_file_is_an_error_even_when_bad_documents_are_skipped(tmp_path, suffix, pack):
    raw = b"".join(b'{"text": "%d"}\n' % (i * 7919**5) for i in range(5000))
    packed = pack(raw)
    path = write(tmp_path / f"a.jsonl{suffix}", packed[: len(packed) * 2 // 3])
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl"):
        texts_of(path, skip_bad_documents=True)


def test_a_file_that_is_not_parquet_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet"):
        texts_of(write(tmp_path / "a.parquet", b"not at all"))


def test_the_corpus_is_deterministic_and_free_of_duplicates(tmp_path):
    first = build_corpus(tmp_path / "a" / "corpus.jsonl")
    again = build_corpus(tmp_path / "b.jsonl")
    assert first.path.read_bytes() == again.path.read_bytes()
    texts = texts_of(first.path)
    assert len(texts) == len(set(texts)) == first.documents > 100
    assert sum(len(text.encode()) for text in texts) == first.bytes > 2_000_000
    assert list((tmp_path / "a").iterdir()) == [first.path]


def test_the_corpus_takes_python_documentation_and_nobody_elses(tmp_path):
    share = tmp_path / "doc"
    write(share / "python3.11" / "html" / "_sources" / "a.rst.txt", b"a page of documentation")
    write(share / "python3-doc" / "b.txt.gz", gzip.compress(b"a packed page"))
    write(share / "python3-other" / "c.txt", b"another package")
    corpus = build_corpus(tmp_path / "corpus.jsonl", doc_root=share)
    records = [json.loads(line) for line in corpus.path.read_text("utf-8").splitlines()]
    found = {r["source"]: r["text"] for r in records if r["source"].startswith("doc/")}
    assert found == {
        "doc/python3-doc/b.txt.gz": "a packed page",
        "doc/python3.11/html/_sources/a.rst.txt": "a page of documentation",
    }
