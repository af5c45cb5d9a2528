"""A checkpoint on its way to the disk: complete or absent."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing.strategies.state_dict_saver  # cpu.install must see it
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_idea import config as configuration
from megatron_idea.checkpoint import storage
from megatron_idea.checkpoint.folder import checkpoints_of, complete, latest
from megatron_idea.checkpoint.state import FORMAT, CheckpointError, TrainState, read_state
from megatron_idea.checkpoint.tensors import layout_of, reason, tensors_of, weight_tensors
from megatron_idea.config import Config
from megatron_idea.engine import cpu
from megatron_idea.engine.core_versions import async_save
from megatron_idea.engine.distributed import ProcessGroups, together
from megatron_idea.engine.optimizer import adam_step, has_moments
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.pruner import Pruner
from megatron_idea.schedule import phase_ends


def save(config: Config, trainable: Trainable, pruner: Pruner, state: TrainState) -> Path:
    """Write a checkpoint of this step; collective over all ranks.

    Returns: its folder. Older ones that nobody asked to keep are removed afterwards.
    Raises: CheckpointError on every rank when it cannot be written; earlier ones stand untouched.
    """
    return Saving(config, trainable, pruner, state).finish()


class Folder:
    """A folder of tensors and texts on its way to the disk, under a temporary name until complete.

    What it holds is a copy: the tensors may change meanwhile.
    """

    def __init__(self, path: Path, tree: Callable[[], dict[str, Any]], groups: ProcessGroups):
        """Copy everything and begin to write; collective over all ranks.

        Args:
            tree: makes the sharded tensors.
        Raises: any error of any rank, on every rank.
        """
        self.path, self.groups = path, groups
        self.partial = path.with_name(f"{path.name}.partial")
        together(self._begin, groups)
        self._strategy, self._request = _begin_tensors(tree(), self.partial, groups)
        self.writing = storage.Writing(self._request)

    def finish(self, texts: Mapping[str, str]) -> str:
        """Wait for all ranks' parts and make the folder complete; collective over all ranks.

        Args:
            texts: other files by their names.
        Returns: SHA-256 of the manifest, which lists all files, on every rank.
        """
        self.writing.join()
        _finish_tensors(self._strategy, self._request, self.partial, self.groups)
        written: list[dict[str, Any]] = [{}] * self.groups.world.size()
        dist.all_gather_object(written, self.writing.files)
        digest = [together(lambda: self._complete(written, texts), self.groups)]
        dist.broadcast_object_list(digest, src=0)
        return digest[0]

    def _begin(self) -> None:
        if self.groups.is_writer:
            begin_folder(self.partial, self.path)

    def _complete(self, written: list[dict[str, Any]], texts: Mapping[str, str]) -> str:
        if not self.groups.is_writer:
            return ""
        known = {name: entry for of_rank in written for name, entry in of_rank.items()}
        return complete_folder(self.partial, self.path, texts, known)


def begin_folder(partial: Path, path: Path) -> None:
    """Make the folder that will become ``path``; what a job left that was killed goes first."""
    for rest in (partial, _replaced(path)):
        shutil.rmtree(rest, ignore_errors=True)
    partial.mkdir(parents=True)


def complete_folder(
    partial: Path, path: Path, texts: Mapping[str, str], known: Mapping[str, dict[str, Any]]
) -> str:
    """Write texts and manifest and give the folder its name; all of it survives a power cut.

    Args:
        known: size and checksum of files that are there; those of the others are taken now.
    Returns: SHA-256 of the manifest.
    """
    for name, text in texts.items():
        _write(partial / name, text)
    files = dict(known)
    small = sorted(p for p in partial.iterdir() if p.name not in files)
    files |= {file.name: storage.describe(file) for file in small}
    manifest = json.dumps({"files": files}, indent=1)
    _write(partial / storage.MANIFEST, manifest)
    _sync_folder(partial)
    if path.exists():  # the one before this step's compaction
        path.rename(_replaced(path))
    partial.rename(path)
    _sync_folder(path.parent)
    shutil.rmtree(_replaced(path), ignore_errors=True)
    return hashlib.sha256(manifest.encode()).hexdigest()


def _replaced(path: Path) -> Path:
    return path.with_name(f"{path.name}.replaced")


def state_text(state: TrainState) -> str:
    """Return what ``state.json`` says."""
    header = {"format": FORMAT, "megatron_core": megatron.core.__version__}
    return json.dumps(header | dataclasses.asdict(state), indent=1)


class Saving:
    """A checkpoint on its way to the disk. What it holds is a copy: training may go on."""

    def __init__(
        self, config: Config, trainable: Trainable, pruner: Pruner, state: TrainState
    ) -> None:
        """Copy everything and begin to write; collective over all ranks.

        ``config`` is what the checkpoint's ``config.yaml`` will say.

        Raises: CheckpointError on every rank when it cannot be written.
        """
        groups = trainable.groups
        _gather_weights(trainable.chunks)
        of_pruner = pruner.state(trainable)
        step = adam_step(trainable.optimizer, groups)
        self.config, self.groups = config, groups
        self.state = dataclasses.replace(
            state,
            shape=trainable.shape,
            adam_step=step,
            was_reset=step == 0 and has_moments(trainable.optimizer, groups),
            pending_steps=pruner.pending_steps,
            memory=pruner.memory.tolist(),
            plan_due=pruner.due is not None,
            has_scores=True,
            layout=layout_of(groups),
        )
        self.path = checkpoints_of(self.config.run_dir) / f"step_{state.step:08d}"
        with self._explained():
            self._folder = Folder(
                self.path,
                lambda: tensors_of(trainable, of_pruner, self.state.has_moments),
                groups,
            )

    @property
    def done(self) -> bool:
        """Whether this rank has written its part; ``finish`` will not wait for it."""
        return self._folder.writing.done

    @property
    def seconds(self) -> float:
        """What the writing took on this rank, once it is done."""
        return self._folder.writing.seconds

    def finish(self) -> Path:
        """Wait for all ranks' parts and make the checkpoint complete; collective over all ranks.

        Returns: its folder. Older ones that nobody asked to keep are removed afterwards.
        Raises: CheckpointError on every rank when it cannot be written; earlier ones stand.
        """
        with self._explained():
            self._folder.finish(
                {
                    "config.yaml": configuration.to_yaml(self.config),
                    "state.json": state_text(self.state),
                }
            )
        if self.groups.is_writer:
            keep = self.config.checkpoint
            # Newer ones are damaged: this run was begun again before them. They must not count.
            found = [path for path in complete(self.config.run_dir) if path <= self.path]
            known = [(path, _tokens(path)) for path in found]
            marks = list(phase_ends(self.config.schedule).values()) if keep.keep_phase_ends else []
            storage.remove(
                storage.superfluous(known, keep.keep_last, keep.keep_every_tokens, marks)
            )
        return self.path

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn any failure into one that says what stands; leave nothing half written."""
        try:
            yield
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            if self.groups.is_writer:
                shutil.rmtree(self.path.with_name(f"{self.path.name}.partial"), ignore_errors=True)
            kept = latest(self.config.run_dir)
            stands = f"the last complete one is {kept}" if kept else "there is no earlier one"
            free = f"{shutil.disk_usage(self.config.run_dir).free / 1e9:.2f} GB free there"
            raise CheckpointError(
                f"cannot write checkpoint {self.path}: {reason(error)} ({free}); {stands}"
            ) from error


def save_weights(chunks: Sequence[Any], path: Path, groups: ProcessGroups) -> str:
    """Write the weights of a model alone, which ``load_weights`` reads in any layout.

    Collective over all ranks, and complete when it returns.

    Returns: SHA-256 of the folder's manifest.
    Raises: CheckpointError on every rank when it cannot be written.
    """
    _gather_weights(chunks)
    try:
        return Folder(path, lambda: weight_tensors(chunks, groups), groups).finish({})
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"cannot write weights to {path}: {reason(error)}") from error


def _gather_weights(chunks: Sequence[Any]) -> None:
    """Bring weights of this step to every rank: until a forward asks, only owners have them."""
    for chunk in chunks:
        ddp_config = getattr(chunk, "ddp_config", None)
        if ddp_config is not None and ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _tokens(path: Path) -> int:
    """Consumed tokens of a checkpoint; 0 for one that cannot be read."""
    try:
        return read_state(path).consumed_tokens
    except CheckpointError:
        return 0


def _begin_tensors(
    tree: dict[str, Any], path: Path, groups: ProcessGroups
) -> tuple[_SaveTensors, AsyncRequest]:
    """What has to be written by this rank, in memory that is its own."""
    # megatron-core collects what was written through one queue of a spawned manager process,
    # seconds to start. Between threads a plain queue will do, and one for each checkpoint: what a
    # save that nobody finished left in it would become the index of the next one.
    filesystem_async._results_queue = queue.Queue()
    cpu.install()
    # dist_checkpointing.save in its parts: what rank 0 writes alone must fail on every rank.
    sharded, common = save_preprocess(tree)
    together(lambda: _save_common(common, path) if groups.is_writer else None, groups)
    live = [part for name, part in sharded.items() if name.startswith("model")]
    for tensor in nested_values(live):  # all else was gathered for this checkpoint
        if isinstance(tensor, ShardedTensor) and is_main_replica(tensor.replica_id):
            tensor.data = tensor.data.detach().to("cpu", copy=True)
    strategy = _SaveTensors("torch_dist", 1, thread_count=1)
    return strategy, async_save(strategy, sharded, path)


def _save_common(common: dict[str, Any], path: Path) -> None:
    """What is not a tensor: nothing of ours, but no version of megatron-core reads without it."""
    torch.save(common, path / COMMON_STATE_FNAME)


def _finish_tensors(
    strategy: _SaveTensors, request: AsyncRequest, path: Path, groups: ProcessGroups
) -> None:
    """Exchange what all ranks have written and write the index; collective over all ranks."""
    for finalize in request.finalize_fns:
        finalize()

    def close() -> None:
        if strategy.error is not None:
            raise strategy.error
        if groups.is_writer:
            save_config(CheckpointingConfig(strategy.backend, strategy.version), str(path))

    together(close, groups)


class _SaveTensors(TorchDistSaveShardedStrategy):
    """megatron-core's own, but for an error when rank 0 writes the index of all tensors.

    Raised at once it would leave the other ranks waiting for rank 0's next message.
    """

    error: Exception | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, *others: Any) -> Any:
        finish = writer.finish

        def finish_or_keep_error(*arguments: Any) -> None:
            try:
                finish(*arguments)
            except Exception as error:  # raised in ``_finish_tensors``, on every rank
                self.error = error

        writer.finish = finish_or_keep_error
        return super()._get_save_and_finalize_callbacks(writer, *others)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make a rename inside ``path`` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
