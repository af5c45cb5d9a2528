"""Cross entropy mixed with the divergence from a teacher, over logits split by vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TokenLosses:
    """Losses of each token in nats: fp32, in the labels' shape, equal on all ranks.

    Only ``mixed`` has a gradient.
    """

    mixed: Tensor
    """(1 - alpha) cross_entropy + alpha kl."""
    cross_entropy: Tensor
    """The student's, at temperature 1."""
    kl: Tensor
    """At the temperature given. Rounding can take it some 1e-7 below 0."""
    teacher_cross_entropy: Tensor
    """At temperature 1."""
    acceptance: Tensor | None
    """Sum over the vocabulary of min(p, q) at temperature 1, when asked for: how often a teacher
    that verifies a student's draft (speculative decoding) accepts its token."""


def distillation_losses(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup,
    *,
    alpha: float,
    temperature: float = 1.0,
    direction: str = "forward",
    top_k: int = 0,
    token_chunk: int = 512,
    acceptance: bool = False,
) -> TokenLosses:
    """Compare a student's logits with labels and a teacher's logits; collective over ``group``.

    With p the teacher's and q the student's softmax(logits / T): KL(p||q) forward, whose gradient
    with respect to the student's logits is (q - p) / T; KL(q||p) reverse, with
    q (ln q - ln p - KL) / T. There is no factor T^2: gradients of KL shrink as T grows.

    Args:
        logits: [b, s, V/t] as megatron-core's GPTModel gives without labels, or with other leading
            dimensions: the part of the vocabulary that this rank of ``group`` owns. Any float
            dtype, which the gradient has too. Not changed.
        teacher_logits: of the same shape. Not changed; no gradient.
        labels: [b, s], of the whole vocabulary. One outside of it, as -100, gives a finite loss to
            be masked, as in megatron-core.
        alpha: share of KL, in [0, 1].
        temperature: T > 0, of both models, in KL alone.
        top_k: forward only: compare the teacher's k likeliest tokens, and one more token that has
            all the rest. Equally likely ones go by vocabulary index. 0 compares all.
        token_chunk: tokens that have fp32 copies at a time. Results do not depend on it.

    Raises: ValueError for an unknown direction, and for top_k with the reverse one.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction is {direction!r}; use forward or reverse")
    if top_k and direction == "reverse":
        raise ValueError(f"top_k is {top_k} with direction=reverse; use forward, or top_k=0")
    assert logits.shape == teacher_logits.shape and logits.shape[:-1] == labels.shape
    if top_k >= logits.shape[-1] * group.size():
        top_k = 0  # nothing would be left for the rest
    how = _Settings(alpha, temperature, direction, top_k, token_chunk, acceptance)
    return TokenLosses(*_Distillation.apply(logits, teacher_logits, labels, group, how))


@dataclass(frozen=True)
class _Settings:
    alpha: float
    temperature: float
    direction: str
    top_k: int
    token_chunk: int
    acceptance: bool


class _Distillation(torch.autograd.Function):
    """Forward writes the gradient, too: one buffer of the logits' shape and dtype.

    Backward then needs no logits: the teacher's are neither kept nor computed twice. Plain cross
    entropy keeps more, an fp32 softmax.

    Collectives are plain, not differentiable ones: every rank has each token's whole loss, and its
    own part of the gradient, which needs no further message.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup,
        how: _Settings,
    ) -> tuple[Tensor | None, ...]:
        width = logits.shape[-1]
        both = _Comparison(
            logits.reshape(-1, width), teacher_logits.reshape(-1, width), labels, group, how
        )
        both.add_up()
        ce, teacher_ce = both.cross_entropies()
        kl = both.kl()
        gradient, accepted = both.gradient()

        ctx.save_for_backward(gradient)
        ctx.shape, ctx.chunks = logits.shape, both.chunks
        mixed = (1 - how.alpha) * ce + how.alpha * kl
        logged = [x if x is None else x.view(labels.shape) for x in (ce, kl, teacher_ce, accepted)]
        ctx.mark_non_differentiable(*(x for x in logged if x is not None))
        return mixed.view(labels.shape), *logged

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        upstream = upstream.reshape(-1, 1)
        # In place: autograd notices by the buffer's version if there is a second backward. In
        # chunks: on a CPU bf16 times fp32 makes fp32 copies.
        for part in ctx.chunks:
            gradient[part].mul_(upstream[part])
        return gradient.view(ctx.shape), None, None, None, None


class _Comparison:
    """Two models' logits [n, V/t] of the same n tokens; sums over the vocabulary are [n, 1], fp32.

    Collectives have all tokens at once: an all-reduce may add ranks in another order at another
    place of its tensor, and chunks must not matter. Each sum is reduced in a tensor of its own, all
    of one size, for the same reason: the sums of equal models are then equal to the bit, their KL
    exactly 0 and its gradient, too.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup,
        how: _Settings,
    ) -> None:
        self.student, self.teacher, self.group, self.how = student, teacher, group, how
        tokens, width = student.shape
        self.chunks = [slice(at, at + how.token_chunk) for at in range(0, tokens, how.token_chunk)]
        label = labels.reshape(-1, 1) - group.rank() * width
        self.is_mine = (label >= 0) & (label < width)
        self.label = label.where(self.is_mine, 0)
        self.student_max, self.teacher_max = _largest(student, group), _largest(teacher, group)
        if how.top_k:
            self.bar, self.places = _kth_largest(teacher, how.top_k, group)

    def add_up(self) -> None:
        """Fill the sums of exponentials at temperature 1 (``hard``) and at KL's (``soft``).

        ``drift`` is what y - x is on average, of y and x as ``_exponents`` gives them.
        """
        how, group = self.how, self.group
        hard, hard_teacher, soft, soft_teacher, drift, rest, teacher_rest = (
            torch.empty_like(self.student_max) for _ in range(7)
        )
        for part in self.chunks:
            if how.temperature != 1:
                x, y = self._exponents(part, 1.0)
                hard[part], hard_teacher[part] = _sum(x.exp_()), _sum(y.exp_())
            x, y = self._exponents(part, how.temperature)
            q, p = x.exp(), y.exp()
            soft[part], soft_teacher[part] = _sum(q), _sum(p)
            weight = p if how.direction == "forward" else q
            if how.top_k:
                top = self._is_top(part)
                weight.masked_fill_(~top, 0)
                rest[part] = x.masked_fill(top, -torch.inf).logsumexp(1, keepdim=True)
                teacher_rest[part] = y.masked_fill(top, -torch.inf).logsumexp(1, keepdim=True)
            drift[part] = _sum(weight.mul_(y.sub_(x)))
        if how.temperature == 1:
            hard, hard_teacher = soft, soft_teacher
        else:
            _all_reduce(hard, group), _all_reduce(hard_teacher, group)
        _all_reduce(soft, group), _all_reduce(soft_teacher, group), _all_reduce(drift, group)

        if how.top_k:
            # In logarithms, of the tokens that are the rest: 1 - sum(p) could round below 0.
            rest = _all_gather(rest, group).logsumexp(0)
            teacher_rest = _all_gather(teacher_rest, group).logsumexp(0)
            # One token for the rest is a teacher that agrees with the student there, but for one
            # factor: y = x + gap. All else is as with the whole vocabulary.
            self.gap = teacher_rest - rest
            drift += teacher_rest.exp() * self.gap
        self.hard, self.hard_teacher, self.soft, self.soft_teacher = (
            hard, hard_teacher, soft, soft_teacher
        )  # fmt: skip
        self.drift = drift.div_(soft_teacher if how.direction == "forward" else soft)

    def cross_entropies(self) -> tuple[Tensor, Tensor]:
        """[n, 1] of student and teacher, in megatron-core's order of operations."""

        def cross_entropy(logits: Tensor, largest: Tensor, total: Tensor) -> Tensor:
            at_label = logits.gather(1, self.label).float() - largest
            at_label.masked_fill_(~self.is_mine, 0)
            return total.log() - _all_reduce(at_label, self.group)

        return (
            cross_entropy(self.student, self.student_max, self.hard),
            cross_entropy(self.teacher, self.teacher_max, self.hard_teacher),
        )

    def kl(self) -> Tensor:
        """[n, 1]; ln p - ln q is y - x + ln(soft / soft_teacher), averaged over p or over q."""
        difference = self.drift + (self.soft / self.soft_teacher).log()
        return difference if self.how.direction == "forward" else -difference

    def gradient(self) -> tuple[Tensor, Tensor | None]:
        """That of the mixed loss, [n, V/t] in the logits' dtype; and sum(min(p, q)), [n, 1]."""
        how = self.how
        gradient = torch.empty_like(self.student, memory_format=torch.contiguous_format)
        accepted = torch.empty_like(self.hard) if how.acceptance else None
        for part in self.chunks:
            x, y = self._exponents(part, 1.0)
            q = x.exp().div_(self.hard[part])
            if accepted is not None:
                accepted[part] = _sum(y.exp().div_(self.hard_teacher[part]).minimum(q))
            mixed = (1 - how.alpha) * q
            mixed.scatter_add_(1, self.label[part], self.is_mine[part] * (how.alpha - 1.0))
            if how.temperature != 1:
                x, y = self._exponents(part, how.temperature)
                q = x.exp().div_(self.soft[part])
            if how.direction == "forward":
                if how.top_k:
                    y = y.where(self._is_top(part), x.add_(self.gap[part]))
                pull = q.sub_(y.exp_().div_(self.soft_teacher[part]))
            else:
                pull = q.mul_(self.drift[part] - y.sub_(x))
            gradient[part] = mixed.add_(pull, alpha=how.alpha / how.temperature)
        return gradient, accepted if accepted is None else _all_reduce(accepted, self.group)

    def _exponents(self, part: slice, temperature: float) -> tuple[Tensor, Tensor]:
        """x of the student and y of the teacher: (logits - their largest) / temperature; copies."""
        x = self.student[part].to(torch.float32, copy=True).sub_(self.student_max[part])
        y = self.teacher[part].to(torch.float32, copy=True).sub_(self.teacher_max[part])
        return (x, y) if temperature == 1 else (x.div_(temperature), y.div_(temperature))

    def _is_top(self, part: slice) -> Tensor:
        """Which of a chunk's tokens are the teacher's k likeliest, bool."""
        y, bar = self.teacher[part].float(), self.bar[part]
        is_last = y == bar
        return (y > bar) | is_last & (is_last.cumsum(1, dtype=torch.int32) <= self.places[part])


def _sum(x: Tensor) -> Tensor:
    return x.sum(1, keepdim=True)


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Add up over ranks in place; returns ``x``."""
    dist.all_reduce(x, group=group)
    return x


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t, ...]: ``x`` of every rank."""
    everyones = x.new_empty(group.size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(everyones, x, group=group)
    return everyones.view(group.size(), *x.shape)


def _largest(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, 1], fp32: a token's largest logit in the whole vocabulary."""
    largest = logits.amax(1, keepdim=True).float()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest


def _kth_largest(logits: Tensor, k: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """[n, 1] each: a token's k-th largest logit, and how many that equal it this rank may keep.

    Lower ranks own lower indices and keep theirs first. That each shows its k largest alone hides
    none that could be kept.
    """
    candidates = _all_gather(logits.topk(min(k, logits.shape[1])).values.float(), group)
    bar = candidates.movedim(0, 1).flatten(1).topk(k).values[:, -1:]
    places = k - (candidates > bar).sum((0, 2)).unsqueeze(1)
    taken_below = (candidates[: group.rank()] == bar).sum((0, 2)).unsqueeze(1)
    return bar, places - taken_below
