"""Batches: position is a sample count, on every layout, over blends and epochs."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_idea.config import BlendEntry
from megatron_idea.data.batches import Batches
from megatron_idea.data.documents import DataError
from megatron_idea.data.tokenizer import load_tokenizer
from megatron_idea.data.tokenizing import tokenize

BYTE = load_tokenizer("byte")
SEQ = 16


def write(prefix, letter, documents=40):
    """A dataset whose text is ``letter`` and a number; returns its training prefix."""
    texts = [f"{letter}{i:03} " * (i % 5 + 1) for i in range(documents)]
    source = prefix.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(tokenize([source], prefix, BYTE, held_out=0).train_prefix)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {letter: write(folder / letter, letter) for letter in "ab"}


@pytest.fixture
def batches(data, tmp_path):
    def build(entries="a", **options):
        if isinstance(entries, str):
            entries = [BlendEntry(data[letter]) for letter in entries]
        defaults = dict(
            split="train", model_vocab_size=320, seq_length=SEQ, micro_batch_size=2,
            global_batch_size=8, num_samples=24, seed=7, cache_dir=tmp_path / "cache",
        )  # fmt: skip
        return Batches(entries, BYTE, **{**defaults, **options})

    return build


def read(built, consumed):
    """One step as one batch: {key: [rows, seq]}."""
    micro = list(built.step(consumed))
    return {key: torch.cat([m[key] for m in micro]) for key in micro[0]}


def same(left, right):
    return all(torch.equal(left[key], right[key]) for key in left | right)


def test_micro_batches_have_the_shapes_and_types_a_gpt_takes(batches):
    built = batches()
    micro = list(built.step(0))
    assert len(micro) == built.num_microbatches == 4
    for batch in micro:
        assert {key: value.dtype for key, value in batch.items()} == {
            "tokens": torch.int64, "labels": torch.int64, "position_ids": torch.int64,
            "loss_mask": torch.float32,
        }  # fmt: skip
        assert all(value.shape == (2, SEQ) for value in batch.values())
        assert torch.equal(batch["labels"][:, :-1], batch["tokens"][:, 1:])
        assert torch.equal(batch["position_ids"], torch.arange(SEQ).expand(2, SEQ))
        assert batch["loss_mask"].eq(1).all()


def test_a_step_depends_on_the_sample_count_alone(batches):
    first = batches()
    later = read(first, 8)
    for consumed in (16, 0, 8):
        last = read(first, consumed)
    assert same(last, later)
    assert same(read(batches(), 8), later)  # another process that starts there
    assert not same(read(first, 0), later)


def test_the_slices_of_all_ranks_make_the_same_global_batch(batches):
    whole = read(batches(), 8)
    for dp_size, micro_batch_size in [(2, 2), (4, 2), (2, 1), (8, 1)]:
        ranks = [
            batches(dp_size=dp_size, dp_rank=rank, micro_batch_size=micro_batch_size)
            for rank in range(dp_size)
        ]
        steps = zip(*(rank.step(8) for rank in ranks), strict=True)
        joined = [micro for step in steps for micro in step]  # micro-batch i of ranks 0, 1, ...
        assert same({key: torch.cat([m[key] for m in joined]) for key in whole}, whole)


def test_another_global_batch_size_reads_the_same_samples(batches):
    small, large = batches(global_batch_size=4), batches(global_batch_size=12)
    joined = [read(small, consumed) for consumed in (0, 4, 8)]
    assert same({key: torch.cat([j[key] for j in joined]) for key in joined[0]}, read(large, 0))


def test_an_epoch_reads_every_sequence_once_and_further_epochs_repeat_them(batches):
    tokens = batches().datasets[0].tokens
    epoch = (tokens - 1) // SEQ
    one = batches(num_samples=epoch, micro_batch_size=1, global_batch_size=epoch)
    rows = read(one, 0)
    assert rows["tokens"].unique(dim=0).shape[0] == epoch
    three = batches(num_samples=3 * epoch, micro_batch_size=1, global_batch_size=3 * epoch)
    counts = torch.bincount(read(three, 0)["tokens"].flatten(), minlength=257)
    once = torch.bincount(rows["tokens"].flatten(), minlength=257)
    assert (counts - 3 * once).abs().sum() < 3 * SEQ + 2 * SEQ  # but for cut ends


def test_the_seed_orders_training_data_but_not_held_out_data(batches):
    assert not same(read(batches(seed=1), 0), read(batches(seed=2), 0))
    held = [batches(split="validation", seed=seed) for seed in (1, 2)]
    assert same(read(held[0], 0), read(held[1], 0))


def test_held_out_samples_are_the_first_ones_whatever_their_number(batches):
    few = batches(split="validation", num_samples=8)
    assert same(read(few, 0), read(batches(split="validation", num_samples=16), 0))


def test_held_out_data_is_never_repeated(batches, caplog):
    built = batches(split="validation", num_samples=10_000)
    assert built.num_samples == (built.datasets[0].tokens - 1) // SEQ
    assert f"has {built.num_samples} sequences of {SEQ} tokens, not the 10000" in caplog.text
    rows = [read(built, consumed) for consumed in range(0, built.num_samples, 8)]
    real = torch.cat([r["tokens"][r["loss_mask"][:, 0] > 0] for r in rows])
    assert real.shape[0] == real.unique(dim=0).shape[0] == built.num_samples


def test_rows_past_the_last_sample_are_padding_that_no_loss_counts(batches):
    built = batches(num_samples=13)
    rows = read(built, 8)
    assert rows["loss_mask"].sum(dim=1).tolist() == [SEQ] * 5 + [0] * 3
    assert rows["tokens"].lt(257).all()
    for consumed in (13, 16, -8):
        with pytest.raises(DataError, match=f"no step starts at sample {consumed}: there are 13"):
            built.step(consumed)


def test_micro_batches_that_are_padding_on_every_rank_can_be_left_out(batches):
    whole = {"split": "validation", "num_samples": 13, "global_batch_size": 48}
    assert [batches(**whole).filled(begin) for begin in (0, 4, 12)] == [7, 5, 1]
    assert batches(**whole).filled(0, multiple=4) == 8
    ranks = [batches(**whole, dp_size=2, dp_rank=rank) for rank in range(2)]
    assert [rank.filled(0) for rank in ranks] == [4, 4]
    rest = [micro for rank in ranks for micro in list(rank.step(0))[4:]]
    assert len(rest) == 2 * (12 - 4) and not any(micro["loss_mask"].any() for micro in rest)


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.9, 0.1)])
def test_a_blend_honours_its_weights_from_the_start(batches, data, weights):
    entries = [BlendEntry(data[x], w) for x, w in zip("ab", weights, strict=True)]
    built = batches(entries, num_samples=400, micro_batch_size=1, global_batch_size=1)
    from_a = [(read(built, i)["tokens"] == ord("a")).any().item() for i in range(400)]
    for length in (40, 400):
        assert sum(from_a[:length]) == pytest.approx(length * weights[0] / sum(weights), abs=1)


def test_one_dataset_is_sampled_as_megatron_samples_it(batches, data, tmp_path):
    config = GPTDatasetConfig(
        random_seed=7, sequence_length=SEQ, blend_per_split=[([data["a"]], None), None, None],
        path_to_cache=str(tmp_path / "theirs"),
        tokenizer=SimpleNamespace(vocab_size=257, eod=256, unique_identifiers={}),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False,
    )  # fmt: skip
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [64, 0, 0], lambda: True, config)
    theirs = builder.build()[0]
    rows = read(batches(num_samples=64, micro_batch_size=8, global_batch_size=64), 0)
    assert same({key: torch.stack([theirs[i][key] for i in range(64)]) for key in rows}, rows)


def test_a_dataset_written_anew_is_not_read_by_its_old_index(batches, tmp_path):
    entries = [BlendEntry(write(tmp_path / "c", "c", documents=40))]
    before = read(batches(entries), 0)
    write(tmp_path / "c", "c", documents=15)
    anew = read(batches(entries), 0)
    shutil.rmtree(tmp_path / "cache")
    assert same(read(batches(entries), 0), anew)
    assert not same(before, anew)


def test_what_cannot_be_trained_on_is_refused(batches, data, tmp_path):
    with pytest.raises(DataError, match=r"num_samples is 0; it must be at least 1"):
        batches(num_samples=0)
    with pytest.raises(DataError, match=r"vocabulary mismatch: .*'byte' has 257 ids, .* is 256"):
        batches(model_vocab_size=256)
    with pytest.raises(DataError, match=r"data\.train names no dataset"):
        batches([])
    with pytest.raises(DataError, match=r"tokens; one sequence takes seq_length \+ 1 = 100001"):
        batches(seq_length=100_000)
    with pytest.raises(DataError, match=r"no .*gone\.idx"):
        batches([BlendEntry(str(tmp_path / "gone"))])
    with pytest.raises(DataError, match=r"\(8\) must be a multiple of .* 2 x 3 = 6"):
        batches(dp_size=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot use sample indices .* in data\.cache_dir"):
        batches(cache_dir=tmp_path / "file" / "cache")


def test_a_broken_index_cache_is_an_error_that_says_to_delete_it(batches, tmp_path):
    batches()
    for path in (tmp_path / "cache").glob("*shuffle_index.npy"):
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"cannot use sample indices .* delete it"):
        batches()


def test_two_processes_read_what_one_reads(batches, data, workers, tmp_path):
    entries = [BlendEntry(data["a"], 3), BlendEntry(data["b"], 1)]
    whole = read(batches(entries, num_samples=64), 8)
    ranks = workers.run(_rank, 2, entries, tmp_path)
    joined = [micro for step in zip(*ranks, strict=True) for micro in step]
    assert same({key: torch.cat([m[key] for m in joined]) for key in whole}, whole)


def _rank(rendezvous, entries, folder):
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    built = Batches(
        entries, BYTE, split="train", model_vocab_size=320, seq_length=SEQ, micro_batch_size=2,
        global_batch_size=8, num_samples=64, seed=7, cache_dir=folder / "shared_cache",
        dp_rank=rank, dp_size=2,
    )  # fmt: skip
    batches = list(built.step(8))
    with pytest.raises(DataError) as error:  # only rank 1 lacks the data, both must hear of it
        Batches(
            entries if rank == 0 else [BlendEntry("gone")], BYTE, split="train",
            model_vocab_size=320, seq_length=SEQ, micro_batch_size=2, global_batch_size=8,
            num_samples=64, seed=7, cache_dir=folder / "shared_cache", dp_rank=rank, dp_size=2,
        )  # fmt: skip
    told = "rank 1 cannot open the data: " if rank == 0 else ""
    assert str(error.value).startswith(f"{told}no gone.idx")
    torch.distributed.destroy_process_group()
    return batches
