"""The second-order update: survivors make up for the inputs that a matrix loses.

Optimal Brain Surgeon on each matrix alone: of all matrices whose columns Q are 0, the one whose
outputs are nearest to those of W over tokens of training. With H = sum x x^T + lambda I over live
inputs, and K those that stay,

    W_K <- W_K + W_Q beta^T,  beta = H_KK^-1 H_KQ,  W_Q <- 0

which is the ridge regression of what is lost on what stays, and moves outputs by
tr(W_Q ((H^-1)_QQ)^-1 W_Q^T), lambda's part included: the least there is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.config import PruneConfig
from megatron_idea.engine.optimizer import finish_main_update
from megatron_idea.engine.trainable import Trainable
from megatron_idea.guard import DivergedError
from megatron_idea.prune.axis import EMBEDDING, Share
from megatron_idea.prune.plan import StoredUnits, Units, local_part
from megatron_idea.prune.probe import Probe
from megatron_idea.prune.units import named_shares, norm_row
from megatron_idea.shape import LAYER_AXES


@torch.no_grad()
def refit(
    trainable: Trainable,
    alive: Units,
    kept: Units,
    stored: StoredUnits,
    probe: Probe,
    config: PruneConfig,
) -> None:
    """Let matrices that are about to lose columns do without them as well as they can.

    linear_fc2 for neurons, linear_proj for KV groups, linear_qkv, linear_fc1 and the output layer
    for channels; a tied one is the embedding too, and stays. Main weights are changed and cast into
    the model; moments stay, and so do the columns, for ``silence`` to zero.

    Call at a step boundary, on all ranks. The same model, plan and batch give the same bits.

    Args:
        alive, kept: bool, before and after the plan.
    Raises: DivergedError when activations are not finite; nothing was changed then.
    """
    gone = {axis: alive[axis] & ~kept[axis] for axis in (*LAYER_AXES, "hidden_size")}
    axes = [axis for axis, units in gone.items() if bool(units.any())]
    if not axes:
        return
    over_tp = config.update_form == "exact"
    grams = probe.grams(axes, config.update_tokens, over_tp)
    _check_finite(grams.values(), trainable)
    exchange = trainable.exchange()
    for name, parameter, shares in named_shares(trainable):
        share = next((s for s in shares if s.axis in axes and s.dim == 1), None)
        if share is None or name == EMBEDDING:
            continue
        lost, stay = (_columns(units, share, trainable, stored, over_tp) for units in (gone, kept))
        if not bool(lost.any()):
            continue
        row = share.layer if share.axis in LAYER_AXES else norm_row(name, trainable)
        assert row is not None
        gram = grams[share.axis, row]
        tp = trainable.groups.tp if over_tp and share.axis in LAYER_AXES else None
        beta = functools.partial(regression, gram, lost, stay, config.update_damping)
        exchange.change_main(parameter, functools.partial(_refitted, beta, lost, tp))
    finish_main_update(trainable.optimizer, trainable.chunks)


def regression(gram: Tensor, lost: Tensor, stay: Tensor, damping: float) -> Tensor:
    """Write lost inputs as sums of those that stay.

    Args:
        gram: fp64 [n, n], sum of x x^T; lost, stay: bool [n].
        damping: of the mean of the diagonal over these; ten times as much, again and again, where
            the factorisation fails.
    Returns: fp64 [n, lost], rows of others than ``stay`` are 0.
    """
    beta = gram.new_zeros(len(gram), int(lost.sum()))
    mean = gram.diagonal()[lost | stay].mean()
    if mean == 0:  # nothing comes in
        return beta
    among = gram[stay][:, stay]
    while True:
        damped = among.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            beta[stay] = torch.cholesky_solve(gram[stay][:, lost], factor)
            return beta
        damping *= 10


def _refitted(
    beta: Callable[[], Tensor], lost: Tensor, tp: dist.ProcessGroup | None, main: Tensor
) -> Tensor:
    """Return a main weight whose columns make up for ``lost``; over ``tp`` those of all ranks."""
    sums = beta()  # worked out where the whole matrix is, and nowhere else
    columns = main.double()
    mine = slice(None)
    if tp is not None:
        begin = tp.rank() * main.shape[1]
        mine = slice(begin, begin + main.shape[1])
        columns = sums.new_zeros(len(main), len(sums))
        columns[:, mine] = main.double()
    columns = columns[:, lost]
    if tp is not None:
        dist.all_reduce(columns, group=tp)
    return main + columns @ sums[mine].T


def _columns(
    units: Units, share: Share, trainable: Trainable, stored: StoredUnits, over_tp: bool
) -> Tensor:
    """Bring a value of units to a matrix's columns, of this rank or of all: [n], on the device."""
    of_units, ids = units[share.axis], stored[share.axis][0]
    if share.axis in LAYER_AXES:
        assert share.layer is not None
        of_units = of_units[trainable.shape.layers[share.layer].number]
        ids = stored[share.axis][share.layer]
        ids = ids if over_tp else local_part(ids, trainable.groups.tp)
    return of_units[ids].repeat_interleave(share.stride).to(trainable.groups.device)


def _check_finite(grams: Iterable[Tensor], trainable: Trainable) -> None:
    word = torch.zeros(1, device=trainable.groups.device)
    for gram in grams:
        word += (~gram.isfinite()).any()
    dist.all_reduce(word)
    if word.item() > 0:
        raise DivergedError("activations are not finite: no weights can be fitted to them")
