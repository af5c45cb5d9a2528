"""Predict whether a run should pay, against training small; and fit a law to runs that are over."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_idea.config import Config, ConfigError, LawConfig
from megatron_idea.course import TeacherSize, flops_between, target_shape, teacher_flops_between
from megatron_idea.law import average_parameters, in_range, predict
from megatron_idea.shape import Shape


@dataclass(frozen=True)
class Prediction:
    """What the law says of one training run."""

    average_parameters: float
    """Live ones, over the tokens."""
    tokens: int
    flops: int
    loss: float
    """Nats per token."""
    difference: float
    """Loss of the run that is planned minus this one: below 0 that run is better."""
    in_range: bool


@dataclass(frozen=True)
class Outlook:
    """What the law says of a run, and of training without pruning in its place."""

    law: LawConfig
    this_run: Prediction
    small_for_the_tokens: Prediction
    """The final shape from scratch, over as many tokens."""
    small_for_the_flops: Prediction
    """The final shape from scratch, over more tokens: as many FLOPs."""
    enlarged: Prediction
    """The enlarged model to the end, over as many tokens: what nothing was removed from."""
    without_teacher: bool
    """This run has a teacher whose size is not known: ``flops`` are without it."""

    @property
    def predictions(self) -> dict[str, Prediction]:
        """Name each run."""
        return {
            "this run": self.this_run,
            "small model, same tokens": self.small_for_the_tokens,
            "small model, same FLOPs": self.small_for_the_flops,
            "enlarged model, same tokens": self.enlarged,
        }


def outlook(config: Config, teacher: TeacherSize | None) -> Outlook | None:
    """Predict the loss of a run, and of three that prune nothing.

    Args:
        teacher: size of who teaches, whose FLOPs are this run's, too; None where it is not known.

    Returns: None where nothing is pruned.
    """
    if not config.goals:
        return None
    law, model, total = config.law, config.model, config.schedule.total_tokens
    average, small, full = average_parameters(config), target_shape(config), Shape.full(model)
    teaching = teacher_flops_between(config, 0, total, teacher)
    flops = flops_between(config, 0, total) + (teaching or 0)
    own = predict(law, average, total)

    def prediction(parameters: float, tokens: int, flops: int) -> Prediction:
        loss = predict(law, parameters, tokens)
        valid = in_range(law, parameters, tokens)
        return Prediction(parameters, tokens, flops, loss, own - loss, valid)

    def plain(shape: Shape, tokens: int) -> Prediction:
        flops = tokens * shape.flops_per_token(model, config.training.seq_length)
        return prediction(shape.parameters(model).total, tokens, flops)

    more = round(flops / small.flops_per_token(model, config.training.seq_length))
    return Outlook(
        law,
        prediction(average, total, flops),
        plain(small, total),
        plain(small, more),
        plain(full, total),
        without_teacher=teaching is None,
    )


@dataclass(frozen=True)
class Point:
    """A run that is over."""

    parameters: float
    """Mean of the live ones over the tokens."""
    tokens: float
    loss: float
    """Held out, in nats per token."""


def fit(points: Sequence[Point]) -> LawConfig:
    """Fit the law's five coefficients to runs.

    Minimizes the sum over runs of Huber_delta(log predicted - log measured loss), delta = 1e-3,
    from several starts; the same points always give the same law. Its range is that of the points.

    Raises: ConfigError where the exponents cannot be told apart: for fewer than five points, fewer
        than three sizes or three numbers of tokens, or with as many tokens per parameter in all.
    Source: Hoffmann et al. 2022 (arXiv 2203.15556), approach 3; how starts are chosen is ours.
    """
    ratios = [point.tokens / point.parameters for point in points]
    sizes, tokens = [p.parameters for p in points], [p.tokens for p in points]
    needed = (
        ("runs", len(points), 5),
        ("average sizes", _different(sizes), 3),
        ("numbers of tokens", _different(tokens), 3),
        ("numbers of tokens per parameter", _different(ratios), 2),
    )
    for what, count, least in needed:
        if count < least:
            raise ConfigError(
                f"a law cannot be fitted to {count} different {what}: e, a, alpha, b and beta can "
                f"be told apart from {least} on; add runs of other sizes and lengths"
            )
    fitted = _coefficients(points)
    return LawConfig(
        name=f"fitted to {len(points)} runs",
        parameters=[min(sizes), max(sizes)],
        tokens_per_parameter=[min(ratios), max(ratios)],
        **fitted,
    )


def _different(values: Sequence[float]) -> int:
    """Count values that are more than 1 % apart."""
    ordered = sorted(values)
    return sum(low * 1.01 < high for low, high in itertools.pairwise(ordered)) + bool(ordered)


# Where the search begins, and between what it stays: published exponents are 0.05 to 0.6.
STARTS = (0.1, 0.2, 0.35, 0.5, 0.8)
EXPONENTS = (0.01, 3.0)
REFINED = 6
HUBER_DELTA = 1e-3


def _coefficients(points: Sequence[Point]) -> dict[str, float]:
    """Search for (log e, log A, log B, alpha, beta), where A and B are the terms of a middling run.

    Given both exponents the rest is linear, and least squares without negative terms are a start;
    the best of these starts are refined.
    """
    import numpy as np  # here, not above: scipy takes a third of a second, and plans do not fit
    from scipy.optimize import least_squares, nnls

    size, tokens, measured = np.array([dataclasses.astuple(point) for point in points]).T
    middle_size, middle_tokens = (float(np.exp(np.log(x).mean())) for x in (size, tokens))
    size, tokens = size / middle_size, tokens / middle_tokens

    def terms(alpha: float, beta: float) -> np.ndarray:
        return np.stack([np.ones_like(size), size**-alpha, tokens**-beta], axis=1)

    def residuals(at: np.ndarray) -> np.ndarray:
        return np.log(terms(at[3], at[4]) @ np.exp(at[:3])) - np.log(measured)

    starts = []
    for exponents in itertools.product(STARTS, STARTS):
        linear, _ = nnls(terms(*exponents) / measured[:, None], np.ones_like(measured))
        starts.append(np.array([*np.log(np.maximum(linear, 1e-3)), *exponents]))
    starts.sort(key=lambda at: float(np.abs(residuals(at)).sum()))
    low, high = EXPONENTS
    bounds = ([-20.0] * 3 + [low] * 2, [20.0] * 3 + [high] * 2)
    searches = [
        least_squares(
            residuals, at, bounds=bounds, loss="huber", f_scale=HUBER_DELTA, x_scale="jac",
            xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=2000,
        )
        for at in starts[:REFINED]
    ]  # fmt: skip
    log_e, log_a, log_b, alpha, beta = min(searches, key=lambda search: search.cost).x.tolist()
    return {
        "e": math.exp(log_e),
        "a": math.exp(log_a) * middle_size**alpha,
        "alpha": alpha,
        "b": math.exp(log_b) * middle_tokens**beta,
        "beta": beta,
    }
