"""Save and load the whole state of a run, from any parallel layout to any other.

    <run>/checkpoints/step_00000042/
        state.json     step, consumed tokens, widths: read first, the model is built from it
        config.yaml    the configuration that wrote it
        manifest.json  size and checksum of every other file
        ...            tensors, by megatron-core's dist_checkpointing, one key per layer

A folder is written under a temporary name and renamed when it is complete, so it is complete or
absent.
"""

from megatron_idea.checkpoint.branch import branch, find_source
from megatron_idea.checkpoint.folder import (
    ONE_PROCESS,
    ORIGIN,
    TOKENIZER,
    check_same_run,
    checkpoints_of,
    choose,
    complete,
    complete_for_all,
    copy_origin,
    latest,
    read_config,
    resolve,
    tokenizer_beside,
)
from megatron_idea.checkpoint.saving import Saving, save, save_weights
from megatron_idea.checkpoint.state import CheckpointError, TrainState, read_state
from megatron_idea.checkpoint.tensors import load, load_weights

__all__ = [
    "ONE_PROCESS",
    "ORIGIN",
    "TOKENIZER",
    "CheckpointError",
    "Saving",
    "TrainState",
    "branch",
    "check_same_run",
    "checkpoints_of",
    "choose",
    "complete",
    "complete_for_all",
    "copy_origin",
    "find_source",
    "latest",
    "load",
    "load_weights",
    "read_config",
    "read_state",
    "resolve",
    "save",
    "save_weights",
    "tokenizer_beside",
]
