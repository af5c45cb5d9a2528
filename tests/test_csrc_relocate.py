"""Both implementations place each survivor once, evenly, with the fewest moves or as at TP = 1."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from extension import each_implementation as each_implementation
from extension import needs_extension, using
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_idea
from megatron_idea.config import ConfigError
from megatron_idea.prune import relocate as module
from megatron_idea.prune.relocate import Relocation, relocate

PLACEMENTS = ("min", "ordered")
Ranks = list[torch.Tensor]


@pytest.fixture(scope="module")
def native() -> Any:
    needs_extension()
    with using("require"):
        return module.extension()


def placed_ids(ids: Ranks, relocation: Relocation) -> list[torch.Tensor]:
    """Unit ids per rank afterwards."""
    return [torch.stack(ids)[s[:, 0], s[:, 1]] for s in relocation.sources]


def check(ids: Ranks, keep: Ranks, placement: str) -> Relocation:
    """All that a relocation promises."""
    relocation = relocate(ids, keep, placement)
    placed = placed_ids(ids, relocation)
    survivors = torch.cat([i[k] for i, k in zip(ids, keep, strict=True)]).sort().values
    share = len(survivors) // len(ids)
    assert {len(p) for p in placed} == {share}
    assert all(s.dtype == torch.int64 and s.shape == (share, 2) for s in relocation.sources)
    assert torch.equal(torch.cat(placed).sort().values, survivors)
    froms = [s[:, 0].tolist() for s in relocation.sources]
    movers = [(r, d) for d, ranks in enumerate(froms) for r in ranks if r != d]
    assert relocation.moved == len(movers)
    table = Counter(movers)
    tp = range(len(ids))
    assert relocation.moves == [[table[s, d] for d in tp] for s in tp]
    if placement == "ordered":
        assert torch.equal(torch.cat(placed), survivors)
        return relocation
    assert relocation.moved == sum(max(0, int(k.sum()) - share) for k in keep)
    for rank, (k, s) in enumerate(zip(keep, relocation.sources, strict=True)):
        stayed = s[s[:, 0] == rank, 1]
        assert torch.equal(stayed, k.nonzero().view(-1)[:share]), "who stays keeps the order"
    return relocation


@functools.cache
def fewest_moves(counts: tuple[int, ...]) -> int:
    """Over all ways to assign survivors to ranks evenly."""
    home = [rank for rank, count in enumerate(counts) for _ in range(count)]
    share = len(home) // len(counts)
    return min(
        sum(h != r for h, r in zip(home, ranks, strict=True))
        for ranks in itertools.product(range(len(counts)), repeat=len(home))
        if all(n == share for n in Counter(ranks).values())
    )


@pytest.mark.parametrize(("tp", "width"), [(1, 4), (2, 4), (3, 2), (4, 2)])
def test_every_small_mask_is_placed_with_the_fewest_moves(
    tp: int, width: int, implementation: None
) -> None:
    ids = list(torch.randperm(tp * width, generator=torch.Generator().manual_seed(0)).view(tp, -1))
    for bits in itertools.product((False, True), repeat=tp * width):
        if sum(bits) == 0 or sum(bits) % tp:
            continue
        keep = list(torch.tensor(bits).view(tp, width))
        for placement in PLACEMENTS:
            moved = check(ids, keep, placement).moved
            if placement == "min":
                assert moved == fewest_moves(tuple(int(k.sum()) for k in keep))


@st.composite
def layers(draw: st.DrawFn) -> tuple[Ranks, Ranks]:
    """Up to 16 ranks with up to 1,500 units each, survivors anywhere, bunched or spread."""
    tp, width = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16])), draw(st.integers(1, 1500))
    total = tp * max(1, int(width * draw(st.sampled_from([0.0, 0.1, 0.4, 0.5, 0.9, 1.0]))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    everyone = torch.randperm(2 * tp * width, generator=generator)[: tp * width]
    order = torch.rand(tp * width, generator=generator)
    bunched = draw(st.sampled_from([0.0, 0.1, 10.0]))  # towards the first ranks
    order += bunched * torch.arange(tp).repeat_interleave(width)
    keep = torch.zeros(tp * width, dtype=torch.bool)
    keep[order.argsort()[:total]] = True
    return list(everyone.view(tp, -1)), list(keep.view(tp, -1))


@given(layer=layers(), placement=st.sampled_from(PLACEMENTS))
@settings(deadline=None, max_examples=30)
def test_large_layers_keep_every_promise(
    implementation: None, layer: tuple[Ranks, Ranks], placement: str
) -> None:
    check(*layer, placement)


@given(layer=layers(), placement=st.sampled_from(PLACEMENTS))
@settings(deadline=None, max_examples=60)
def test_the_extension_places_as_pytorch_does(
    native: Any, layer: tuple[Ranks, Ranks], placement: str
) -> None:
    placed = []
    for mode in ("off", "require"):
        with using(mode):
            placed.append(torch.cat(relocate(*layer, placement).sources))
    assert torch.equal(*placed)


def test_an_impossible_layer_is_refused(implementation: None) -> None:
    two = [torch.arange(2), torch.arange(2, 4)]
    some = [torch.tensor([True, True]), torch.tensor([True, False])]
    with pytest.raises(AssertionError, match="3 survivors cannot be split over 2 ranks"):
        relocate(two, some, "min")
    with pytest.raises(AssertionError, match="no unit survives"):
        relocate(two, [k & False for k in some], "min")
    with pytest.raises(AssertionError, match="is there twice"):
        relocate([two[0], two[0]], [k | True for k in some], "ordered")
    with pytest.raises(AssertionError, match="an id per mask bit"):
        relocate(two, [some[0], some[0][:1]], "min")
    with pytest.raises(AssertionError, match="alphabetic"):
        relocate(two, [k | True for k in some], "alphabetic")


ID, KEEP, OUT = np.arange(4), np.ones(4, bool), np.zeros((4, 2), np.int64)
READ_ONLY = OUT.copy()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("ids", "keep", "sources", "complaint"),
    [
        ([], [], OUT, "one per rank"),
        ([ID], [], OUT, "one per rank"),
        ([ID], [KEEP[:3]], OUT, "differ in length"),
        ([OUT], [KEEP], OUT, "one dimension"),
        ([ID.astype(np.int32)], [KEEP], OUT, "incompatible"),
        ([ID.astype(float)], [KEEP], OUT, "incompatible"),
        ([np.arange(8)[::2]], [KEEP], OUT, "incompatible"),
        ([np.broadcast_to(np.int64(1), (1 << 40,))], [KEEP], OUT, "incompatible"),
        ([ID], [KEEP.astype(np.int64)], OUT, "incompatible"),
        ([ID], [KEEP], OUT[:3], r"sources is \[3, 2\], not \[4, 2\]"),
        ([ID], [KEEP], OUT.reshape(2, 4), r"sources is \[2, 4\], not \[4, 2\]"),
        ([ID], [KEEP], OUT.ravel(), r"sources is \[8\], not \[4, 2\]"),
        ([ID], [KEEP], OUT.T, "incompatible"),
        ([ID], [KEEP], READ_ONLY, "read-only"),
    ],
)
def test_the_binding_refuses_what_is_no_layer(
    native: Any, ids: list[Any], keep: list[Any], sources: Any, complaint: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=complaint):
        native.relocate(ids, keep, False, sources)
    assert not OUT.any()


def test_lists_may_lie_at_any_address(native: Any) -> None:
    ids, sources = (np.zeros(8 * n + 1, np.uint8)[1:].view(np.int64) for n in (4, 8))
    ids[:] = 3, 1, 0, 2
    native.relocate([ids], [KEEP], True, sources.reshape(4, 2))
    assert sources.reshape(4, 2)[:, 1].tolist() == [2, 1, 3, 0]


@pytest.fixture()
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where csrc/ was not built."""
    monkeypatch.delattr(megatron_idea, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "megatron_idea._C", None)


def test_the_extension_is_there_where_it_is_required() -> None:
    needs_extension()
    with using("require"):
        assert module.extension() is not None
    with using("auto"):
        assert module.extension() is not None


def test_which_implementation_is_active_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    needs_extension()
    for mode, name in (("require", "C++ extension"), ("off", "PyTorch")):
        caplog.clear()
        with using(mode), caplog.at_level(logging.INFO, module.__name__):
            for _ in range(3):
                relocate([torch.arange(2)], [torch.ones(2, dtype=torch.bool)], "min")
        (record,) = caplog.records
        assert record.levelno == logging.INFO and name in record.message


def test_falling_back_to_pytorch_is_a_warning(
    without_extension: None, caplog: pytest.LogCaptureFixture
) -> None:
    with using("auto"):
        assert module.extension() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "PyTorch" in record.message


def test_a_required_extension_that_is_missing_is_a_readable_error(without_extension: None) -> None:
    with (
        using("require"),
        pytest.raises(ConfigError, match=r"'require'.* compiler at hand.*'auto'"),
    ):
        module.extension()


def test_an_illegal_switch_is_refused_when_it_is_used_not_when_it_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(module.SWITCH, "yes")
    spec = importlib.util.find_spec(module.__name__)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module.__name__, copy)
    spec.loader.exec_module(copy)
    with pytest.raises(ConfigError, match="'yes'; legal values: auto, require, off"):
        copy.extension()
