"""Forward passes over the batch of a step, for what no sum over weights can tell.

First-order scores get even the sign of a whole layer's effect wrong, and how much of a norm's
input is in some channels only the input says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_idea.engine.passes import MicroBatches, forward_loss, through
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.activations import decoder_layers, residual_norms
from megatron_idea.prune.plan import StoredUnits


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

    def _pass(self) -> list[Tensor]:
        chunks, data = self._trainable.chunks, self._data
        for chunk in chunks:
            chunk.eval()
        results = through(
            chunks,
            lambda: data.step(self._samples),
            forward_loss,
            data.num_microbatches,
            data.seq_length,
            data.micro_batch_size,
        )
        for chunk in chunks:
            chunk.train()
        return [result["loss"] for result in results]
