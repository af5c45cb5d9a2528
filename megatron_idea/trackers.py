"""Where a run's numbers are mirrored to for people who watch: TensorBoard, Weights & Biases.

JSONL in the run folder is the truth; a tracker is imported only when it is asked for.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from megatron_idea.config import Config, ConfigError


class Tracker(Protocol):
    """Takes scalars by name."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of one optimizer step."""
        ...

    def close(self) -> None:
        """Let everything arrive."""
        ...


def require_trackers(config: Config) -> None:
    """Raises: ConfigError when a tracker is asked for that is not installed."""
    if config.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "logging.tensorboard is true but tensorboard is not installed: "
            "pip install tensorboard, or set logging.tensorboard=false"
        )
    if config.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"logging.wandb is {config.logging.wandb!r} but wandb is not installed: "
            'pip install wandb, or set logging.wandb=""'
        )


def open_trackers(run_dir: Path, config: Config, step: int, started_at: float) -> list[Tracker]:
    """The trackers that ``config.logging`` asks for, of a run that has ``step`` steps behind it.

    ``started_at``: seconds since 1970; the same for a run however often it is resumed.
    """
    trackers: list[Tracker] = []
    if config.logging.tensorboard:
        trackers.append(_TensorBoard(run_dir, step))
    if config.logging.wandb:
        trackers.append(_WeightsAndBiases(run_dir, config, started_at))
    return trackers


class _TensorBoard:
    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import; not all want it

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, run_dir: Path, config: Config, started_at: float) -> None:
        import wandb  # heavy, and it starts a process

        try:
            self._run = wandb.init(
                project=config.logging.wandb,
                name=run_dir.name,
                dir=str(run_dir),
                config=dataclasses.asdict(config),
                # A resumed run goes on in its own curve.
                id=f"{run_dir.name}-{round(started_at * 1000):x}",
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases does not start: {error}; run wandb login, "
                "or set WANDB_MODE=offline in the environment"
            ) from error
        # Not wandb's own step, which must not go back: after a kill some steps are run again.
        self._run.define_metric("*", step_metric="tokens")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()
