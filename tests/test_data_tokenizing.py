"""The same files from any number of processes, and after any kill."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_idea.data.documents import BadDocumentError, DataError
from megatron_idea.data.indexed import write_index
from megatron_idea.data.shards import WorkerError
from megatron_idea.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_idea.data.tokenizing import tokenize
from megatron_idea.records import lock

BYTE = load_tokenizer("byte")
TEXTS = [f"document {i} \u00fc " + "x" * (i % 7) for i in range(60)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("megatron_idea.data.shards.SHARD_CHARACTERS", 100)  # about six documents
    monkeypatch.setattr(lock, "SETTLE_S", 0.0)


@pytest.fixture
def inputs(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for part in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[part * 20 : part * 20 + 20]]
        (folder / f"{part}.json").write_text("".join(lines))
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def whole(inputs, folder, **options):
    """What an uninterrupted call writes."""
    tokenize([inputs], folder / "set", options.pop("tokenizer", BYTE), 0.2, **options)
    return files_of(folder)


class Told(list):
    """Notices of the calls."""

    def again(self, inputs, folder, **options):
        summary = tokenize(
            [inputs], folder / "set", options.pop("tokenizer", BYTE),
            options.pop("held_out", 0.2), notice=self.append, **options,
        )  # fmt: skip
        return summary, files_of(folder)


def killed(at, *arguments, **options):
    """Call ``tokenize`` in another process that SIGKILLs itself at a report of progress."""
    calls = []

    def progress(done):
        calls.append(done)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        tokenize(*arguments, progress=progress, **options)

    died(work)


def died(work):
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("lengths", [[], [5], [3, 1, 4, 1, 5, 9, 2, 6]])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_an_index_is_what_megatrons_builder_writes(tmp_path, monkeypatch, lengths, dtype):
    monkeypatch.setattr("megatron_idea.data.indexed._BLOCK", 3)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype)
    for length in lengths:
        builder.add_document(np.zeros(length, dtype), [length])
    builder.finalize(str(tmp_path / "theirs.idx"))
    np.array(lengths, np.int32).tofile(tmp_path / "lengths")
    write_index(tmp_path / "ours.idx", np.dtype(dtype), tmp_path / "lengths")
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_files_do_not_depend_on_the_number_of_workers_or_on_the_shards(
    inputs, tmp_path, monkeypatch
):
    bpe = train_tokenizer([inputs], 270, tmp_path / "tokenizer.json")
    several = whole(inputs, tmp_path / "several", tokenizer=bpe, workers=3)
    assert whole(inputs, tmp_path / "one", tokenizer=bpe) == several
    monkeypatch.setattr("megatron_idea.data.shards.SHARD_CHARACTERS", 10**9)
    assert whole(inputs, tmp_path / "whole", tokenizer=bpe) == several
    assert len(several) == 6


@pytest.mark.parametrize(("workers", "at"), [(1, 1), (1, 2), (1, 7), (2, 5)])
def test_a_killed_call_goes_on_where_it_was(inputs, tmp_path, workers, at):
    out = tmp_path / "out"
    killed(at, [inputs], out / "set", BYTE, 0.2, workers=workers)
    assert [path.name for path in out.iterdir()] == [".set.tokenizing"]
    told = Told()
    summary, written = told.again(inputs, out)
    assert written == whole(inputs, tmp_path / "whole")
    if at == 1:
        assert not told and summary.earlier_bytes == 0
    else:
        assert "going on after" in told[0] and 0 < summary.earlier_bytes < summary.text_bytes


@pytest.mark.parametrize("moved", range(6))
def test_a_call_killed_while_files_take_their_names_goes_on(inputs, tmp_path, monkeypatch, moved):
    out = tmp_path / "out"
    whole(inputs, out)  # an earlier dataset, to be replaced
    (inputs / "2.json").unlink()
    expected = whole(inputs, tmp_path / "less")

    def work():
        replace, calls = os.replace, []

        def counted(*paths):
            if len(calls) == 1 + moved:  # the first is the record of inputs and options
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(paths)
            replace(*paths)

        monkeypatch.setattr(os, "replace", counted)
        tokenize([inputs], out / "set", BYTE, 0.2)

    died(work)
    summary, written = Told().again(inputs, out)
    assert written == expected
    assert summary.documents == 40 and summary.earlier_bytes == summary.text_bytes


@pytest.mark.parametrize("damage", ["torn", "flipped", "shortened", "no record"])
def test_what_a_crash_damaged_is_made_again(inputs, tmp_path, damage):
    out = tmp_path / "out"
    killed(6, [inputs], out / "set", BYTE, 0.2)
    folder = out / ".set.tokenizing"
    ids, record = folder / "train.bin", folder / "finished.jsonl"
    raw, lines = ids.read_bytes(), record.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    if damage == "torn":
        ids.write_bytes(raw + b"\0\1\2")
        record.write_bytes(b"".join(lines) + lines[0][:-1])
    elif damage == "flipped":
        ids.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif damage == "shortened":
        ids.write_bytes(raw[: len(raw) // 2])
    else:
        (folder / "made_of.json").write_text("[")
    told = Told()
    summary, written = told.again(inputs, out)
    assert written == whole(inputs, tmp_path / "whole")
    if damage == "no record":
        assert "starting anew: what lies in" in told[0] and not summary.earlier_bytes
    else:
        assert "going on after" in told[0] and summary.earlier_bytes


def test_what_a_call_killed_at_its_very_end_leaves_is_not_taken_for_its_work(inputs, tmp_path):
    """It had moved all files and removed its records but for the last, or the last two."""
    for left in (["complete"], ["complete", "finished.jsonl"]):
        folder = tmp_path / "out" / ".set.tokenizing"
        folder.mkdir(parents=True)
        for name in left:
            (folder / name).touch()
        assert Told().again(inputs, tmp_path / "out")[1] == whole(inputs, tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


def test_another_tokenizer_or_option_starts_anew_and_says_why(inputs, tmp_path):
    bpe = train_tokenizer([inputs], 270, tmp_path / "tokenizer.json")
    for options, why in [
        ({"tokenizer": bpe}, "the tokenizer is another one"),
        ({"held_out": 0.3}, "--held-out was 0.2"),
        ({"text_key": "body"}, "--text-key was text"),
    ]:
        killed(4, [inputs], tmp_path / "out" / "set", BYTE, 0.2)
        told = Told()
        with contextlib.suppress(BadDocumentError):
            told.again(inputs, tmp_path / "out", **options)
        assert told == [f"starting anew: {why}"]
        shutil.rmtree(tmp_path / "out")


def test_a_changed_input_is_read_anew_and_what_came_before_it_is_kept(inputs, tmp_path):
    out, second = tmp_path / "out", inputs / "1.json"
    killed(8, [inputs], out / "set", BYTE, 0.2)
    second.write_text(second.read_text().replace("document 30", "other 30"))
    told = Told()
    summary, written = told.again(inputs, out)
    assert written == whole(inputs, tmp_path / "whole")
    assert summary.earlier_bytes and f"{second} has changed: read anew from there" in told[0]
    killed(8, [inputs], out / "set", BYTE, 0.2)
    shutil.copy(second, inputs / "0.jsonl")  # comes second
    (inputs / "2.json").unlink()
    told = Told()
    _, written = told.again(inputs, out)
    assert written == whole(inputs, tmp_path / "others")
    assert f"{inputs / '0.jsonl'} is new or in another place" in told[0]
    killed(8, [inputs], out / "set", BYTE, 0.2)
    second.unlink()
    told = Told()
    _, written = told.again(inputs, out)
    assert written == whole(inputs, tmp_path / "fewer")
    assert "there were more inputs" in told[0]


def test_skipping_bad_documents_may_be_decided_later(inputs, tmp_path):
    bad = inputs / "1.json"
    with bad.open("a") as stream:
        stream.write("not JSON\n")
    out, told = tmp_path / "out", Told()
    with pytest.raises(BadDocumentError, match=r"1\.json:21 is not a line of JSON"):
        told.again(inputs, out)
    summary, written = told.again(inputs, out, skip_bad_documents=True)
    assert written == whole(inputs, tmp_path / "whole", skip_bad_documents=True)
    assert "going on after" in told[0] and summary.skipped_documents == 1
    killed(10, [inputs], out / "set", BYTE, 0.2, skip_bad_documents=True)
    with pytest.raises(BadDocumentError, match=r"1\.json:21 is not a line of JSON"):
        told.again(inputs, out)


def test_documents_left_out_are_counted_once(inputs, tmp_path):
    (inputs / "3.json").write_text('{"text": ""}\nnot JSON\n')
    reports = []
    options = {"skip_bad_documents": True}
    tokenize([inputs], tmp_path / "whole" / "set", BYTE, 0.2, progress=reports.append, **options)
    killed(len(reports), [inputs], tmp_path / "out" / "set", BYTE, 0.2, **options)
    summary, _ = Told().again(inputs, tmp_path / "out", **options)
    assert (summary.documents, summary.skipped_documents) == (60, 2)
    assert summary.earlier_bytes == summary.text_bytes


def test_a_worker_that_dies_ends_the_call_with_a_sentence(inputs, tmp_path):
    others = {p.pid for p in multiprocessing.active_children()}  # of other tests

    def kill(done):
        if done:
            (pid, *_) = (p.pid for p in multiprocessing.active_children() if p.pid not in others)
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(WorkerError, match=r"was ended by SIGKILL.* the same call goes on"):
        tokenize([inputs], tmp_path / "out" / "set", BYTE, 0.2, workers=2, progress=kill)
    assert {p.pid for p in multiprocessing.active_children()} == others
    told = Told()
    _, written = told.again(inputs, tmp_path / "out", workers=2)
    assert written == whole(inputs, tmp_path / "whole")
    assert "going on after" in told[0]


def test_workers_end_when_the_call_is_killed(inputs, tmp_path):
    pids = tmp_path / "pids"

    def progress(done):
        if done:
            pids.write_text(" ".join(str(p.pid) for p in multiprocessing.active_children()))
            os.kill(os.getpid(), signal.SIGKILL)

    died(lambda: tokenize([inputs], tmp_path / "out" / "set", BYTE, workers=2, progress=progress))
    workers = [int(pid) for pid in pids.read_text().split()]
    assert len(workers) == 2
    left = [psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(left, timeout=30)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def test_an_error_in_a_worker_is_that_of_one_process(inputs, tmp_path):
    path = tmp_path / "tokenizer.json"
    bpe = train_tokenizer([inputs], 270, path)
    path.write_text(path.read_text() + "\n")
    with pytest.raises(WorkerError, match="ended with 1"):  # the reason is on its standard error
        tokenize([inputs], tmp_path / "out" / "set", bpe, 0.2, workers=2)
    with pytest.raises(DataError, match="workers is 0"):
        tokenize([inputs], tmp_path / "out" / "set", BYTE, 0.2, workers=0)


def test_two_calls_do_not_write_to_one_prefix(inputs, tmp_path):
    def second(_done):
        with pytest.raises(lock.RunFolderError, match=r"working folder .*\.set\.tokenizing is in"):
            tokenize([inputs], tmp_path / "out" / "set", BYTE, 0.2)

    tokenize([inputs], tmp_path / "out" / "set", BYTE, 0.2, progress=second)
    assert len(list(Path(tmp_path / "out").iterdir())) == 6
