"""What loss a scaling law predicts for a run whose size changes, and where the law was validated.

A run is as good as one of its *average* size: N is the mean of the live parameters over the run's
tokens. Zeros count for nothing, so live units decide and not stored ones.

Source: "The Journey Matters" (arXiv 2501.12486), for gradual pruning of single weights.
"""

from __future__ import annotations

from collections import Counter

from megatron_idea.config import Config, LawConfig, ModelConfig
from megatron_idea.course import live_at_step, num_steps
from megatron_idea.shape import LayerShape, Shape


def predict(law: LawConfig, parameters: float, tokens: float) -> float:
    """Predict the held-out loss: e + a / N^alpha + b / D^beta.

    Args:
        parameters: N, the mean over the run's tokens, embeddings included.
        tokens: D, of training; the law takes each of them for new.

    Returns: nats per token.
    """
    return law.e + law.a / parameters**law.alpha + law.b / tokens**law.beta


def in_range(law: LawConfig, parameters: float, tokens: float) -> bool:
    """Say whether a run lies where the law was validated; elsewhere ``predict`` extrapolates."""
    (fewest, most), (shortest, longest) = law.parameters, law.tokens_per_parameter
    return fewest <= parameters <= most and shortest <= tokens / parameters <= longest


def average_parameters(config: Config) -> float:
    """Average the parameters of the live units over the steps of a run, as planned."""
    return parameter_steps(config, num_steps(config)) / num_steps(config)


def parameter_steps(config: Config, steps: int) -> int:
    """Add up the parameters of the live units, as planned, over the first ``steps`` steps.

    A step computes with the units that the step before it left. Live counts never grow: where they
    are equal at both ends of a stretch they are so in between.
    """

    held: Counter[tuple[tuple[str, int], ...]] = Counter()

    def over(first: int, live: dict[str, int], end: int, live_at_end: dict[str, int]) -> None:
        if live == live_at_end or end - first == 1:
            held[tuple(live.items())] += end - first
        else:
            middle = (first + end) // 2
            there = live_at_step(config, middle)
            over(first, live, middle, there)
            over(middle, there, end, live_at_end)

    if steps:
        over(0, live_at_step(config, 0), steps, live_at_step(config, steps))
    return sum(count * _parameters(config.model, dict(live)) for live, count in held.items())


def _parameters(model: ModelConfig, counts: dict[str, int]) -> int:
    """Count the parameters of layers that are alike: of one, and of all that is no layer's."""
    layer = LayerShape(
        0,
        counts.get("ffn_hidden_size", model.ffn_hidden_size),
        counts.get("num_query_groups", model.num_query_groups),
        model.num_attention_heads // model.num_query_groups,
    )
    hidden_size = counts.get("hidden_size", model.hidden_size)
    rest, one = (Shape(hidden_size, layers).parameters(model).total for layers in ((), (layer,)))
    return rest + counts.get("num_layers", model.num_layers) * (one - rest)
