"""Micro-batches whose position is a sample count, drawn from Megatron's own GPT datasets.

megatron-core packs documents into sequences, shuffles them and blends datasets by weight. What is
added here is the absence of state: ``step(consumed_samples)`` is a pure function. A resumed run,
and a run on another number of ranks, reads the same global batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from megatron.core.utils import log_single_rank
from torch import Tensor

from megatron_idea import files
from megatron_idea.config import BlendEntry
from megatron_idea.data.documents import DataError
from megatron_idea.data.indexed import DatasetInfo, check_dataset
from megatron_idea.data.tokenizer import Tokenizer
from megatron_idea.engine.distributed import on_device

Built = TypeVar("Built")

logger = logging.getLogger(__name__)

_VALIDATION_SEED = 0
"""Runs with different seeds are compared on the same held-out sequences."""


@dataclass(frozen=True)
class _MegatronTokenizer:
    """What GPTDataset asks of a tokenizer.

    There is no ``pad``: every sequence is full, and a pad id would mask real tokens of that id.
    ``unique_identifiers`` become part of the name under which Megatron caches its indices. That
    name has the dataset's path but not its content; the digests keep an index from outliving a
    dataset that was written anew under the same path.
    """

    vocab_size: int
    eod: int
    unique_identifiers: dict[str, str]


_KEYS = ("tokens", "labels", "position_ids", "loss_mask")
"""What a micro-batch has."""


class Rows:
    """Numbered rows of tokens, and which of them this data-parallel rank reads.

    With ``r`` the data-parallel rank, row ``j`` of micro-batch ``i`` of the step that starts at row
    ``begin`` is

        s = begin + (i * dp_size + r) * micro_batch_size + j

    so the ranks together read begin .. begin + global_batch_size, each of them once.

    Raises: DataError for a tokenizer larger than the model's vocabulary and batch sizes that do not
    divide.
    """

    num_samples: int
    """Rows there are; those past them are padding with a loss mask of 0."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        model_vocab_size: int,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if tokenizer.vocab_size > model_vocab_size:
            raise DataError(
                f"tokenizer/model vocabulary mismatch: tokenizer {tokenizer.name!r} has "
                f"{tokenizer.vocab_size} ids, model.vocab_size is {model_vocab_size}; take the "
                f"model's own tokenizer, or for a new model at least {tokenizer.vocab_size}"
            )
        if global_batch_size % (micro_batch_size * dp_size) != 0:
            raise DataError(
                f"global_batch_size ({global_batch_size}) must be a multiple of micro_batch_size x "
                f"DP = {micro_batch_size} x {dp_size} = {micro_batch_size * dp_size}"
            )
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        self._vocab_size = model_vocab_size
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.num_microbatches = global_batch_size // (micro_batch_size * dp_size)
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.device = torch.device(device)

    def length(self, begin: int) -> int:
        """Tokens in each row of the step that starts at row ``begin``, equal on every rank."""
        return self.seq_length

    def step(self, begin: int) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's micro-batches of the step that starts at row ``begin``."""
        raise NotImplementedError

    def filled(self, begin: int, multiple: int = 1) -> int:
        """Micro-batches of that step until all others are padding on every rank.

        A multiple of ``multiple``, of which ``num_microbatches`` must be one.
        """
        needed = -(-(self.num_samples - begin) // (self.micro_batch_size * self.dp_size))
        return min(self.num_microbatches, -(-needed // multiple) * multiple)

    def _of_micro_batch(self, begin: int, index: int) -> range:
        first = begin + (index * self.dp_size + self.dp_rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


class Batches(Rows):
    """Micro-batches of one data-parallel rank. Every rank of the job must construct it together.

    Sample ``s`` of the run is the same sequence on every layout.

    The order of training samples follows from datasets, weights, ``seq_length``, ``seed`` and
    ``num_samples`` (Megatron shuffles whole epochs of what will be read): derive ``num_samples``
    from the run's total tokens, never from its layout. Data is repeated when ``num_samples`` is
    more than an epoch. Past ``num_samples`` rows are padding with a loss mask of 0.

    ``validation`` takes the first ``num_samples`` of one epoch in an order that no seed changes,
    and fewer if the held-out data is short: ``num_samples`` tells.

    Samples are read in the training process: memory-mapped, one costs about 25 us (256 tokens,
    one CPU core), which does not pay for starting, feeding and ending worker processes.

    Raises: DataError for datasets that ``check_dataset`` rejects, a tokenizer larger than the
    model's vocabulary, too little data for one sequence, batch sizes that do not divide.
    """

    def __init__(
        self,
        entries: Sequence[BlendEntry],
        tokenizer: Tokenizer,
        *,
        split: Literal["train", "validation"],
        num_samples: int,
        seed: int,
        cache_dir: str | Path,
        seq_length: int,
        **layout: Any,
    ) -> None:
        """``layout``: the other arguments of ``Rows``."""
        super().__init__(tokenizer, seq_length=seq_length, **layout)
        if num_samples < 1:
            raise DataError(f"num_samples is {num_samples}; it must be at least 1")
        self._shares = _shares(entries, split)

        def open_datasets() -> tuple[list[DatasetInfo], int, GPTDataset | BlendedDataset]:
            infos = [check_dataset(entry.prefix, tokenizer) for entry in entries]
            epoch = _sequences_in_an_epoch(infos, self._shares, seq_length)
            usable = num_samples if split == "train" else min(num_samples, epoch)
            configs = [
                _gpt_config(info, tokenizer, split, seq_length, seed, Path(cache_dir))
                for info in infos
            ]
            return infos, usable, _blend(configs, self._shares, usable, split)

        self.datasets, self.num_samples, self._samples = _rank_zero_first(open_datasets)
        if self.num_samples < num_samples:
            log_single_rank(
                logger,
                logging.WARNING,
                f"held-out data has {self.num_samples} sequences of {seq_length} tokens, not the "
                f"{num_samples} asked for: all of them are used",
            )

    def step(self, consumed_samples: int) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's micro-batches of the step that starts at ``consumed_samples``.

        Yields: ``num_microbatches`` dicts of [micro_batch_size, seq_length] on the device:
        ``tokens``, ``labels`` (the next token), ``position_ids``, int64; ``loss_mask``, float32.
        In the last step of a run a whole micro-batch may be padding: its loss mask sums to 0.

        Raises: DataError when no samples are left.
        """
        if not 0 <= consumed_samples < self.num_samples:
            raise DataError(
                f"no step starts at sample {consumed_samples}: there are {self.num_samples}"
            )
        return (self._micro_batch(consumed_samples, i) for i in range(self.num_microbatches))

    def _micro_batch(self, consumed_samples: int, index: int) -> dict[str, Tensor]:
        samples = self._of_micro_batch(consumed_samples, index)
        try:
            rows = [self._sample(s) for s in samples]
            stacked = {key: torch.stack([row[key] for row in rows]) for key in _KEYS}
        except (IndexError, ValueError, RuntimeError) as error:  # of indices that fit no dataset
            raise DataError(
                f"samples {samples.start} to {samples.stop - 1} cannot be read ({error}): if "
                "data.cache_dir comes from somewhere else, delete it"
            ) from error
        for key in ("tokens", "labels"):  # read from a file, and looked up in the embedding
            low, high = (int(x) for x in stacked[key].aminmax())
            if low < 0 or high >= self._vocab_size:
                raise DataError(
                    f"samples {samples.start} to {samples.stop - 1} of "
                    f"{', '.join(str(info.prefix) for info in self.datasets)} hold token "
                    f"{low if low < 0 else high}; model.vocab_size is {self._vocab_size}: the "
                    "dataset is damaged, or of another tokenizer"
                )
        batch = {}
        for key, tensor in stacked.items():
            batch[key] = on_device(tensor, self.device)
        return batch

    def _sample(self, index: int) -> dict[str, Tensor]:
        if index < self.num_samples:
            return self._samples[index]
        padding = self._samples[self.num_samples - 1]
        return {**padding, "loss_mask": torch.zeros_like(padding["loss_mask"])}


def _shares(entries: Sequence[BlendEntry], split: str) -> list[float]:
    if not entries:
        raise DataError(f"data.{split} names no dataset; give at least one prefix and weight")
    total = sum(entry.weight for entry in entries)
    return [entry.weight / total for entry in entries]


def _sequences_in_an_epoch(
    datasets: Sequence[DatasetInfo], shares: Sequence[float], seq_length: int
) -> int:
    """Sequences that can be blended before a dataset repeats; raises if one has none."""
    sequences = []
    for info in datasets:
        sequences.append((info.tokens - 1) // seq_length)  # the last label is one token further
        if sequences[-1] == 0:
            raise DataError(
                f"{info.prefix} has {info.tokens} tokens; one sequence takes seq_length + 1 = "
                f"{seq_length + 1}: give more text or a shorter training.seq_length"
            )
    return max(1, int(min(n / share for n, share in zip(sequences, shares, strict=True))))


def _gpt_config(
    info: DatasetInfo, tokenizer: Tokenizer, split: str, seq_length: int, seed: int, cache_dir: Path
) -> GPTDatasetConfig:
    blends: list[Any] = [None] * len(Split)
    blends[_slot(split).value] = ([str(info.prefix)], None)
    identifiers = {"tokenizer": tokenizer.digest, "lengths": info.lengths_digest}
    return GPTDatasetConfig(
        random_seed=seed if split == "train" else _VALIDATION_SEED,
        sequence_length=seq_length,
        blend_per_split=blends,
        path_to_cache=str(cache_dir),
        tokenizer=_MegatronTokenizer(tokenizer.vocab_size, tokenizer.eod, identifiers),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def _slot(split: str) -> Split:
    return Split.train if split == "train" else Split.valid


def _blend(
    configs: Sequence[GPTDatasetConfig], shares: Sequence[float], num_samples: int, split: str
) -> GPTDataset | BlendedDataset:
    """Build Megatron's sample indices, or load them from the cache.

    As BlendedMegatronDatasetBuilder does, without its barriers: a rank that fails between two of
    those leaves the others waiting.
    """
    slot = _slot(split)
    parts = []
    _check_cache(Path(str(configs[0].path_to_cache)))
    for config, share in zip(configs, shares, strict=True):
        # A size makes Megatron shuffle as many epochs as it takes; None, exactly one. Its greedy
        # blending never takes more than the rounded-up share, so there is no surplus.
        size = math.ceil(num_samples * share) if split == "train" else None
        assert config.blend_per_split is not None
        prefix = config.blend_per_split[slot.value][0][0]
        indexed = GPTDataset.build_low_level_dataset(prefix, config)
        every_document = np.arange(len(indexed), dtype=np.int32)
        try:
            parts.append(GPTDataset(indexed, prefix, every_document, size, slot, config))
        except (OSError, EOFError, ValueError, IndexError, AttributeError, TypeError) as error:
            raise DataError(
                f"cannot use sample indices of {prefix} in data.cache_dir {config.path_to_cache}: "
                f"{error}; every rank must see this folder and rank 0 write to it; if a job died "
                "while writing, delete it"
            ) from error
    if len(parts) == 1:
        return parts[0]
    # BlendedDataset asks for its rank before it writes to the cache, even where there are no ranks.
    config = configs[0] if _distributed() else replace(configs[0], path_to_cache=None)
    return BlendedDataset(parts, list(shares), num_samples, config)


def _check_cache(folder: Path) -> None:
    """Make sure that indices are arrays: megatron-core has NumPy unpickle what is none.

    Raises: DataError.
    """
    for file in sorted(folder.glob("*.npy")):
        try:
            with files.regular(file).open("rb") as stream:
                head = stream.read(len(np.lib.format.MAGIC_PREFIX))
        except (OSError, files.UnsafeFileError) as error:
            raise DataError(f"data.cache_dir {folder}: {error}; delete it") from error
        if not np.lib.format.MAGIC_PREFIX.startswith(head):  # shorter while it is being written
            raise DataError(f"data.cache_dir {folder}: {file.name} is no array of NumPy; delete it")


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank_zero_first(build: Callable[[], Built]) -> Built:
    """Let rank 0 build and write, then the others build and read; raise on all when one fails."""
    if not _distributed():
        return build()
    result: Built | None = None
    error: Exception | None = None
    for my_turn in (dist.get_rank() == 0, dist.get_rank() != 0):
        if my_turn:
            try:
                result = build()
            except Exception as caught:  # raised below, once the others know
                error = caught
        messages: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if error is None else str(error))
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise DataError(f"rank {rank} cannot open the data: {message}")
    assert result is not None
    return result
