"""Say how each size of a family branches off a trunk: one line of overrides for each.

    python examples/family.py CONFIG --sizes 2.0e9,1.3e9 [--cooldown 0.1] [key.sub=value ...]

The trunk is a run that prunes gradually at a constant learning rate (lr_decay_style WSD). A branch
begins at the trunk's last kept checkpoint from before the trunk is smaller than that size, removes
what is still too much in its first step, and anneals over ``cooldown`` times the tokens that the
trunk had consumed. Its clock is the trunk's up to there, and the learning rate has no step.

Each line is the branch's size, as given, and its overrides, separated by tabs.
"""

from __future__ import annotations

import argparse
import math
import sys

from megatron_idea.config import Config, ConfigError, load, validate, whole_number
from megatron_idea.course import live_at_step, num_steps, target_shape
from megatron_idea.errors import UserError
from megatron_idea.schedule import lr_decay_begins, phase_ends, removal_window
from megatron_idea.shape import Shape


def parameters_at(config: Config, step: int) -> int:
    """Count the parameters that are alive once ``step`` optimizer steps are done, as planned."""
    shape = Shape.full(config.model)
    for axis, count in live_at_step(config, step).items():
        shape = shape.with_counts(axis, count)
    return shape.parameters(config.model).total


def first_step_within(config: Config, parameters: int) -> int:
    """Return the first step after which at most so many parameters are alive."""
    low, high = 0, num_steps(config)
    while low < high:
        middle = (low + high) // 2
        if parameters_at(config, middle) <= parameters:
            high = middle
        else:
            low = middle + 1
    return low


def branch(config: Config, size: str, cooldown: float) -> list[str]:
    """Return the overrides of the branch that ends with at most ``size`` parameters.

    Args:
        cooldown: its tokens, as a share of those that the trunk had consumed.

    Raises: ConfigError when the trunk does not come to that size before its own learning rate
        falls, or keeps no checkpoint to begin at.
    """
    parameters, batch = whole_number(size), config.batch_tokens
    full = Shape.full(config.model).parameters(config.model).total
    fewest = target_shape(config).parameters(config.model).total
    if parameters is None or not fewest < parameters < full:
        raise ConfigError(
            f"a size of the family is {size}; it must be a number of parameters between "
            f"{fewest:,}, where the trunk itself ends, and {full:,}, where it begins"
        )
    step = first_step_within(config, parameters)
    every = config.checkpoint.keep_every_tokens
    mark = step * batch // every * every
    begin = -(-mark // batch) * batch
    if begin > step * batch:  # a multiple that no step hits is reached a step too late
        begin = -(-(mark - every) // batch) * batch
    ends, schedule = phase_ends(config.schedule), config.schedule
    observed = removal_window(schedule)[0] - ends["enlarged"]
    # Not at the very token either: nothing would be left of the phase in which scores are gathered.
    if not ends["enlarged"] + observed < begin <= lr_decay_begins(schedule)[0]:
        raise ConfigError(
            f"the branch to {size} would begin at {begin:,} tokens, which must be after removal "
            "begins and before the trunk's learning rate falls: "
            f"{ends['enlarged'] + observed:,.0f} to {lr_decay_begins(schedule)[0]:,.0f}"
        )
    # Legal counts, none above what is alive then.
    live, finals = live_at_step(config, step), config.final_multiples
    counts = {
        axis: max(goal.target, live[axis] // finals[axis] * finals[axis])
        for axis, goal in config.goals.items()
    }
    total = begin + -(-round(cooldown * begin) // batch) * batch
    enlarged, prune = ends["enlarged"] / total, (begin - ends["enlarged"]) / total
    warmup = schedule.lr_warmup_fraction * schedule.total_tokens
    targets = [f"prune.target.{axis}={count}" for axis, count in counts.items()]
    if config.parameter_goal is not None:
        targets = [f"prune.target.parameters={parameters}"]
    return [
        f"run_dir={config.run_dir}-{size}",
        f"start_from={config.run_dir}@{begin}",
        f"schedule.total_tokens={total}",
        f"schedule.lr_warmup_fraction={warmup / total}",
        f"schedule.lr_wsd_decay_fraction={1 - begin / total}",
        f"schedule.enlarged_fraction={enlarged}",
        f"schedule.prune_fraction={prune}",
        f"schedule.recover_fraction={1 - enlarged - prune}",
        f"schedule.prune_warmup_fraction={observed / (begin - ends['enlarged'])}",
        *targets,
    ]


def check_trunk(config: Config) -> None:
    """Make sure that something can branch off. Raises: ConfigError."""
    checkpoint = config.checkpoint
    if (config.schedule.kind, config.schedule.lr_decay_style) != ("integrated", "WSD"):
        raise ConfigError(
            "a trunk trains at a constant learning rate, from which each branch anneals by itself: "
            "set schedule.lr_decay_style=WSD and schedule.kind=integrated"
        )
    if not config.goals:
        raise ConfigError("a trunk prunes: prune.strategy is none")
    every, kept = checkpoint.every_tokens, checkpoint.keep_every_tokens
    if not kept or not every or kept % every:
        raise ConfigError(
            "branches begin at checkpoints that the trunk keeps: set checkpoint.every_tokens (now "
            f"{every:,}) and checkpoint.keep_every_tokens ({kept:,}) to a multiple of it"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--sizes", required=True, help="numbers of parameters, with commas between")
    parser.add_argument("--cooldown", type=float, default=0.1)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_intermixed_args()
    try:
        config = load(given.config, given.overrides)
        validate(config, config.parallel.model_parallel_size)
        check_trunk(config)
        if not 0 < given.cooldown < math.inf:
            raise ConfigError(f"--cooldown is {given.cooldown}; it must be above 0, as 0.1 is")
        for size in given.sizes.replace(" ", "").split(","):
            overrides = branch(config, size, given.cooldown)
            load(given.config, [*given.overrides, *overrides])
            print(size, *overrides, sep="\t")
    except UserError as error:
        sys.exit(f"family: {error}")


if __name__ == "__main__":
    main()
