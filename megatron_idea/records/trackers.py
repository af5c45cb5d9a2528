"""Mirror a run's numbers to TensorBoard and Weights & Biases.

The records in the run folder do not depend on them: a tracker is imported only when it is asked
for, and one that fails is left out from then on.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from megatron_idea.config import Config, ConfigError

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes scalars by name."""

    name: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take over the values of one optimizer step."""
        ...

    def close(self) -> None:
        """Send what is still waiting, and end."""
        ...


def require_trackers(config: Config) -> None:
    """Check that the trackers asked for are installed. Raises: ConfigError."""
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
    """Open the trackers that ``config.logging`` asks for, to go on after ``step`` steps.

    ``started_at``: seconds since 1970; the same for a run however often it is resumed.
    """
    trackers: list[Tracker] = []
    if config.logging.tensorboard:
        try:
            trackers.append(_TensorBoard(run_dir, step))
        except OSError as error:
            _leave_out(_TensorBoard.name, error)
    if config.logging.wandb:
        trackers.append(_WeightsAndBiases(run_dir, config, started_at))
    return trackers


def still_works(tracker: Tracker, action: Callable[[Tracker], None]) -> bool:
    """Do ``action``; return whether it worked, and log a warning where it did not."""
    try:
        action(tracker)
    except Exception as error:  # of somebody else's client: any type
        _leave_out(tracker.name, error)
        return False
    return True


def _leave_out(name: str, error: Exception) -> None:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    logger.warning(f"{name} cannot write and is left out from here on: {reason}")


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import; not all want it

        # Its thread fails with a traceback of its own; the next call raises the same again.
        threading.excepthook = _silent_about_tensorboard
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _silent_about_tensorboard(failed: threading.ExceptHookArgs) -> None:
    if not type(failed.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failed)


class _WeightsAndBiases:
    name = "Weights & Biases"

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
