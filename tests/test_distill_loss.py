"""The distillation loss against fp64 on one process, elementwise, at TP 1, 2 and 4."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jobs import built, on_ranks, random_tokens, run_job, small
from torch import Tensor

from megatron_idea.config import Config
from megatron_idea.distill.loss import TokenLosses, distillation_losses
from megatron_idea.testing import Workers, assert_close, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

VOCABULARY = 4 * 33
SHAPE = 3, 7, VOCABULARY  # [b, s, V]

# Of the terms that an element is the sum of. At these logits an exponent below the maximum is less
# than 16, where fp32 is exact to 5e-7; with a rest token three of them are rounded.
TOLERANCE = 2e-6

Loss = Callable[..., Tensor]
"""As ``ours``: (logits, teacher_logits, labels, groups, **settings) -> [b, s]."""


def everywhere(*sizes: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run ``test(groups)`` once for each TP size, in so many processes."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("tp", sizes)
        def run(workers: Workers, tp: int) -> None:
            parallel = {"tensor_model_parallel_size": tp}
            run_job(workers, test, tp, small(parallel=parallel, model={"num_query_groups": 4}))

        run.__name__, run.__module__, run.job = test.__name__, test.__module__, test  # type: ignore[attr-defined]
        return run

    return decorate


def draw(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher, labels and what comes from above, [b, s]; for every rank the same."""
    student, teacher = draw(*SHAPE, seed=0), draw(*SHAPE, seed=1)
    labels = torch.arange(21).view(SHAPE[:2]) * 6 + 3  # on each rank some
    return student, teacher, labels, draw(*SHAPE[:2], seed=2)


def part(x: Tensor, groups: ProcessGroups) -> Tensor:
    """This rank's [..., V/t] of [..., V], a tensor of its own."""
    return x.chunk(groups.tp.size(), -1)[groups.tp.rank()].clone()


def ours(
    logits: Tensor, teacher: Tensor, labels: Tensor, groups: ProcessGroups, **settings: Any
) -> Tensor:
    return distillation_losses(logits, teacher, labels, groups.tp, **settings).mixed


def losses_and_gradient(
    student: Tensor, teacher: Tensor, groups: ProcessGroups, **settings: Any
) -> tuple[TokenLosses, Tensor]:
    """On logits of the whole vocabulary, labels and upstream of ``inputs``; gradient [.., V/t]."""
    *_, labels, upstream = inputs()
    logits = part(student, groups).requires_grad_()
    losses = distillation_losses(logits, part(teacher, groups), labels, groups.tp, **settings)
    losses.mixed.backward(upstream)
    assert logits.grad is not None
    return losses, logits.grad


def top_ids(logits: Tensor, k: int) -> Tensor:
    """[.., k], equal logits by index."""
    return logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def with_rest(log_p: Tensor, ids: Tensor) -> Tensor:
    """[.., k + 1] log-probabilities: of ``ids`` [.., k] and of all others together."""
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, ids), rest], -1)


def formula(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float,
    temperature: float = 1.0,
    direction: str = "forward",
    top_k: int = 0,
) -> TokenLosses:
    """The same in fp64 on the whole vocabulary, to be differentiated by autograd."""
    z, zt = student.double(), teacher.double()
    ce, teacher_ce = (
        F.cross_entropy(x.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
        for x in (z, zt)
    )
    acceptance = torch.minimum(z.softmax(-1), zt.softmax(-1)).sum(-1)
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (z, zt))
    if top_k:
        ids = top_ids(zt, top_k)
        log_q, log_p = with_rest(log_q, ids), with_rest(log_p, ids)
    if direction == "reverse":
        log_q, log_p = log_p, log_q
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return TokenLosses((1 - alpha) * ce + alpha * kl, ce, kl, teacher_ce, acceptance)


def size_of_terms(
    student: Tensor, teacher: Tensor, labels: Tensor, settings: dict[str, Any]
) -> Tensor:
    """[.., V]: what each element of the gradient would be if its terms could not cancel."""
    alpha, temperature = settings["alpha"], settings.get("temperature", 1.0)
    z, zt = student.detach().double(), teacher.double()
    terms = (1 - alpha) * (z.softmax(-1) + F.one_hot(labels, z.shape[-1]))
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (z, zt))
    if settings.get("direction") == "reverse":
        kl = formula(student, teacher, labels, **settings).kl.abs().unsqueeze(-1)
        kl_terms = log_q.exp() * (log_q.abs() + log_p.abs() + kl)
    elif top_k := settings.get("top_k", 0):
        ids = top_ids(zt, top_k)
        outside = torch.ones_like(z).scatter(-1, ids, 0)
        gap = with_rest(log_p, ids)[..., -1:] - with_rest(log_q, ids)[..., -1:]
        kl_terms = log_q.exp() + torch.where(outside > 0, log_q + gap, log_p).exp()
    else:
        kl_terms = log_q.exp() + log_p.exp()
    return terms + alpha * kl_terms / temperature


def check_gradient(loss: Loss, groups: ProcessGroups, **settings: Any) -> None:
    """Compare d loss / d logits with fp64's on the whole vocabulary, element by element."""
    student, teacher, labels, upstream = inputs()
    logits = part(student, groups).requires_grad_()
    loss(logits, part(teacher, groups), labels, groups, **settings).backward(upstream)
    assert logits.grad is not None

    student.requires_grad_()
    formula(student, teacher, labels, **settings).mixed.backward(upstream.double())
    assert student.grad is not None
    unit = size_of_terms(student, teacher, labels, settings) * upstream.double().abs()[..., None]
    unit = part(unit, groups)
    expected = part(student.grad.double(), groups)
    assert_close(logits.grad / unit, expected / unit, f"gradient, {settings}", TOLERANCE)


CASES = [
    {"alpha": alpha, "temperature": temperature, **how}
    for alpha, temperature, how in itertools.product(
        (0.3, 1.0),
        (1.0, 2.0),
        ({"direction": "forward"}, {"direction": "reverse"}, {"top_k": 5}, {"top_k": 60}),
    )
]


@everywhere(1, 2, 4)
def test_values_and_gradients_are_the_formulas(groups: ProcessGroups, config: Config) -> None:
    student, teacher, labels, _ = inputs()
    for settings in CASES:
        got, _ = losses_and_gradient(student, teacher, groups, acceptance=True, **settings)
        expected = formula(student, teacher, labels, **settings)
        for name, value in vars(got).items():
            assert value.dtype == torch.float32 and value.shape == labels.shape
            assert_close(value, getattr(expected, name), f"{name}, {settings}")
        check_gradient(ours, groups, **settings)


@everywhere(1, 2, 4)
def test_a_model_learns_exactly_nothing_from_itself(groups: ProcessGroups, config: Config) -> None:
    hows = {"direction": "forward"}, {"direction": "reverse"}, {"top_k": 5}
    for dtype, temperature, how in itertools.product(
        (torch.float32, torch.bfloat16), (1.0, 2.0), hows
    ):
        student = inputs()[0].to(dtype)
        settings = {"alpha": 1.0, "temperature": temperature, **how}
        losses, gradient = losses_and_gradient(student, student, groups, **settings)
        assert_equal(losses.kl, torch.zeros(SHAPE[:2]), f"KL, {settings}")
        assert_equal(losses.mixed, torch.zeros(SHAPE[:2]), f"loss, {settings}")
        assert_equal(gradient, torch.zeros_like(gradient), f"gradient, {settings}")
        assert_equal(losses.cross_entropy, losses.teacher_cross_entropy)


@everywhere(1, 2, 4)
def test_chunks_change_nothing(groups: ProcessGroups, config: Config) -> None:
    student, teacher, _, _ = inputs()
    for how in ({"direction": "reverse"}, {"top_k": 5, "acceptance": True}):
        for dtype, temperature in itertools.product((torch.float32, torch.bfloat16), (1.0, 2.0)):
            results = [
                losses_and_gradient(
                    student.to(dtype),
                    teacher.to(dtype),
                    groups,
                    alpha=0.3,
                    temperature=temperature,
                    token_chunk=chunk,
                    **how,
                )
                for chunk in (512, 7, 5, 1)  # of 21 tokens: 7 divides, 5 leaves one
            ]
            whole, whole_gradient = results[0]
            for losses, gradient in results[1:]:
                for name, value in vars(whole).items():
                    if value is not None:
                        assert_equal(getattr(losses, name), value, name)
                assert_equal(gradient, whole_gradient, "gradient")


@everywhere(1, 2, 4)
def test_all_ranks_have_the_same_losses(groups: ProcessGroups, config: Config) -> None:
    student, teacher, _, _ = inputs()
    losses, _ = losses_and_gradient(student, teacher, groups, alpha=0.3, top_k=5, acceptance=True)
    for name, value in vars(losses).items():
        first = value.detach().clone()
        dist.broadcast(first, 0, group=groups.tp)
        assert_equal(value, first, name)


@everywhere(2)
def test_inputs_are_left_alone(groups: ProcessGroups, config: Config) -> None:
    student, teacher, labels, upstream = inputs()
    for dtype, direction in itertools.product(
        (torch.float32, torch.bfloat16), ("forward", "reverse")
    ):
        given = [part(student, groups).to(dtype), part(teacher, groups).to(dtype), labels, upstream]
        before = [x.clone() for x in given]
        logits, teacher_logits = given[0].requires_grad_(), given[1].requires_grad_()
        how = {"temperature": 2.0, "direction": direction, "acceptance": True}
        losses = distillation_losses(logits, teacher_logits, labels, groups.tp, alpha=0.3, **how)
        losses.mixed.backward(upstream)
        for x, then in zip(given, before, strict=True):
            assert_equal(x.detach(), then)
        assert logits.grad is not None and logits.grad.dtype == dtype
        assert teacher_logits.grad is None
        assert [name for name, x in vars(losses).items() if x.requires_grad] == ["mixed"]


@everywhere(1)
def test_a_second_backward_is_refused(groups: ProcessGroups, config: Config) -> None:
    student, teacher, labels, upstream = inputs()
    student.requires_grad_()
    mixed = ours(student, teacher, labels, groups, alpha=0.3)
    mixed.backward(upstream, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mixed.backward(upstream)


@everywhere(2)
def test_bf16_is_worked_in_fp32_and_rounded_twice(groups: ProcessGroups, config: Config) -> None:
    """Once when forward writes the gradient, once when backward scales it."""
    student, teacher, labels, upstream = inputs()
    student, teacher = student.bfloat16(), teacher.bfloat16()

    def gradient(dtype: torch.dtype, upstream: Tensor) -> Tensor:
        logits = part(student, groups).to(dtype).requires_grad_()
        ours(logits, part(teacher, groups).to(dtype), labels, groups, alpha=0.3).backward(upstream)
        assert logits.grad is not None
        return logits.grad

    unscaled = gradient(torch.float32, torch.ones(SHAPE[:2])).bfloat16()
    expected = (unscaled.float() * upstream[..., None]).bfloat16()
    assert_equal(gradient(torch.bfloat16, upstream), expected)


@everywhere(1, 2, 4)
def test_cross_entropy_is_megatron_cores(groups: ProcessGroups, config: Config) -> None:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    student, teacher, labels, upstream = inputs()
    labels[0, 0] = -100  # on no rank
    for dtype in (torch.float32, torch.bfloat16):
        mine, theirs = (part(student, groups).to(dtype).requires_grad_() for _ in range(2))
        zs = part(teacher, groups).to(dtype)
        losses = distillation_losses(mine, zs, labels, groups.tp, alpha=0.0, temperature=2.0)
        # What megatron-core is given is an intermediate value, as in a model: it overwrites it.
        expected = vocab_parallel_cross_entropy(theirs * 1, labels)
        assert_equal(losses.cross_entropy, expected.detach(), "cross entropy")
        expected.backward(upstream)
        losses.mixed.backward(upstream)
        if dtype == torch.float32:
            assert_equal(mine.grad, theirs.grad, "gradient")


@everywhere(2)
def test_megatron_cores_cross_entropy_spoils_fp32_logits(
    groups: ProcessGroups, config: Config
) -> None:
    """Why one function computes both: after megatron-core's cross entropy it is too late for KL."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    student, _, labels, _ = inputs()
    for dtype in (torch.bfloat16, torch.float32):
        logits, teacher = part(student, groups).to(dtype), part(student, groups).to(dtype)
        vocab_parallel_cross_entropy(logits, labels)
        kl = distillation_losses(logits, teacher, labels, groups.tp, alpha=1.0).kl
        if dtype == torch.bfloat16:
            assert_equal(logits, teacher)
            assert_equal(kl, torch.zeros_like(kl))
        else:
            assert_close(logits, part(student.softmax(-1), groups), "what were logits")
            assert bool((kl > 0.1).all())


@on_ranks(2, tensor_model_parallel_size=2)
def test_logits_are_taken_as_a_model_gives_them(groups: ProcessGroups, config: Config) -> None:
    (model,) = built(groups, config)
    tokens = random_tokens(config, seed=3)
    positions = torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1)
    given, labels = (tokens[:, :-1], positions, None), tokens[:, 1:]
    logits = model(*given)
    losses = distillation_losses(logits, logits.detach(), labels, groups.tp, alpha=0.5)
    assert_equal(losses.cross_entropy, model(*given, labels=labels).detach())
    assert_equal(losses.kl, torch.zeros(labels.shape))


@everywhere(1, 2, 4)
def test_extreme_logits_stay_finite(groups: ProcessGroups, config: Config) -> None:
    """Each of 4 tokens is certain of another part of the vocabulary; and so is the teacher."""
    peaks = torch.arange(4) * 33 + 7
    student = draw(4, VOCABULARY, seed=4)
    teacher = draw(4, VOCABULARY, seed=5)
    student[range(4), peaks] = 1e4
    teacher[range(4), peaks.roll(1)] = 1e4
    student[:, 0] = -1e4
    labels = peaks.roll(2)
    for settings in CASES:
        logits = part(student, groups).requires_grad_()
        zs = part(teacher, groups)
        losses = distillation_losses(
            logits, zs, labels, groups.tp, acceptance=True, token_chunk=3, **settings
        )
        losses.mixed.sum().backward()
        z = student.clone().requires_grad_()
        expected = formula(z, teacher, labels, **settings)
        expected.mixed.sum().backward()
        for name, value in vars(losses).items():
            assert_close(value, getattr(expected, name), f"{name}, {settings}")
        assert logits.grad is not None and z.grad is not None
        # With a rest of e^-1e4 its parts are told from logits of 1e4, of which fp32 has 1e-3.
        tolerance = 1e-3 if "top_k" in settings else TOLERANCE
        assert_close(logits.grad, part(z.grad, groups), f"gradient, {settings}", tolerance)


@everywhere(1, 2, 4)
def test_small_vocabularies_and_single_tokens(groups: ProcessGroups, config: Config) -> None:
    vocabulary = 3 * groups.tp.size()
    student, teacher = draw(1, vocabulary, seed=6), draw(1, vocabulary, seed=7)
    for label in range(vocabulary):
        labels = torch.tensor([label])
        for top_k in (0, 1, 2, 4, vocabulary - 1, vocabulary, 100):
            z = part(student, groups).requires_grad_()
            settings = {"alpha": 0.3, "top_k": min(top_k, vocabulary)}
            losses = distillation_losses(
                z, part(teacher, groups), labels, groups.tp, alpha=0.3, top_k=top_k
            )
            losses.mixed.backward(torch.ones(1))
            whole = student.clone().requires_grad_()
            if settings["top_k"] == vocabulary:  # no rest: all of the vocabulary
                settings["top_k"] = 0
            expected = formula(whole, teacher, labels, **settings)
            expected.mixed.backward(torch.ones(1).double())
            assert_close(losses.mixed, expected.mixed, f"loss, {settings}")
            assert z.grad is not None and whole.grad is not None
            assert_close(z.grad, part(whole.grad, groups), f"gradient, {settings}")


@everywhere(1, 2, 4)
def test_equal_teacher_logits_are_chosen_by_index(groups: ProcessGroups, config: Config) -> None:
    """Logits of few different values: the k-th largest has equals on all ranks."""
    generator = torch.Generator().manual_seed(8)
    teacher = torch.randint(3, (6, VOCABULARY), generator=generator).float()
    teacher[0], teacher[1, :100] = 1.0, -1.0
    student, labels = draw(6, VOCABULARY, seed=9), torch.arange(6)
    for top_k, dtype in itertools.product((1, 5, 40, 100, 131), (torch.float32, torch.bfloat16)):
        logits = part(student, groups).requires_grad_()
        zs = part(teacher, groups).to(dtype)
        losses = distillation_losses(logits, zs, labels, groups.tp, alpha=1.0, top_k=top_k)
        losses.mixed.sum().backward()
        z = student.clone().requires_grad_()
        expected = formula(z, teacher, labels, alpha=1.0, top_k=top_k)
        expected.mixed.sum().backward()
        # What is in the k and what is in the rest cancel.
        assert_close(losses.kl, expected.kl, f"KL, {top_k}", TOLERANCE)
        assert logits.grad is not None and z.grad is not None
        assert_close(logits.grad, part(z.grad, groups), f"gradient, {top_k}")


class AllReduce(torch.autograd.Function):
    """A sum over ranks whose backward adds up over ranks, too, or hands its gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, differentiable: bool) -> Tensor:
        ctx.group = group if differentiable else None
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        upstream = upstream.clone()
        if ctx.group is not None:
            dist.all_reduce(upstream, group=ctx.group)
        return upstream, None, None


def of_autograd(inner: bool, outer: bool) -> Loss:
    """KL as autograd differentiates it, with two sums over ranks: differentiable ones, or identity.

    The partition function (inner) is used by each rank in terms of its own, so its backward must
    add up over ranks; the loss (outer) is whole on each rank, so its must not.
    """

    def loss(z: Tensor, zt: Tensor, labels: Tensor, groups: ProcessGroups, alpha: float) -> Tensor:
        log_q, log_p = (
            x - AllReduce.apply(x.exp().sum(-1, keepdim=True), groups.tp, inner).log()
            for x in (z, zt)
        )
        own = (log_p.exp() * (log_p - log_q)).sum(-1)
        return alpha * AllReduce.apply(own, groups.tp, outer)

    return loss


def renormalised(
    z: Tensor, zt: Tensor, labels: Tensor, groups: ProcessGroups, alpha: float
) -> Tensor:
    log_q, log_p = z.log_softmax(-1), zt.log_softmax(-1)
    return alpha * AllReduce.apply((log_p.exp() * (log_p - log_q)).sum(-1), groups.tp, False)


@everywhere(1, 2, 4)
def test_known_mistakes_are_caught(groups: ProcessGroups, config: Config) -> None:
    """Of losses over a split vocabulary, all right at TP 1, most in their value at any TP."""
    check_gradient(of_autograd(inner=True, outer=False), groups, alpha=1.0)
    mistakes = {
        "gradient times t": of_autograd(inner=True, outer=True),
        "identity for the partition function": of_autograd(inner=False, outer=False),
        "softmax of each rank": renormalised,
    }
    for name, loss in mistakes.items():
        if groups.tp.size() == 1:
            check_gradient(loss, groups, alpha=1.0)
            continue
        try:
            check_gradient(loss, groups, alpha=1.0)
        except AssertionError:
            continue
        raise AssertionError(f"not caught: {name}")


@everywhere(1)
def test_what_makes_no_sense_is_refused(groups: ProcessGroups, config: Config) -> None:
    student, teacher, labels, _ = inputs()
    with pytest.raises(ValueError, match="direction=reverse"):
        ours(student, teacher, labels, groups, alpha=1.0, top_k=3, direction="reverse")
    with pytest.raises(ValueError, match="forward or reverse"):
        ours(student, teacher, labels, groups, alpha=1.0, direction="both")
