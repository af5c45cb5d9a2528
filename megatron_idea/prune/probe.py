"""Forward passes over the batch of a step, for what no sum over weights can tell.

First-order scores get even the sign of a whole layer's effect wrong, and how much of a norm's
input is in some channels only the input says.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_idea.engine.passes import (
    MicroBatches,
    evaluating,
    forward_backward,
    forward_loss,
    through,
)
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.activations import (
    decoder_layers,
    residual_norms,
    watch_norm,
    watched,
)
from megatron_idea.prune.plan import StoredUnits
from megatron_idea.prune.scores import Scores


class Probe:
    """The batch that a step was taken on, to look again at the model after the step.

    Everything here is collective over all ranks, the same on all of them, and draws no random
    number: dropout is off.
    """

    def __init__(self, trainable: Trainable, data: MicroBatches, samples: int) -> None:
        """``samples``: how many of ``data`` come before the step's."""
        self._trainable = trainable
        self._data = data
        self._samples = samples

    def loss(self, without: Collection[int] = ()) -> float:
        """Mean loss of a token, in nats, of the model without some layers, by original number."""
        shape, groups = self._trainable.shape, self._trainable.groups

        def leave_out(
            _layer: torch.nn.Module, _args: Any, inputs: dict[str, Any], outputs: Any
        ) -> Any:
            return inputs["hidden_states"], *outputs[1:]

        with contextlib.ExitStack() as hooks:
            for layer in decoder_layers(self._trainable):
                if shape.layers[layer.layer_number - 1].number in without:
                    hook = layer.register_forward_hook(leave_out, with_kwargs=True)
                    hooks.callback(hook.remove)
            losses = self._pass()
        total = torch.zeros((), dtype=torch.float64, device=groups.device)
        if losses and groups.tp.rank() == 0:
            total += torch.stack(losses).double().mean() / groups.dp.size()
        dist.all_reduce(total)
        return float(total)

    def measure(self, scores: Scores, begins: Sequence[int]) -> None:
        """Let passes over other batches count as ``scores``' steps: backward too, and no update.

        Args:
            begins: for each batch, how many of the data's samples come before it.
        """
        trainable = self._trainable
        with evaluating(trainable.chunks):
            for begin in begins:
                with watched(trainable, scores.activations) as seen:
                    forward_backward(trainable, self._data, begin)
                scores.record(scores.observe(trainable, seen))

    @torch.no_grad()
    def norm_inputs(self, stored: StoredUnits, channels: int) -> Tensor:
        """Sum the squares of what goes into each norm of the residual stream.

        Returns: fp64 [2 layers + 1, channels] on the CPU, of the enlarged model: two rows a layer,
            and the final norm's; up to a common factor.
        """
        trainable, ids = self._trainable, stored["hidden_size"][0]
        layers = trainable.model.num_layers
        device = trainable.groups.device
        sums = torch.zeros(2 * layers + 1, channels, dtype=torch.float64, device=device)
        where = ids.to(device)

        def watch(row: int) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
            def add(_norm: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
                sums[row, where] += inputs[0].detach().double().square().sum(dim=(0, 1))

            return add

        with contextlib.ExitStack() as hooks:
            for row, norm, _behind in residual_norms(trainable):
                hooks.callback(norm.register_forward_pre_hook(watch(row)).remove)
            self._pass()
        dist.all_reduce(sums)
        return sums.cpu()

    @torch.no_grad()
    def stream_gram(self) -> Tensor:
        """Sum x^T x over tokens and norms, x being what goes into a norm divided by its size.

        Returns: fp64 [channels, channels] on the CPU, equal on every rank; up to a common factor.
        """
        trainable = self._trainable
        channels, groups = trainable.shape.hidden_size, trainable.groups
        gram = torch.zeros(channels, channels, dtype=torch.float64, device=groups.device)
        eps = trainable.model.layernorm_epsilon

        def add(_norm: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = F.rms_norm(inputs[0].detach().float(), (channels,), eps=eps).flatten(0, -2)
            gram.add_((x.T @ x).double())

        with contextlib.ExitStack() as hooks:
            # Without sequence parallelism tensor-parallel ranks see the same tokens.
            if trainable.core.sequence_parallel or groups.tp.rank() == 0:
                for _row, norm, _behind in residual_norms(trainable):
                    hooks.callback(norm.register_forward_pre_hook(add).remove)
            self._pass()
        dist.all_reduce(gram)
        return gram.cpu()

    @torch.no_grad()
    def grams(
        self, axes: Collection[str], tokens: int, over_tp: bool = False
    ) -> dict[tuple[str, int], Tensor]:
        """Sum x x^T over tokens, x being the activations of units that weights read.

        Neurons: what goes into linear_fc2; KV groups: into linear_proj; channels: the output of
        each norm of the residual stream.

        Args:
            tokens: at most so many, and at least one of each sequence.
            over_tp: neurons and groups of all tensor-parallel ranks, those of the first rank first;
                else each rank's own.
        Returns: by axis and row, of what this rank has: for neurons and groups the position of the
            layer, for channels as ``residual_norms`` has it; fp64 [n, n] on the device, over the
            stored units, equal on data-parallel ranks.
        Cost: a forward pass; 8 n^2 bytes for each row, at once.
        """
        trainable, sums = self._trainable, dict[tuple[str, int], Tensor]()
        tp, split = trainable.groups.tp, trainable.core.sequence_parallel
        positions = self._positions(tokens)

        def add(key: tuple[str, int], x: Tensor) -> None:
            flat = x.detach().flatten(0, 1).double()
            gram = flat.T @ flat
            sums[key] = sums[key] + gram if key in sums else gram

        def see_input(key: tuple[str, int], _linear: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0][positions]
            add(key, _gathered(x, tp) if over_tp else x)

        def see_output(row: int, x: Tensor) -> None:
            first = tp.rank() * len(x) if split else 0
            here = positions[(positions >= first) & (positions < first + len(x))] - first
            add(("hidden_size", row), x[here])

        with contextlib.ExitStack() as hooks:
            for layer in decoder_layers(trainable):
                for axis, linear in (
                    ("ffn_hidden_size", layer.mlp.linear_fc2),
                    ("num_query_groups", layer.self_attention.linear_proj),
                ):
                    if axis in axes:
                        see = functools.partial(see_input, (axis, layer.layer_number - 1))
                        hooks.callback(linear.register_forward_pre_hook(see).remove)
            for row, norm, behind in residual_norms(trainable):
                if "hidden_size" in axes:
                    look = functools.partial(see_output, row)
                    hooks.callback(watch_norm(norm, behind, look).remove)
            self._pass()
        for (axis, _row), gram in sums.items():
            dist.all_reduce(gram, group=trainable.groups.dp)
            if axis == "hidden_size" and split:
                dist.all_reduce(gram, group=tp)
        return sums

    def _positions(self, tokens: int) -> Tensor:
        """Choose evenly spaced positions, the same in each sequence: in any layout these tokens."""
        training = self._trainable.training
        of_sequence = max(1, tokens // training.global_batch_size)
        spacing = -(-training.seq_length // of_sequence)
        device = self._trainable.groups.device
        return torch.arange(spacing - 1, training.seq_length, spacing, device=device)

    def _pass(self) -> list[Tensor]:
        chunks, data = self._trainable.chunks, self._data
        with evaluating(chunks):
            results = through(
                chunks,
                lambda: data.step(self._samples),
                forward_loss,
                data.num_microbatches,
                data.seq_length,
                data.micro_batch_size,
            )
        return [result["loss"] for result in results]


def _gathered(x: Tensor, tp: dist.ProcessGroup) -> Tensor:
    """Join what tensor-parallel ranks have of the last dimension."""
    parts = [torch.empty_like(x) for _ in range(tp.size())]
    dist.all_gather(parts, x.contiguous(), group=tp)
    return torch.cat(parts, dim=-1)
