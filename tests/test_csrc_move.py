"""Neurons reach their places bit for bit, by the C++ extension and by PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from extension import each_implementation as each_implementation
from extension import needs_extension, using
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idea.config import ParallelConfig
from megatron_idea.prune import moves
from megatron_idea.prune.moves import Relocation, move_ffn, relocate
from megatron_idea.testing import Workers

DTYPES = (torch.float8_e4m3fn, torch.bool, torch.bfloat16, torch.float32, torch.float64)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECIAL = {  # NaN with a payload, -0, the smallest number above 0, infinity
    torch.bfloat16: (0x7FC1, -(2**15), 1, 0x7F80),
    torch.float32: (0x7FC00001, -(2**31), 1, 0x7F800000),
    torch.float64: (0x7FF8000000000001, -(2**63), 1, 0x7FF0000000000000),
}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any pattern, not numbers only."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    bits = data.view(BITS[dtype.itemsize]).squeeze(-1)
    for at, special in enumerate(SPECIAL.get(dtype, ())):
        bits.view(-1)[at::7] = special
    return bits.view(dtype)


def as_bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(BITS[x.element_size()])


def owned(fc1: torch.Tensor, fc2: torch.Tensor) -> torch.Tensor:
    """[f, n, 3, H] bits: gate row, up row and down column of every neuron, by definition."""
    f = fc2.shape[2]
    gate, up = as_bits(fc1)[:, :f], as_bits(fc1)[:, f:]
    neurons = torch.stack([gate, up, as_bits(fc2).transpose(1, 2)], dim=2)
    return neurons.transpose(0, 1).contiguous()


def ffn_of(neurons: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The fc1 and fc2 that own these [f, n, 3, H] bits."""
    gate, up, down = neurons.transpose(0, 1).unbind(2)
    fc2 = down.transpose(1, 2).contiguous().view(dtype)
    return torch.cat([gate, up], dim=1).contiguous().view(dtype), fc2


# ------------------------------------------------------------------------------------ copies

# 8 is the block in which columns are turned: below, at, above, and several of them.
HIDDEN = (1, 5, 8, 9, 33, 64)


@given(
    n=st.integers(1, 4),
    f=st.integers(1, 40),
    hidden=st.sampled_from(HIDDEN),
    dtype=st.sampled_from(DTYPES),
    index=st.lists(st.integers(0, 39), max_size=60),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None)
def test_gather_and_pack_take_all_that_a_neuron_owns(
    implementation: None,
    n: int,
    f: int,
    hidden: int,
    dtype: torch.dtype,
    index: list[int],
    seed: int,
) -> None:
    fc1 = random_bits((n, 2 * f, hidden), dtype, seed)
    fc2 = random_bits((n, hidden, f), dtype, seed + 1)
    wanted = torch.tensor([i % f for i in index] or [0])
    expected = owned(fc1, fc2)[wanted]

    new1, new2 = moves._gather(as_bits(fc1), as_bits(fc2), wanted)
    assert torch.equal(owned(new1, new2), expected)
    assert new1.is_contiguous() and new2.is_contiguous()

    message = torch.full((len(wanted), expected[0].nbytes), 0xA5, dtype=torch.uint8)
    moves._pack(as_bits(fc1), as_bits(fc2), wanted, message)
    assert torch.equal(message.view(-1), expected.view(torch.uint8).view(-1))

    places = torch.randperm(len(wanted) + 3)
    to1 = random_bits((n, 2 * len(places), hidden), dtype, seed + 2)
    to2 = random_bits((n, hidden, len(places)), dtype, seed + 3)
    after = owned(to1, to2)
    after[places[:-3]] = expected
    moves._unpack(message, places[:-3], as_bits(to1), as_bits(to2))
    assert torch.equal(owned(to1, to2), after), "and what is not named stays"


def byte_arrays(n: int, f: int, hidden: int, e: int = 4) -> tuple[Any, Any]:
    fc1 = torch.zeros(n, 2 * f, hidden * e, dtype=torch.uint8)
    return fc1.numpy(), torch.zeros(n, hidden, f * e, dtype=torch.uint8).numpy()


def frozen(array: Any) -> Any:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


@pytest.mark.parametrize("bad", [-1, 3, 2**31, 2**32, 2**63 - 1, -(2**63)])
def test_the_binding_refuses_every_index_out_of_bounds(bad: int) -> None:
    needs_extension()
    from megatron_idea import _C

    fc1, fc2 = byte_arrays(2, 3, 5)
    out1, out2 = byte_arrays(2, 2, 5)
    message = torch.zeros(2 * 2 * 3 * 5 * 4, dtype=torch.uint8).numpy()
    index = torch.tensor([0, bad]).numpy()
    for array in (fc1, fc2, message):
        array.fill(1)
    for call in (
        lambda: _C.gather(fc1, fc2, index, out1, out2),
        lambda: _C.pack(fc1, fc2, index, out1.reshape(-1)[:0]),
        lambda: _C.pack(fc1, fc2, index, message),
        lambda: _C.unpack(message * 2, index, fc1, fc2),
    ):
        with pytest.raises(ValueError, match=r"is no neuron of 3|message has 0 bytes"):
            call()
    assert not out1.any() and not out2.any(), "nothing was written"
    assert (message == 1).all() and (fc1 == 1).all() and (fc2 == 1).all()


def bad_calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Function, complaint, arguments."""
    fc1, fc2 = byte_arrays(2, 3, 5)
    out1, out2 = byte_arrays(2, 2, 5)
    index = torch.tensor([0, 2]).numpy()
    message = torch.zeros(2 * 2 * 3 * 5 * 4, dtype=torch.uint8).numpy()
    for wrong, complaint in (
        (byte_arrays(2, 3, 6), "shapes of source, index and destination"),
        (byte_arrays(1, 2, 5), "shapes of source, index and destination"),
        (byte_arrays(2, 2, 5, 8), "shapes of source, index and destination"),
        ((frozen(out1), out2), "fc1_out is read-only"),
        ((out1, frozen(out2)), "fc2_out is read-only"),
        ((fc1[:, :4], out2), "fc1_out is not contiguous"),
        ((out1, fc2.reshape(-1)[: out2.size].reshape(out2.shape)), "fc2_out overlaps fc2"),
        ((out1, out1.reshape(-1)[: out2.size].reshape(out2.shape)), "overlaps"),
    ):
        yield "gather", complaint, (fc1, fc2, index, *wrong)
    for pair, complaint in (
        ((fc1, fc2[:1]), "shapes of one FFN"),
        ((fc1[:, :4].copy(), fc2), "shapes of one FFN"),
        ((fc1[:, :5].copy(), fc2), "shapes of one FFN"),
        ((fc1[:0], fc2[:0]), "are empty"),
        (byte_arrays(2, 0, 5), "are empty"),
        (byte_arrays(2, 3, 5, 3), "do not agree on the hidden size"),
        (byte_arrays(2, 3, 5, 0), "do not agree on the hidden size"),
        ((fc1[0], fc2), "fc1 has 2 dimensions, not 3"),
        ((fc1.view("int32"), fc2), "fc1 has items of 4 bytes, not 1"),
        ((fc1, fc2[:, ::-1]), "fc2 is not contiguous"),
    ):
        yield "pack", complaint, (*pair, index, message)
        yield "unpack", complaint, (message, index, *pair)
    for wrong, complaint in (
        (message[:-1], "message has 239 bytes for 2 neurons of 120"),
        (message[:120], "message has 120 bytes for 2 neurons of 120"),
        (message[::2], "message is not contiguous"),
        (message.reshape(2, -1), "message has 2 dimensions"),
    ):
        yield "pack", complaint, (fc1, fc2, index, wrong)
        yield "unpack", complaint, (wrong, index, fc1, fc2)
    yield "pack", "message is read-only", (fc1, fc2, index, frozen(message))
    yield "pack", "message overlaps fc1", (fc1, fc2, index, fc1.reshape(-1))
    yield "unpack", "fc2 overlaps message", (fc2.reshape(-1)[:120], index[:1], fc1, fc2)
    yield "pack", "index has items of 4 bytes", (fc1, fc2, index.astype("int32"), message)
    yield "pack", "index is not int64", (fc1, fc2, index.astype("float64"), message)


@pytest.mark.parametrize(
    ("function", "complaint", "arguments"),
    [pytest.param(*case, id=f"{case[0]}: {case[1]}") for case in bad_calls()],
)
def test_the_binding_refuses_what_is_no_ffn(
    function: str, complaint: str, arguments: tuple[Any, ...]
) -> None:
    needs_extension()
    from megatron_idea import _C

    with pytest.raises(ValueError, match=complaint):
        getattr(_C, function)(*arguments)


# ------------------------------------------------------------------------------------ chunks


@given(
    table=st.integers(1, 6).flatmap(
        lambda tp: st.lists(
            st.lists(st.integers(0, 30), min_size=tp, max_size=tp), min_size=tp, max_size=tp
        )
    ),
    limit=st.integers(1, 40),
)
@settings(deadline=None)
def test_chunks_hold_every_move_once_and_no_rank_more_than_the_limit(
    table: list[list[int]], limit: int
) -> None:
    tp = len(table)
    table = [[0 if s == d else table[s][d] for d in range(tp)] for s in range(tp)]
    parts = torch.tensor(list(moves._chunks(table, limit))).view(-1, tp, tp)
    assert torch.equal(parts.sum(0), torch.tensor(table))
    assert all(bool(part.any()) for part in parts)
    in_transit = parts.sum(1) + parts.sum(2)
    assert not len(parts) or int(in_transit.max()) <= limit


# --------------------------------------------------------------------------------- the way there


class Alone:
    """A group of one: nothing may be sent."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def test_one_rank_sends_nothing_and_leaves_its_tensors_alone(implementation: None) -> None:
    fc1, fc2 = random_bits((3, 10, 7), torch.float32, 0), random_bits((3, 7, 5), torch.float32, 1)
    before = owned(fc1, fc2)
    ids, keep = torch.tensor([4, 0, 3, 1, 2]), torch.tensor([True, False, True, True, True])
    for placement, order in (("min", [0, 2, 3, 4]), ("ordered", [3, 4, 2, 0])):
        new1, new2 = move_ffn(fc1, fc2, relocate([ids], [keep], placement), Alone())
        assert new1.dtype == new2.dtype == torch.float32
        assert torch.equal(owned(new1, new2), before[order])
        new1.fill_(0.0), new2.fill_(0.0)
        assert torch.equal(owned(fc1, fc2), before)


def test_parameters_and_halves_of_one_buffer_can_be_moved(implementation: None) -> None:
    buffer = torch.randn(3 * 3 * 4 * 6, requires_grad=True)
    fc1, fc2 = (x.view(3, -1) for x in buffer.split([3 * 2 * 4 * 6, 3 * 4 * 6]))
    fc1, fc2 = fc1.view(3, 8, 6), fc2.view(3, 6, 4)
    relocation = relocate([torch.arange(4)], [torch.tensor([True, False, True, True])], "min")
    new1, new2 = move_ffn(fc1, fc2, relocation, Alone())
    assert torch.equal(owned(new1, new2), owned(fc1, fc2)[[0, 2, 3]])
    assert not new1.requires_grad


@pytest.mark.parametrize(
    ("fc1", "fc2", "complaint"),
    [
        (torch.zeros(1, 5, 4, 1).squeeze(-1), torch.zeros(1, 4, 2), "not of one FFN"),
        (torch.zeros(2, 4, 4), torch.zeros(1, 4, 2), "not of one FFN"),
        (torch.zeros(1, 4, 4).transpose(1, 2), torch.zeros(1, 4, 2), "contiguous"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 2, 4).transpose(1, 2), "contiguous"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 4, 2).bfloat16(), "differ in kind"),
        (torch.zeros(1, 0, 4), torch.zeros(1, 4, 0), "has no neuron"),
    ],
)
def test_what_is_no_ffn_is_refused(fc1: torch.Tensor, fc2: torch.Tensor, complaint: str) -> None:
    relocation = Relocation([torch.tensor([[0, 0]])])
    with pytest.raises(AssertionError, match=complaint):
        move_ffn(fc1, fc2, relocation, Alone())
    with pytest.raises(AssertionError, match="another number of ranks"):
        move_ffn(torch.zeros(1, 4, 4), torch.zeros(1, 4, 2), Relocation([]), Alone())


WIDTH, NEURON_HIDDEN = 12, 5
DISTRIBUTED = ((3, torch.float32), (1, torch.bfloat16), (2, torch.float64), (1, torch.int8))


def survivors(tp: int) -> dict[str, torch.Tensor]:
    """[tp, WIDTH] masks whose total the ranks can share."""
    generator = torch.Generator().manual_seed(tp)
    random = torch.rand(tp, WIDTH, generator=generator).argsort().argsort()
    first, last = torch.arange(tp)[:, None] == 0, torch.arange(tp)[:, None] == tp - 1
    masks = {
        "the same number everywhere": random < 5,
        "all on the first rank": first.expand(tp, WIDTH),
        "all on the last rank": last.expand(tp, WIDTH),
        "none on the first rank": ~first & (random < tp),
        "nobody leaves": random < WIDTH,
        "one each": random < 1,
    }
    return {name: mask for name, mask in masks.items() if mask.any()}


def way_job(rendezvous: str, tp: int, modes: list[str]) -> list[tuple[Any, ...]]:
    """Per case: its name, the ids that this rank holds, whether their bits are right, traffic."""
    from megatron_idea.distributed import start_distributed, stop_distributed

    groups = start_distributed(ParallelConfig(tensor_model_parallel_size=tp), 1, rendezvous)
    sizes: list[int] = []
    original = dist.all_to_all_single

    def counted(output: torch.Tensor, given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert output.dtype == given.dtype == torch.uint8
        sizes.append(output.nbytes + given.nbytes)
        return original(output, given, *args, **kwargs)

    try:
        dist.all_to_all_single = counted
        out = []
        generator = torch.Generator().manual_seed(7)
        ids = torch.randperm(64, generator=generator)[: WIDTH * tp].view(tp, WIDTH)
        me = groups.tp.rank()
        for mode, (name, keep), placement, (n, dtype) in itertools.product(
            modes, survivors(tp).items(), ("min", "ordered"), DISTRIBUTED
        ):
            neuron_bytes = n * 3 * NEURON_HIDDEN * dtype.itemsize
            bits = as_bits(random_bits((64, n, 3, NEURON_HIDDEN), dtype, n))
            fc1, fc2 = ffn_of(bits[ids[me]], dtype)
            for limit in (1, 3 * neuron_bytes, moves.CHUNK_BYTES):
                with using(mode):
                    relocation = relocate(list(ids), list(keep), placement)
                    sizes.clear()
                    new1, new2 = move_ffn(fc1, fc2, relocation, groups.tp, limit)
                source = relocation.sources[me]
                now = ids[source[:, 0], source[:, 1]]
                right = torch.equal(owned(new1, new2), bits[now]) and new1.dtype == dtype
                allowed = max(limit, neuron_bytes)
                crossed = sum(sizes) // neuron_bytes
                out.append(
                    ((mode, name, placement, n, limit), now.tolist(), right, len(sizes),
                     max(sizes, default=0) <= allowed, crossed, relocation.moved)
                )  # fmt: skip
        return out
    finally:
        dist.all_to_all_single = original
        stop_distributed()


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_neurons_travel_bit_for_bit_in_bounded_chunks(tp: int, workers: Workers) -> None:
    needs_extension()
    by_rank = workers.run(way_job, tp, tp, ["off", "require"])
    found: dict[Any, Any] = {}
    for cases in zip(*by_rank, strict=True):
        mode, *case = cases[0][0]
        calls, moved = cases[0][3], cases[0][6]
        for name, _, right, own_calls, bounded, _, _ in cases:
            assert right and bounded, name
            assert own_calls == calls, "ranks would wait for each other"
        assert (calls > 0) == (moved > 0), "no message where nobody leaves"
        assert sum(c[5] for c in cases) == 2 * moved, "each mover is sent once, received once"
        if case[-1] == moves.CHUNK_BYTES:
            assert calls <= 1
        ids = [c[1] for c in cases]
        assert len(set(map(len, ids))) == 1
        assert found.setdefault(tuple(case), ids) == ids, f"{mode} differs from the other"
