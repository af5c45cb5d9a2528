"""Which checkpoints lie in a run folder, without opening tensors: PyTorch is not needed."""

from __future__ import annotations

from pathlib import Path

from megatron_idea import files


def checkpoints_of(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def complete(run_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p.parent for p in checkpoints_of(run_dir).glob("step_[0-9]*[0-9]/state.json"))


def latest(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    found = complete(run_dir)
    return found[-1] if found else None


def kept_tokens(run_dir: str | Path) -> list[int]:
    """Read of each complete checkpoint of a run its consumed tokens, oldest first.

    Nothing is verified: whoever goes on from there does that. Of an unreadable one they are 0.
    """
    return [_consumed_tokens(path) for path in complete(run_dir)]


def saved_tokens(run_dir: str | Path) -> int:
    """Read how far the newest checkpoint of a run is, in consumed tokens; 0 without one."""
    path = latest(run_dir)
    return 0 if path is None else _consumed_tokens(path)


def _consumed_tokens(path: Path) -> int:
    try:
        tokens = files.read_json(path / "state.json").get("consumed_tokens")
    except files.UnsafeFileError:
        return 0
    return tokens if files.is_whole(tokens) else 0
