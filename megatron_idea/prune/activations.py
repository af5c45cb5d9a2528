"""What forward passes show of units: the one place that watches activations.

Hooks look at the passes of training themselves, so that what is measured is of the step's own batch
and costs a read of each activation and, for that time, an fp32 copy of it. Where nobody asks there
is no hook.

Activations of a unit are those that the weights behind it read:

    neuron      what goes into linear_fc2                      [s, b, f]
    KV group    what goes into linear_proj, of its query heads [s, b, g, q kv]
    channel     the output of each norm of the residual stream [s, b, H], a line a norm
    layer       the residual stream before and after it        [s, b, H]
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_idea.engine.model import unwrap
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.axis import AXES
from megatron_idea.prune.measures import Sums, num_lines
from megatron_idea.prune.strategy import Activation


def decoder_layers(trainable: Trainable) -> Iterator[Any]:
    """Iterate over this rank's decoder layers."""
    for chunk in trainable.chunks:
        model: Any = unwrap(chunk)
        yield from model.decoder.layers


def residual_norms(trainable: Trainable) -> Iterator[tuple[int, torch.nn.Module, Any]]:
    """Iterate over what stands where norms of the residual stream are.

    Transformer Engine's are in the linear layers behind; an identity stands where they were.

    Yields: row (two a layer of the enlarged model by its number, the final norm last), module, the
        linear layer behind; None for the final norm.
    """
    shape = trainable.shape
    for layer in decoder_layers(trainable):
        row = 2 * shape.layers[layer.layer_number - 1].number
        yield row, layer.input_layernorm, layer.self_attention.linear_qkv
        yield row + 1, layer.pre_mlp_layernorm, layer.mlp.linear_fc1
    for chunk in trainable.chunks:
        model: Any = unwrap(chunk)
        if model.decoder.final_layernorm is not None:
            yield 2 * trainable.model.num_layers, model.decoder.final_layernorm, None


def watch_norm(norm: torch.nn.Module, behind: Any, look: Callable[[Tensor], None]) -> Any:
    """Show what a norm puts out whenever it does, detached; returns the hook's handle.

    Args:
        norm, behind: as ``residual_norms`` yields them.
    """

    def outside(_norm: torch.nn.Module, _inputs: Any, output: Tensor) -> None:
        look(output.detach())

    def inside(linear: Any, inputs: tuple[Tensor, ...]) -> None:
        x, gain = inputs[0].detach(), linear.layer_norm_weight.detach()
        look(F.rms_norm(x.float(), gain.shape, gain.float(), linear.eps))

    if hasattr(norm, "weight"):
        return norm.register_forward_hook(outside)
    # Transformer Engine's gains are those of the linear layer, and gathered right before it.
    return behind.register_forward_pre_hook(inside)


def is_recomputed() -> bool:
    """Say whether a forward pass is one that backward repeats: it was seen once already."""
    return bool(torch._C._current_graph_task_id() != -1)


@contextlib.contextmanager
def watched(
    trainable: Trainable, wanted: Mapping[Activation, Sequence[str]]
) -> Iterator[dict[Activation, Sums]]:
    """Watch the passes of one step.

    Args:
        wanted: the axes of each activation.
    Yields: what is filled as passes go by: by axis and position of a layer, None for channels, fp32
        [lines, units on this rank], means over the tokens (or samples) of the whole step. What
        tensor-, pipeline- and data-parallel ranks have of the same units adds up.
    """
    watch = _Watch(trainable, wanted)
    with contextlib.ExitStack() as hooks:
        if wanted:
            for handle in watch.hooks():
                hooks.callback(handle.remove)
        yield watch.sums


class _Watch:
    def __init__(self, trainable: Trainable, wanted: Mapping[Activation, Sequence[str]]) -> None:
        self.sums: dict[Activation, Sums] = {activation: {} for activation in wanted}
        self._trainable = trainable
        self._wanted = wanted
        self._tp = trainable.groups.tp
        # Each rank has some tokens of the residual stream, or all ranks have all.
        self._split_tokens = trainable.core.sequence_parallel
        self._samples = trainable.training.global_batch_size
        self._seq_length = trainable.training.seq_length

    def hooks(self) -> Iterator[Any]:
        shape, tp = self._trainable.shape, self._tp.size()
        axes = {axis for each in self._wanted.values() for axis in each}
        # Of copies one counts; where sequences are split, statistics of them need all ranks.
        has_stream = self._split_tokens or self._tp.rank() == 0
        for layer in decoder_layers(self._trainable):
            position = layer.layer_number - 1
            sizes = shape.layers[position]
            if "ffn_hidden_size" in axes:
                look = self._inputs("ffn_hidden_size", position, sizes.ffn_hidden_size // tp)
                yield layer.mlp.linear_fc2.register_forward_pre_hook(look)
            if "num_query_groups" in axes:
                look = self._inputs("num_query_groups", position, sizes.num_query_groups // tp)
                yield layer.self_attention.linear_proj.register_forward_pre_hook(look)
            if "num_layers" in axes and has_stream:
                yield layer.register_forward_hook(self._layer(position), with_kwargs=True)
        if "hidden_size" in axes and has_stream:
            for row, norm, behind in residual_norms(self._trainable):
                yield self._norm(row, norm, behind)

    def _inputs(self, axis: str, position: int, units: int) -> Callable[..., None]:
        def look(_linear: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            self._see(axis, position, x.view(*x.shape[:2], units, -1))

        return look

    def _norm(self, row: int, norm: torch.nn.Module, behind: Any) -> Any:
        def look(output: Tensor) -> None:
            self._see("hidden_size", None, output[..., None], row)

        return watch_norm(norm, behind, look)

    def _layer(self, position: int) -> Callable[..., None]:
        @torch.no_grad()
        def look(_layer: torch.nn.Module, _args: Any, inputs: dict[str, Any], outputs: Any) -> None:
            before, after = inputs["hidden_states"].float(), outputs[0].float()
            cosines = F.cosine_similarity(before, after, dim=-1)
            self._see("num_layers", position, cosines[..., None, None])

        return look

    @torch.no_grad()
    def _see(self, axis: str, position: int | None, x: Tensor, row: int = 0) -> None:
        """``x``: [s, b, units, lines]; ``row``: the first line of the result, among all norms."""
        if is_recomputed():
            return
        x = x.float()
        for activation, axes in self._wanted.items():
            if axis not in axes:
                continue
            value = self._statistic(activation, x, not AXES[axis].is_split)
            lines = num_lines(activation, axis, self._trainable.model)
            sums = self.sums[activation]
            if (axis, position) not in sums:
                sums[axis, position] = value.new_zeros(lines, value.shape[1])
            sums[axis, position][row : row + len(value)] += value

    def _statistic(self, activation: Activation, x: Tensor, of_stream: bool) -> Tensor:
        """[s, b, units, lines] to [lines or 1, units], this rank's part of the step's mean."""
        is_split = of_stream and self._split_tokens
        tokens = self._seq_length - activation.skip_first
        if activation.skip_first and not (is_split and self._tp.rank() > 0):
            x = x[1:]
        if activation.statistic in ("mean", "mean_square", "cosine"):
            values = x.square() if activation.statistic == "mean_square" else x
            return values.sum((0, 1)).T / (self._samples * tokens)
        is_mean = activation.statistic == "sequence_mean"
        over_tokens = (x.abs() if is_mean else x.square()).sum(0)
        if is_split:
            dist.all_reduce(over_tokens, group=self._tp)
            if self._tp.rank() > 0:  # one of them stands for all
                return torch.zeros_like(over_tokens[:1, :, 0])
        if is_mean:
            of_samples = (over_tokens / tokens).square().sum(-1)
        else:
            of_samples = over_tokens.sum(-1).sqrt()
        return of_samples.sum(0)[None] / self._samples
