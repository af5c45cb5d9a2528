"""What the clock will bring: steps, live and stored widths, FLOPs over consumed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_idea.config import Config, ModelConfig
from megatron_idea.schedule import keep_count, keep_ratio, removal_window


@dataclass(frozen=True)
class ParameterCount:
    """Weights of a model by where they are; a tied embedding counts once."""

    total: int
    embedding: int
    attention: int
    ffn: int
    norm: int


def parameter_count(model: ModelConfig, ffn_widths: Sequence[int]) -> ParameterCount:
    """Count the weights of the GPT whose layer i has ``ffn_widths[i]`` FFN neurons."""
    hidden, layers = model.hidden_size, len(ffn_widths)
    query = model.num_attention_heads * model.kv_channels
    key_and_value = 2 * model.num_query_groups * model.kv_channels
    embedding = model.vocab_size * hidden
    if not model.share_embeddings_and_output_weights:
        embedding *= 2
    attention = layers * (query + key_and_value + query) * hidden
    ffn = 3 * hidden * sum(ffn_widths)
    norm = (2 * layers + 1) * hidden
    if model.qk_layernorm:
        norm += layers * 2 * model.kv_channels
    return ParameterCount(
        total=embedding + attention + ffn + norm,
        embedding=embedding,
        attention=attention,
        ffn=ffn,
        norm=norm,
    )


def flops_per_token(model: ModelConfig, ffn_widths: Sequence[int], seq_length: int) -> int:
    """FLOPs of training on one token: forward, and backward at twice the forward.

    6 x (attention + FFN + output layer weights) + 6 x layers x heads x kv_channels x seq_length.
    The second term is q k^T and the product with v; a causal token sees half of the sequence.
    """
    count = parameter_count(model, ffn_widths)
    matmul = count.attention + count.ffn + model.vocab_size * model.hidden_size
    scores = len(ffn_widths) * model.num_attention_heads * model.kv_channels * seq_length
    return 6 * matmul + 6 * scores


@dataclass(frozen=True)
class WidthChange:
    """A compaction: from ``tokens`` consumed tokens on, layers are ``width`` neurons wide."""

    tokens: int
    width: int


def num_steps(config: Config) -> int:
    """Optimizer steps of the run; the last one is the first that reaches ``total_tokens``."""
    return -(-config.schedule.total_tokens // config.batch_tokens)


def live_at_step(config: Config, step: int) -> int:
    """Neurons alive in each layer once ``step`` optimizer steps are done.

    Masks move every ``prune.mask_interval_steps`` and in any step past the removal window.
    """
    tokens = step * config.batch_tokens
    if tokens < removal_window(config.schedule)[1]:
        tokens -= step % config.prune.mask_interval_steps * config.batch_tokens
    ratio = keep_ratio(config.schedule, tokens, config.final_keep_ratio)
    return keep_count(ratio, config.model.ffn_hidden_size)


def width_plan(config: Config) -> list[WidthChange]:
    """Predict the compactions of a run.

    One is due at the end of a step in which a layer could shed a whole ``compaction_block``, or,
    once the removal window is over, anything; widths stay multiples of ``ffn_multiple``. Live
    counts never grow, so each compaction is found by bisection over steps.
    """
    if not config.prune.compact:
        return []
    multiple, block = config.ffn_multiple, config.compaction_block
    window_end = removal_window(config.schedule)[1]

    def legal(step: int) -> int:
        return max(1, -(-live_at_step(config, step) // multiple)) * multiple

    def is_due(step: int) -> bool:
        gain = width - legal(step)
        return gain >= block or (gain > 0 and step * config.batch_tokens >= window_end)

    changes: list[WidthChange] = []
    width, first, last = config.model.ffn_hidden_size, 1, num_steps(config)
    while width > config.target_ffn_hidden_size:
        low, high = first, last + 1  # the first step at which the next compaction is due
        while low < high:
            middle = (low + high) // 2
            if is_due(middle):
                high = middle
            else:
                low = middle + 1
        if low > last:
            break
        width, first = legal(low), low + 1
        changes.append(WidthChange(low * config.batch_tokens, width))
    return changes


def width_at(config: Config, tokens: int) -> int:
    """Physical FFN width per layer with which the step after ``tokens`` consumed tokens runs."""
    width = config.model.ffn_hidden_size
    for change in width_plan(config):
        if change.tokens <= tokens:
            width = change.width
    return width


def _flops_at(config: Config, width: int) -> int:
    widths = [width] * config.model.num_layers
    return flops_per_token(config.model, widths, config.training.seq_length)


def flops_between(config: Config, start: int, end: int) -> int:
    """Training FLOPs from ``start`` to ``end`` consumed tokens, the model shrinking as planned."""
    flops = 0
    width, begin = config.model.ffn_hidden_size, 0
    for change in [*width_plan(config), WidthChange(max(end, 0), 0)]:
        tokens = min(change.tokens, end) - max(begin, start)
        flops += max(tokens, 0) * _flops_at(config, width)
        width, begin = change.width, change.tokens
    return flops


def remaining_flops(config: Config, tokens: int) -> int:
    """Training FLOPs still to do after ``tokens`` consumed tokens; evaluations are not in it."""
    return flops_between(config, tokens, config.schedule.total_tokens)
