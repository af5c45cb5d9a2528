"""Read single tensors of a checkpoint, whole, without a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_idea.checkpoint.state import CheckpointError
from megatron_idea.checkpoint.tensors import reason


class CheckpointTensors:
    """The tensors of a checkpoint by name, whole, in this process, without a model.

    Raises: CheckpointError when a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            metadata = torch_checkpoint.FileSystemReader(str(path)).read_metadata()
        except Exception as error:  # of the pickle in it: any type
            raise CheckpointError(f"cannot read checkpoint {path}: {reason(error)}") from error
        self._entries = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if hasattr(entry, "size")
        }

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        missing = [name for name in names if name not in self]
        if missing:
            raise CheckpointError(f"checkpoint {self._path} has no tensor {missing[0]}")
        found = {
            name: torch.empty(self._entries[name].size, dtype=self._entries[name].properties.dtype)
            for name in names
        }
        try:
            reader = torch_checkpoint.FileSystemReader(str(self._path))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one process is what we want
                torch_checkpoint.load(found, storage_reader=reader, no_dist=True)
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            raise CheckpointError(
                f"cannot read checkpoint {self._path}: {reason(error)}"
            ) from error
        return found
