"""What forward passes show of units: the one place that watches activations.

Hooks look at the passes of training themselves, so that what is measured is of the step's own batch
and costs a read of each activation. Where nobody asks there is no hook.

Activations of a unit are those that the weights behind it read:

    neuron      what goes into linear_fc2                      [s, b, f]
    KV group    what goes into linear_proj, of its query heads [s, b, g, q kv]
    channel     the output of each norm of the residual stream [s, b, H], summed over the norms
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
from megatron_idea.prune.measures import Sums
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
        linear layer behind, None for the final norm.
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


def norm_output(output: Tensor, norm: torch.nn.Module, behind: Any) -> Tensor:
    """Return what a norm gives to ``behind``, given what stands in its place returned."""
    if hasattr(norm, "weight"):
        return output
    return F.rms_norm(output, output.shape[-1:], behind.layer_norm_weight, behind.eps)


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
        training = trainable.training
        self._samples = training.global_batch_size
        self._seq_length = training.seq_length

    def hooks(self) -> Iterator[Any]:
        shape, tp = self._trainable.shape, self._tp
        axes = {axis for each in self._wanted.values() for axis in each}
        # Of copies one counts; where sequences are split, statistics of them need all ranks.
        has_stream = self._split_tokens or tp.rank() == 0
        for layer in decoder_layers(self._trainable):
            position = layer.layer_number - 1
            sizes = shape.layers[position]
            if "ffn_hidden_size" in axes:
                units = sizes.ffn_hidden_size // tp.size()
                look = self._inputs("ffn_hidden_size", position, units)
                yield layer.mlp.linear_fc2.register_forward_pre_hook(look)
            if "num_query_groups" in axes:
                units = sizes.num_query_groups // tp.size()
                look = self._inputs("num_query_groups", position, units)
                yield layer.self_attention.linear_proj.register_forward_pre_hook(look)
            if "num_layers" in axes and has_stream:
                yield layer.register_forward_hook(self._layer(position), with_kwargs=True)
        if "hidden_size" in axes and has_stream:
            for _row, norm, behind in residual_norms(self._trainable):
                yield norm.register_forward_hook(self._norm(behind))

    def _inputs(self, axis: str, position: int, units: int) -> Callable[..., None]:
        def look(_linear: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._see(axis, position, inputs[0], units)

        return look

    def _norm(self, behind: Any) -> Callable[..., None]:
        def look(norm: torch.nn.Module, _inputs: Any, output: Tensor) -> None:
            self._see("hidden_size", None, norm_output(output, norm, behind), output.shape[-1])

        return look

    def _layer(self, position: int) -> Callable[..., None]:
        @torch.no_grad()
        def look(_layer: torch.nn.Module, _args: Any, inputs: dict[str, Any], outputs: Any) -> None:
            if is_recomputed():
                return
            cosines = F.cosine_similarity(
                inputs["hidden_states"].float(), outputs[0].float(), dim=-1
            )
            for activation, axes in self._wanted.items():
                if "num_layers" not in axes:
                    continue
                skip = int(activation.skip_first)
                begins = not self._split_tokens or self._tp.rank() == 0
                total = cosines[skip if begins else 0 :].sum()
                tokens = self._samples * (self._seq_length - skip)
                self._add(activation, "num_layers", position, (total / tokens).view(1, 1))

        return look

    @torch.no_grad()
    def _see(self, axis: str, position: int | None, x: Tensor, units: int) -> None:
        """``x``: [s, b, units x lines]."""
        if is_recomputed():
            return
        of_units = x.detach().float().view(*x.shape[:2], units, -1)
        for activation, axes in self._wanted.items():
            if axis in axes:
                value = self._statistic(activation.statistic, of_units, axis)
                self._add(activation, axis, position, value)

    def _statistic(self, statistic: str, x: Tensor, axis: str) -> Tensor:
        """[s, b, units, lines] to [lines or 1, units]."""
        tokens = self._samples * self._seq_length
        if statistic == "mean":
            return x.sum((0, 1)).T / tokens
        if statistic == "mean_square":
            return x.square().sum((0, 1)).T / tokens
        sizes = x.norm(dim=-1) if x.shape[-1] > 1 else x[..., 0].abs()
        over_tokens = (sizes if statistic == "sequence_mean" else sizes.square()).sum(0)
        shared = axis == "hidden_size" and self._split_tokens
        if shared:
            dist.all_reduce(over_tokens, group=self._tp)
        if statistic == "sequence_mean":
            of_samples = (over_tokens / self._seq_length).square()
        else:
            of_samples = over_tokens.sqrt()
        value = of_samples.sum(0)[None] / self._samples
        return torch.zeros_like(value) if shared and self._tp.rank() > 0 else value

    def _add(self, activation: Activation, axis: str, position: int | None, value: Tensor) -> None:
        sums = self.sums[activation]
        if (axis, position) in sums:
            sums[axis, position] += value
        else:
            sums[axis, position] = value.contiguous()
