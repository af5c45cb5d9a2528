"""What a rank's optimizer holds of a parameter, and how shards become whole and shards again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from torch import Tensor

from megatron_idea.engine.distributed import ProcessGroups

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """What this rank's optimizer holds of one parameter: its flat elements [start, end).

    Without the distributed optimizer that is the whole parameter on every data-parallel rank.
    """

    parameter: torch.nn.Parameter
    start: int
    end: int
    main: Tensor
    """Main weight that the inner optimizer steps: fp32, flat or in the parameter's shape."""
    state: dict[str, Any]
    """``exp_avg``, ``exp_avg_sq`` shaped like ``main``, torch's ``step``; empty before step 1."""

    @property
    def grad(self) -> Tensor:
        """Gradient [end - start], fp32, reduced over data-parallel ranks; a view."""
        main_grad: Tensor = self.parameter.main_grad  # type: ignore[attr-defined,assignment]
        return main_grad.view(-1)[self.start : self.end]


def shard_of(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> Shard | None:
    """Return this rank's part of ``parameter``; None when all of it is on other ranks."""
    inner = optimizer.optimizer
    if isinstance(optimizer, DistributedOptimizer):
        if parameter not in optimizer.model_param_gbuf_map:
            return None
        owned = optimizer._get_model_param_range_map(parameter)["param"]
        group, index = optimizer.model_param_group_index_map[parameter]
        main = inner.param_groups[group]["params"][index]
        start, end = owned.start, owned.end
    else:
        main = getattr(parameter, "main_param", parameter)
        start, end = 0, parameter.numel()
    return Shard(parameter, start, end, main, inner.state.get(main, {}))


def has_main_copy(parameter: torch.nn.Parameter) -> bool:
    """Whether the optimizer keeps an fp32 main weight apart from the model's weight."""
    return parameter.dtype != torch.float32


def deal(sizes: Sequence[int], ranks: int) -> list[int]:
    """Give each parameter an owner: largest first, to the rank that has least.

    Equal over TP because sizes are.
    """
    load, owners = [0] * ranks, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[index] = load.index(min(load))
        load[owners[index]] += sizes[index]
    return owners


class ShardExchange:
    """Moves a parameter's main weight and moments between DP shards and one whole copy.

    Parameters are dealt out to data-parallel ranks by size; a parameter's owner holds the whole
    [3, numel] (main, exp_avg, exp_avg_sq) while it is cut, saved or loaded. So no rank ever holds
    more than its share of the state and one parameter. Without the distributed optimizer every rank
    has every parameter whole already and nothing travels.
    """

    def __init__(
        self,
        optimizer: MegatronOptimizer,
        parameters: Sequence[torch.nn.Parameter],
        groups: ProcessGroups,
        owners: Sequence[int] | None = None,
    ) -> None:
        """``owners``: those of an exchange over the same model in another shape, to keep them."""
        self._optimizer = optimizer
        self._groups = groups
        self._sharded = isinstance(optimizer, DistributedOptimizer) and groups.shards.size() > 1
        self._parameters = parameters
        if owners is None:
            owners = deal([p.numel() for p in parameters], groups.shards.size())
        self._owners = dict(zip(map(id, parameters), owners, strict=True))
        self._ranges = self._all_ranges(parameters)

    @property
    def owners(self) -> list[int]:
        """The data-parallel rank that each parameter comes together on, in the model's order."""
        return [self._owners[id(parameter)] for parameter in self._parameters]

    def _all_ranges(
        self, parameters: Sequence[torch.nn.Parameter]
    ) -> dict[int, list[tuple[int, int]]]:
        """Each DP rank's [start, end) of each parameter."""
        if not self._sharded:
            return {}
        parts = (shard_of(self._optimizer, parameter) for parameter in parameters)
        mine = torch.tensor(
            [(p.start, p.end) if p else (0, 0) for p in parts], device=self._groups.device
        )
        dp = self._groups.shards
        everyones = mine.new_empty(dp.size() * mine.shape[0], 2)
        torch.distributed.all_gather_into_tensor(everyones, mine, group=dp)
        by_rank = everyones.view(dp.size(), -1, 2).tolist()
        return {
            id(parameter): [tuple(ranges[i]) for ranges in by_rank]
            for i, parameter in enumerate(parameters)
        }

    def owns(self, parameter: torch.nn.Parameter) -> bool:
        """Whether the whole of ``parameter`` comes together on this rank."""
        return not self._sharded or self._owners[id(parameter)] == self._groups.shards.rank()

    def is_saver(self, parameter: torch.nn.Parameter) -> bool:
        """Whether this rank, alone among its data-parallel peers, writes ``parameter``."""
        return self._owners[id(parameter)] == self._groups.shards.rank()

    @torch.no_grad()
    def gather(self, parameter: torch.nn.Parameter) -> Tensor | None:
        """Whole fp32 [3, numel] on the owner, None elsewhere; a collective over DP.

        Moments are 0 before the first step.
        """
        part = shard_of(self._optimizer, parameter)
        mine = torch.empty(3, 0, device=self._groups.device)
        if part:
            main = part.main.detach().view(-1)
            moments = (part.state.get(name) for name in MOMENTS)
            mine = torch.stack(
                [main, *(torch.zeros_like(main) if m is None else m.view(-1) for m in moments)]
            )
        if not self._sharded:
            return mine
        ranges = self._ranges[id(parameter)]
        to_owner = self._splits(parameter)
        from_ranks = [3 * (end - start) for start, end in ranges]
        received = mine.new_empty(sum(from_ranks) if self.owns(parameter) else 0)
        torch.distributed.all_to_all_single(
            received,
            mine.flatten(),
            from_ranks if self.owns(parameter) else [0] * len(ranges),
            to_owner,
            group=self._groups.shards,
        )
        if not self.owns(parameter):
            return None
        # Shards come in rank order, and a parameter's shards lie in rank order.
        parts = [block.view(3, -1) for block in received.split(from_ranks)]
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def scatter(self, parameter: torch.nn.Parameter, whole: Tensor | None) -> Tensor | None:
        """This rank's [3, end - start] of the owner's ``whole``; a collective over DP.

        None where this rank holds no part of the parameter.
        """
        if not self._sharded:
            return whole
        ranges = self._ranges[id(parameter)]
        sent = torch.empty(0, device=self._groups.device)
        if whole is not None:
            sent = torch.cat([whole[:, start:end].flatten() for start, end in ranges])
        to_ranks = [3 * (end - start) for start, end in ranges]
        start, end = ranges[self._groups.shards.rank()]
        received = sent.new_empty(3 * (end - start))
        torch.distributed.all_to_all_single(
            received,
            sent,
            self._splits(parameter),
            to_ranks if self.owns(parameter) else [0] * len(ranges),
            group=self._groups.shards,
        )
        return received.view(3, -1) if end > start else None

    @torch.no_grad()
    def change_main(
        self, parameter: torch.nn.Parameter, change: Callable[[Tensor], Tensor]
    ) -> None:
        """Replace a main weight by what ``change`` makes of the whole one; a collective over DP.

        The model's own weights follow with ``finish_main_update``.
        """
        whole = self.gather(parameter)
        if whole is not None:
            whole[0] = change(whole[0].view(parameter.shape)).view(-1)
        part = self.scatter(parameter, whole)
        held = shard_of(self._optimizer, parameter)
        if part is not None and held is not None:
            held.main.data.view(-1).copy_(part[0])

    def _splits(self, parameter: torch.nn.Parameter) -> list[int]:
        """Elements of this rank's part, at the owner's place."""
        start, end = self._ranges[id(parameter)][self._groups.shards.rank()]
        splits = [0] * self._groups.shards.size()
        splits[self._owners[id(parameter)]] = 3 * (end - start)
        return splits
