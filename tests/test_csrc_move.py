"""Units reach their places bit for bit, by the C++ extension and by PyTorch."""

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

from megatron_idea.config import ModelConfig, ParallelConfig
from megatron_idea.prune import relocate as module
from megatron_idea.prune.axis import Share, shares_of
from megatron_idea.prune.relocate import Relocation, move, relocate
from megatron_idea.shape import Shape
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


# 8 is the block in which slices are taken: below, at, above, and several of them.
OUTER = (1, 5, 8, 9, 33, 64)


@given(
    outer=st.sampled_from(OUTER),
    n=st.integers(1, 40),
    stride=st.sampled_from((1, 2, 3, 16, 70)),
    dtype=st.sampled_from(DTYPES),
    index=st.lists(st.integers(0, 39), max_size=60),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None)
def test_gather_and_pack_take_all_that_a_unit_owns(
    implementation: None,
    outer: int,
    n: int,
    stride: int,
    dtype: torch.dtype,
    index: list[int],
    seed: int,
) -> None:
    units = as_bits(random_bits((outer, n, stride), dtype, seed))
    wanted = torch.tensor([i % n for i in index] or [0])
    expected = torch.stack([units[:, u] for u in wanted.tolist()])

    gathered = module._gather(units, wanted)
    assert torch.equal(gathered.transpose(0, 1), expected) and gathered.is_contiguous()

    message = torch.full((len(wanted), expected[0].nbytes), 0xA5, dtype=torch.uint8)
    module._pack(units, wanted, message)
    assert torch.equal(message.view(-1), expected.view(torch.uint8).view(-1))

    places = torch.randperm(len(wanted) + 3)
    to = as_bits(random_bits((outer, len(places), stride), dtype, seed + 1))
    after = to.clone()
    for place, unit in zip(places[:-3].tolist(), expected, strict=True):
        after[:, place] = unit
    module._unpack(message, places[:-3], to)
    assert torch.equal(to, after), "and what is not named stays"


def byte_array(*shape: int) -> Any:
    return torch.zeros(shape, dtype=torch.uint8).numpy()


def frozen(array: Any) -> Any:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


@pytest.mark.parametrize("bad", [-1, 3, 2**31, 2**32, 2**63 - 1, -(2**63)])
def test_the_binding_refuses_every_index_out_of_bounds(bad: int) -> None:
    needs_extension()
    from megatron_idea import _C

    tensor, out, message = byte_array(6, 3, 20), byte_array(6, 2, 20), byte_array(2, 6, 20)
    index = torch.tensor([0, bad]).numpy()
    for array in (tensor, message):
        array.fill(1)
    for call in (
        lambda: _C.gather(tensor, index, out),
        lambda: _C.pack(tensor, index, message),
        lambda: _C.unpack(message * 2, index, tensor),
    ):
        with pytest.raises(ValueError, match=r"is no unit of 3"):
            call()
    assert not out.any() and (message == 1).all() and (tensor == 1).all(), "nothing was written"


def bad_calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Function, complaint, arguments."""
    tensor, index = byte_array(6, 3, 20), torch.tensor([0, 2]).numpy()
    out, message = byte_array(6, 2, 20), byte_array(2, 6, 20)
    for wrong, complaint in (
        (byte_array(6, 3, 20), r"to is \[6, 3, 20\], not \[6, 2, 20\]"),
        (byte_array(5, 2, 20), r"to is \[5, 2, 20\], not"),
        (byte_array(6, 2, 19), r"to is \[6, 2, 19\], not"),
        (byte_array(240), r"to is \[240\], not"),
        (frozen(out), "read-only"),
        (tensor[:, :2], "incompatible"),
        (tensor.reshape(-1)[:240].reshape(6, 2, 20), "overlap"),
        (tensor.reshape(-1)[120:].reshape(6, 2, 20), "overlap"),
    ):
        yield "gather", complaint, (tensor, index, wrong)
    for wrong, complaint in (
        (tensor[0], r"a tensor is \[outer, units, slice\]"),
        (tensor.view("int32"), "incompatible"),
        (tensor[:, ::-1], "incompatible"),
        (byte_array(6, 0, 20), "no unit of 0"),
        (byte_array(5, 3, 20), r"message is \[2, 6, 20\], not \[2, 5, 20\]"),
    ):
        yield "pack", complaint, (wrong, index, message)
        yield "unpack", complaint, (message, index, wrong)
    for wrong, complaint in (
        (byte_array(1, 6, 20), r"message is \[1, 6, 20\], not \[2, 6, 20\]"),
        (byte_array(6, 2, 20), r"message is \[6, 2, 20\], not \[2, 6, 20\]"),
        (byte_array(240), r"message is \[240\], not"),
        (byte_array(2, 6, 40)[:, :, ::2], "incompatible"),
    ):
        yield "pack", complaint, (tensor, index, wrong)
        yield "unpack", complaint, (wrong, index, tensor)
    yield "pack", "read-only", (tensor, index, frozen(message))
    yield "unpack", "read-only", (message, index, frozen(tensor))
    yield "pack", "overlap", (tensor, index, tensor.reshape(-1)[:240].reshape(2, 6, 20))
    yield "unpack", "overlap", (tensor.reshape(-1)[120:].reshape(2, 6, 20), index, tensor)
    yield "pack", "incompatible", (tensor, index.astype("int32"), message)
    yield "pack", "incompatible", (tensor, index.astype("float64"), message)
    yield "pack", "one dimension", (tensor, index.reshape(1, 2), message)


@pytest.mark.parametrize(
    ("function", "complaint", "arguments"),
    [pytest.param(*case, id=f"{case[0]}: {case[1]}") for case in bad_calls()],
)
def test_the_binding_refuses_arrays_that_do_not_fit(
    function: str, complaint: str, arguments: tuple[Any, ...]
) -> None:
    needs_extension()
    from megatron_idea import _C

    with pytest.raises((ValueError, TypeError), match=complaint):
        getattr(_C, function)(*arguments)


def test_a_listed_index_may_lie_at_any_address() -> None:
    needs_extension()
    from megatron_idea import _C

    index = torch.zeros(17, dtype=torch.uint8).numpy()[1:].view("int64")
    index[:] = 2, 0
    tensor, out = torch.arange(6, dtype=torch.uint8).view(2, 3, 1).numpy(), byte_array(2, 2, 1)
    _C.gather(tensor, index, out)
    assert out.ravel().tolist() == [2, 0, 5, 3]


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
    parts = torch.tensor(list(module._chunks(table, limit))).view(-1, tp, tp)
    assert torch.equal(parts.sum(0), torch.tensor(table))
    assert all(bool(part.any()) for part in parts)
    in_transit = parts.sum(1) + parts.sum(2)
    assert not len(parts) or int(in_transit.max()) <= limit


# As many neurons as KV groups, so that the same survivors serve both.
UNITS, HIDDEN, HEADS, KV = 12, 5, 2, 2
TENSORS = {  # and how many weights a unit has in them
    "mlp.linear_fc1.weight": 2 * HIDDEN,
    "mlp.linear_fc2.weight": HIDDEN,
    "self_attention.linear_qkv.weight": (HEADS + 2) * KV * HIDDEN,
    "self_attention.linear_proj.weight": HIDDEN * HEADS * KV,
}


def split_share(tensor: str, tp: int) -> Share:
    """The share of a tensor's neurons or KV groups on one of ``tp`` ranks."""
    model = ModelConfig(
        num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=UNITS * tp, num_query_groups=UNITS * tp,
        num_attention_heads=HEADS * UNITS * tp, kv_channels=KV, vocab_size=8,
    )  # fmt: skip
    shares = shares_of(f"decoder.layers.0.{tensor}", model, Shape.full(model), tp)
    (share,) = (s for s in shares if s.axis in ("ffn_hidden_size", "num_query_groups"))
    return share


def laid_out(tensor: str, units: torch.Tensor) -> torch.Tensor:
    """[states, numel] of a tensor whose units are [u, states, weights], put together by hand."""
    u, states = units.shape[:2]
    if tensor == "mlp.linear_fc1.weight":
        gates = [units[i, :, :HIDDEN] for i in range(u)]
        ups = [units[i, :, HIDDEN:] for i in range(u)]
        return torch.cat([*gates, *ups], dim=1)
    if tensor == "self_attention.linear_qkv.weight":
        return torch.cat([units[i] for i in range(u)], dim=1)
    # Columns of [H, ...]: one of linear_fc2, those of all heads of a group of linear_proj.
    blocks = [units[i].view(states, HIDDEN, -1) for i in range(u)]
    return torch.cat(blocks, dim=2).flatten(1)


class Alone:
    """A group of one: nothing may be sent."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


@pytest.mark.parametrize("tensor", TENSORS)
def test_one_rank_sends_nothing_and_leaves_its_tensor_alone(
    tensor: str, implementation: None
) -> None:
    units = random_bits((UNITS, 3, TENSORS[tensor]), torch.float32, 0)
    whole = laid_out(tensor, units)
    before = as_bits(whole).clone()
    ids = torch.arange(UNITS).flip(0)
    keep = ids % 3 != 0
    for placement, order in (
        ("min", keep.nonzero().view(-1)),
        ("ordered", keep.nonzero().view(-1).flip(0)),
    ):
        relocation = relocate([ids], [keep], placement)
        moved = move(whole, split_share(tensor, 1), relocation, Alone())
        assert moved.dtype == torch.float32
        assert torch.equal(as_bits(moved), as_bits(laid_out(tensor, units[order])))
        moved.fill_(0.0)
        assert torch.equal(as_bits(whole), before)


def test_a_part_of_a_buffer_that_wants_gradients_can_be_moved(implementation: None) -> None:
    tensor = "mlp.linear_fc2.weight"
    units = torch.randn(UNITS, 3, HIDDEN)
    buffer = torch.cat([torch.zeros(7), laid_out(tensor, units).flatten()]).requires_grad_()
    relocation = relocate([torch.arange(UNITS)], [torch.arange(UNITS) > 5], "min")
    moved = move(buffer[7:].view(3, -1), split_share(tensor, 1), relocation, Alone())
    assert torch.equal(moved, laid_out(tensor, units[6:]))
    assert not moved.requires_grad


def test_a_tensor_of_another_share_is_refused() -> None:
    share, relocation = split_share("mlp.linear_fc2.weight", 1), Relocation([torch.zeros(1, 2)])
    with pytest.raises(AssertionError, match=r"Share.* of torch.Size\(\[3, 59\]\)"):
        move(torch.zeros(3, UNITS * HIDDEN - 1), share, relocation, Alone())
    with pytest.raises(AssertionError, match="another number of ranks"):
        move(torch.zeros(3, UNITS * HIDDEN), share, Relocation([]), Alone())


DISTRIBUTED = (
    ("mlp.linear_fc1.weight", 3, torch.float32),
    ("mlp.linear_fc1.weight", 1, torch.bfloat16),
    ("mlp.linear_fc2.weight", 3, torch.float32),
    ("mlp.linear_fc2.weight", 1, torch.int8),
    ("self_attention.linear_qkv.weight", 3, torch.float32),
    ("self_attention.linear_proj.weight", 3, torch.float32),
)


def survivors(tp: int) -> dict[str, torch.Tensor]:
    """[tp, UNITS] masks whose total the ranks can share."""
    generator = torch.Generator().manual_seed(tp)
    random = torch.rand(tp, UNITS, generator=generator).argsort().argsort()
    first, last = torch.arange(tp)[:, None] == 0, torch.arange(tp)[:, None] == tp - 1
    masks = {
        "the same number everywhere": random < 5,
        "all on the first rank": first.expand(tp, UNITS),
        "all on the last rank": last.expand(tp, UNITS),
        "none on the first rank": ~first & (random < tp),
        "nobody leaves": random < UNITS,
        "one each": random < 1,
    }
    return {name: mask for name, mask in masks.items() if mask.any()}


def way_job(rendezvous: str, tp: int, modes: list[str]) -> list[tuple[Any, ...]]:
    """Per case: its name, the ids that this rank holds, whether their bits are right, traffic."""
    from megatron_idea.engine.distributed import start_distributed, stop_distributed

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
        ids = torch.randperm(64, generator=generator)[: UNITS * tp].view(tp, UNITS)
        me = groups.tp.rank()
        for mode, (name, keep), placement, (tensor, n, dtype) in itertools.product(
            modes, survivors(tp).items(), ("min", "ordered"), DISTRIBUTED
        ):
            units = random_bits((64, n, TENSORS[tensor]), dtype, n)
            whole, share = laid_out(tensor, units[ids[me]]), split_share(tensor, tp)
            unit_bytes = units[0].nbytes
            for limit in (1, 3 * unit_bytes, module.CHUNK_BYTES):
                with using(mode):
                    relocation = relocate(list(ids), list(keep), placement)
                    sizes.clear()
                    moved = move(whole, share, relocation, groups.tp, limit)
                source = relocation.sources[me]
                now = ids[source[:, 0], source[:, 1]]
                expected = as_bits(laid_out(tensor, units[now]))
                right = torch.equal(as_bits(moved), expected) and moved.dtype == dtype
                allowed = max(limit, unit_bytes)
                crossed = sum(sizes) // unit_bytes
                out.append(
                    ((mode, name, placement, tensor, n, limit), now.tolist(), right, len(sizes),
                     max(sizes, default=0) <= allowed, crossed, relocation.moved)
                )  # fmt: skip
        return out
    finally:
        dist.all_to_all_single = original
        stop_distributed()


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_units_travel_bit_for_bit_in_bounded_chunks(tp: int, workers: Workers) -> None:
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
        if case[-1] == module.CHUNK_BYTES:
            assert calls <= 1
        ids = [c[1] for c in cases]
        assert len(set(map(len, ids))) == 1
        assert found.setdefault(tuple(case), ids) == ids, f"{mode} differs from the other"
