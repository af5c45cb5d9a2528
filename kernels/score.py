"""Sums over the rows or the columns of many matrices: what a unit's weights mean to the loss.

Each matrix [R, C] is a flat shard [lo, hi) of row-major weights and gradients, as the distributed
optimizer holds them. One value e(w, g, v) per weight is reduced over its row or over its column:

    abs |w g|    squared (w g)^2    signed w g    fisher |w g - w^2 v / 2|
    weight |w|, without gradients

Shapes: w_N, g_N, v_N [hi - lo]; result [R] per row, [C] per column. The kernels know nothing of
units: ``fold`` in prune/axis.py makes neurons, groups or channels of rows and columns.

Bytes at the limit, per weight: 2 (bf16) or 4 (fp32) for itself and 4 for its fp32 gradient, for
``fisher`` 4 more for v. Three kernels for all matrices, whatever their number and shapes: a table
tells each program its matrix.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_idea.kernels.dispatch import jit, launch, tl, uses_triton

ELEMENTS = ("abs", "squared", "signed", "fisher", "weight")
REDUCTIONS = ("sum", "sum_of_squares", "max")


@dataclass(frozen=True)
class MatrixShard:
    """This rank's flat part of a row-major matrix, and what is to be summed."""

    shape: tuple[int, int]
    """(R, C) of the whole matrix; a vector of n is (1, n) per column."""
    per: str
    """``row``: one result per row, [R]; ``column``: one per column, [C]."""
    w: Tensor | None = None
    """Weights lo .. lo + N of the matrix, [N]; None where the rank has none."""
    g: Tensor | None = None
    """Their gradients, [N]; element ``weight`` does without."""
    lo: int = 0
    v: Tensor | None = None
    """Diagonal of the Fisher matrix, [N]: ``fisher`` alone reads it; None stands for zeros."""

    @property
    def size(self) -> int:
        """Length of the result."""
        return self.shape[0] if self.per == "row" else self.shape[1]

    @property
    def rows(self) -> tuple[int, int]:
        """Rows [first, end) that the shard has elements of; it must have some."""
        assert self.w is not None
        columns = self.shape[1]
        return self.lo // columns, (self.lo + len(self.w) - 1) // columns + 1


@torch.no_grad()
def matrix_scores(
    shards: Sequence[MatrixShard],
    element: str = "abs",
    reduction: str = "sum",
    *,
    device: torch.device,
    implementation: str = "auto",
) -> list[Tensor]:
    """Reduce e(w, g, v) over the rows or columns of every matrix.

    Args:
        shards: all on ``device``. In Triton weights are bf16 or fp32, one dtype for all,
            gradients and v fp32; in PyTorch any floating-point dtype.
        element: of ``ELEMENTS``, as above.
        reduction: ``sum``, ``sum_of_squares`` (of e), ``max`` (not of ``signed``).
        implementation: ``auto`` (Triton on CUDA, PyTorch elsewhere), ``triton``, ``reference``.
    Returns: fp32 [R] or [C] for each matrix, 0 for rows or columns that its shard does not touch.
        Results of the shards of one matrix add up (``max``: take the maximum) to that of the whole.
    Raises: ValueError for an implementation that cannot run here.
    Cost: in Triton three kernels, up to two more where some shards are not aligned to 16 elements.
        A new set of addresses costs a copy of tables to the device: call once before capturing a
        CUDA graph.
    """
    in_triton = uses_triton("matrix_scores", implementation, device)
    _check(shards, element, reduction, device, in_triton)
    if in_triton:
        return _triton(shards, element, reduction, device)
    return [_reference(shard, element, reduction, device) for shard in shards]


def _check(
    shards: Sequence[MatrixShard], element: str, reduction: str, device: torch.device, triton: bool
) -> None:
    assert element in ELEMENTS and reduction in REDUCTIONS, (element, reduction)
    # 0, which a shard leaves where it has nothing, is not below every signed value.
    assert (element, reduction) != ("signed", "max"), "a maximum needs values of one sign"
    dtypes = set()
    for s in shards:
        assert s.per in ("row", "column"), s.per
        if s.w is None:
            continue
        read = [s.w] if element == "weight" else [s.w, s.g]
        if element == "fisher" and s.v is not None:
            read.append(s.v)
        for t in read:
            assert t is not None and t.shape == (len(s.w),), "w, g and v: flat, equally long"
            assert t.is_floating_point() and t.device == device, (t.dtype, t.device)
            assert not triton or t.is_contiguous(), t.stride()
            assert not triton or t is s.w or t.dtype == torch.float32, t.dtype
        assert 0 <= s.lo <= s.lo + len(s.w) <= math.prod(s.shape), (s.lo, len(s.w), s.shape)
        dtypes.add(s.w.dtype)
    assert not triton or (len(dtypes) <= 1 and dtypes <= {torch.bfloat16, torch.float32}), dtypes


def _reference(shard: MatrixShard, element: str, reduction: str, device: torch.device) -> Tensor:
    """The law for the kernels."""
    columns, lo = shard.shape[1], shard.lo
    out = torch.zeros(shard.size, device=device)
    if shard.w is None or len(shard.w) == 0:
        return out
    e_N = _elements(shard.w, shard.g, shard.v, element, reduction)
    n = len(e_N)
    # The shard is the end of one row, then whole rows, then the start of one row.
    head = min(-lo % columns, n)
    whole = (n - head) // columns
    tail = n - head - whole * columns
    first = (lo + head) // columns
    middle_RC = e_N[head : head + whole * columns].view(whole, columns)
    if shard.per == "row":
        if whole:
            out[first : first + whole] = _reduce(middle_RC, 1, reduction)
        if head:
            out[lo // columns] = _reduce(e_N[:head], 0, reduction)
        if tail:
            out[first + whole] = _reduce(e_N[n - tail :], 0, reduction)
        return out
    if whole:
        out.copy_(_reduce(middle_RC, 0, reduction))
    if head:
        begin = lo % columns
        _merge(out[begin : begin + head], e_N[:head], reduction)
    if tail:
        _merge(out[:tail], e_N[n - tail :], reduction)
    return out


def _elements(
    w_N: Tensor, g_N: Tensor | None, v_N: Tensor | None, element: str, reduction: str
) -> Tensor:
    if element == "weight":
        e_N = w_N.float().abs()
    else:
        assert g_N is not None
        e_N = w_N.float() * g_N.float()
    if element == "squared":
        e_N = e_N.square_()
    elif element in ("abs", "fisher"):
        if element == "fisher" and v_N is not None:
            e_N = e_N.sub_(w_N.float().square().mul_(v_N.float()), alpha=0.5)
        e_N = e_N.abs_()
    return e_N.square_() if reduction == "sum_of_squares" else e_N


def _reduce(e_RC: Tensor, axis: int, reduction: str) -> Tensor:
    return e_RC.amax(axis) if reduction == "max" else e_RC.sum(axis)


def _merge(into: Tensor, values: Tensor, reduction: str) -> None:
    if reduction == "max":
        torch.maximum(into, values, out=into)
    else:
        into.add_(values)


@jit
def _larger(a, b):
    """NaN wins: a broken gradient must stay visible."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _join(a, b, REDUCTION: tl.constexpr):
    return _larger(a, b) if REDUCTION == "max" else a + b


@jit
def _fold(e, AXIS: tl.constexpr, REDUCTION: tl.constexpr):
    return tl.reduce(e, AXIS, _larger) if REDUCTION == "max" else tl.sum(e, axis=AXIS)


@jit
def _shard(entry_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """w, g, v, lo, n, C of an entry. A cast forgets what a pointer argument would tell: say it."""
    w_ptr = tl.load(entry_ptr + 1).to(tl.pointer_type(DTYPE))
    g_ptr = tl.load(entry_ptr + 2).to(tl.pointer_type(tl.float32))
    v_ptr = tl.load(entry_ptr + 3).to(tl.pointer_type(tl.float32))
    lo = tl.load(entry_ptr + 4)
    n = tl.load(entry_ptr + 5)
    width = tl.load(entry_ptr + 6)
    if ALIGNED:
        w_ptr = tl.multiple_of(w_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        v_ptr = tl.multiple_of(v_ptr, 16)
        lo = tl.multiple_of(lo, 16)
        n = tl.multiple_of(n, 16)
        width = tl.multiple_of(width, 16)
    return w_ptr, g_ptr, v_ptr, lo, n, width


@jit
def _tile(
    w_ptr, g_ptr, v_ptr, lo, n, width, rows, columns,
    ELEMENT: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """e of these rows and columns; 0 for what is not in the shard."""
    at = (rows * width - lo)[:, None] + columns[None, :]
    here = (at >= 0) & (at < n) & (columns < width)[None, :]
    w = tl.load(w_ptr + at, mask=here, other=0.0).to(tl.float32)
    e = w
    if ELEMENT != "weight":
        e = w * tl.load(g_ptr + at, mask=here, other=0.0)
    if ELEMENT == "fisher":
        # A tile, since Triton's interpreter makes no mask of one boolean.
        has_v = tl.full(at.shape, v_ptr.to(tl.int64), tl.int64) != 0
        e = e - 0.5 * (w * w * tl.load(v_ptr + at, mask=here & has_v, other=0.0))
    if ELEMENT == "squared":
        e = e * e
    elif ELEMENT != "signed":
        e = tl.abs(e)
    if REDUCTION == "sum_of_squares":
        e = e * e
    return e


# Entries of the tables of rows and of columns:
#     0 first program, 1 w, 2 g, 3 v, 4 lo, 5 n, 6 C, 7 first row, 8 end row, 9 place of the results
# with 0 for the address of what is not there.
# C is no constexpr: one launch takes matrices of any width, and with the hint above its loads are
# as wide as they were with one.


@jit
def _rows_kernel(
    table_ptr, owner_ptr, out_ptr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ELEMENT: tl.constexpr, REDUCTION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS whole rows of one shard."""
    entry_ptr = table_ptr + tl.load(owner_ptr + tl.program_id(0)) * 10
    program = tl.program_id(0) - tl.load(entry_ptr)
    w_ptr, g_ptr, v_ptr, lo, n, width = _shard(entry_ptr, DTYPE, ALIGNED)
    rows = tl.load(entry_ptr + 7) + program * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, width, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        e = _tile(w_ptr, g_ptr, v_ptr, lo, n, width, rows, columns, ELEMENT, REDUCTION)
        total = _join(total, e, REDUCTION)
    out_at = out_ptr + tl.load(entry_ptr + 9) + rows
    tl.store(out_at, _fold(total, 1, REDUCTION), mask=rows < tl.load(entry_ptr + 8))


@jit
def _columns_kernel(
    table_ptr, owner_ptr, partials_ptr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ELEMENT: tl.constexpr, REDUCTION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS columns of a chunk of ROWS * STEPS rows; a partial sum for each."""
    entry_ptr = table_ptr + tl.load(owner_ptr + tl.program_id(0)) * 10
    program = tl.program_id(0) - tl.load(entry_ptr)
    w_ptr, g_ptr, v_ptr, lo, n, width = _shard(entry_ptr, DTYPE, ALIGNED)
    blocks = tl.cdiv(width, COLUMNS)
    chunk = program // blocks
    columns = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(entry_ptr + 7) + chunk * (ROWS * STEPS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(STEPS):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        e = _tile(w_ptr, g_ptr, v_ptr, lo, n, width, rows, columns, ELEMENT, REDUCTION)
        total = _join(total, e, REDUCTION)
    partials_at = partials_ptr + tl.load(entry_ptr + 9) + chunk * width + columns
    tl.store(partials_at, _fold(total, 0, REDUCTION), mask=columns < width)


@jit
def _finalise_kernel(
    table_ptr, owner_ptr, partials_ptr, out_ptr,
    REDUCTION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: joins the partial sums of COLUMNS columns, always in the same order.

    Entries: 0 first program, 1 place of the partial sums [chunks, C], 2 chunks, 3 C, 4 place of the
    results.
    """
    entry_ptr = table_ptr + tl.load(owner_ptr + tl.program_id(0)) * 5
    program = tl.program_id(0) - tl.load(entry_ptr)
    partials_ptr += tl.load(entry_ptr + 1)
    chunks = tl.load(entry_ptr + 2)
    width = tl.load(entry_ptr + 3)
    columns = program * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, chunks, ROWS):
        chunk = begin + tl.arange(0, ROWS)
        here = (chunk < chunks)[:, None] & inside[None, :]
        partial = tl.load(partials_ptr + chunk[:, None] * width + columns[None, :], here, other=0.0)
        total = _join(total, partial, REDUCTION)
    out_at = out_ptr + tl.load(entry_ptr + 4) + columns
    tl.store(out_at, _fold(total, 0, REDUCTION), mask=inside)


# 8 weights a thread: 128 bits of bf16, twice that of fp32. Not timed on a GPU yet.
_ROWS_TILE = {"ROWS": 4, "COLUMNS": 256, "num_warps": 4}
_COLUMNS_TILE = {"ROWS": 8, "COLUMNS": 128, "STEPS": 16, "num_warps": 4}
_FINALISE_TILE = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4}
_CHUNK = _COLUMNS_TILE["ROWS"] * _COLUMNS_TILE["STEPS"]


@functools.lru_cache(maxsize=16)
def _on_device(entries: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The table, and the entry of each program: so matrices of any sizes share a launch.

    Copied once: addresses stay what they are until the model is rebuilt.
    """
    table = torch.tensor(entries, dtype=torch.int64)
    programs = table[:, 0].clone()
    table[:, 0] = programs.cumsum(0) - programs
    owner = torch.repeat_interleave(programs).to(torch.int32)
    return table.to(device), owner.to(device)


@dataclass
class _Tables:
    """Entries as their kernels document them; the first number is here that of their programs."""

    rows: dict[bool, list[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(list))
    columns: dict[bool, list[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(list))
    """By alignment: where a rank's part of all weights begins and ends, a shard may have none."""
    final: list[tuple[int, ...]] = field(default_factory=list)
    partials_size: int = 0


def _tables(shards: Sequence[MatrixShard], element: str) -> _Tables:
    tables = _Tables()
    out_at = 0
    for shard in shards:
        if shard.w is not None and len(shard.w):
            g = 0 if element == "weight" or shard.g is None else shard.g.data_ptr()
            v = 0 if element != "fisher" or shard.v is None else shard.v.data_ptr()
            (first, end), width = shard.rows, shard.shape[1]
            what = (shard.w.data_ptr(), g, v, shard.lo, len(shard.w), width)
            # Bytes of the addresses and elements of the others, in sixteens.
            aligned = all(x % 16 == 0 for x in what)
            if shard.per == "row":
                programs = math.ceil((end - first) / _ROWS_TILE["ROWS"])
                tables.rows[aligned].append((programs, *what, first, end, out_at))
            else:
                at, chunks = tables.partials_size, math.ceil((end - first) / _CHUNK)
                programs = chunks * math.ceil(width / _COLUMNS_TILE["COLUMNS"])
                tables.columns[aligned].append((programs, *what, first, end, at))
                programs = math.ceil(width / _FINALISE_TILE["COLUMNS"])
                tables.final.append((programs, at, chunks, width, out_at))
                tables.partials_size += chunks * width
        out_at += shard.size
    return tables


def _triton(
    shards: Sequence[MatrixShard], element: str, reduction: str, device: torch.device
) -> list[Tensor]:
    tables = _tables(shards, element)
    sizes = [shard.size for shard in shards]
    out = torch.zeros(sum(sizes), device=device)
    partials = torch.empty(tables.partials_size, device=device)
    in_bf16 = any(s.w is not None and s.w.dtype == torch.bfloat16 for s in shards)
    names = {"ELEMENT": element, "REDUCTION": reduction}
    names["DTYPE"] = tl.bfloat16 if in_bf16 else tl.float32
    for aligned, entries in tables.rows.items():
        table, owner = _on_device(tuple(entries), device)
        launch(
            _rows_kernel, len(owner), device, table, owner, out,
            ALIGNED=aligned, **names, **_ROWS_TILE,
        )  # fmt: skip
    for aligned, entries in tables.columns.items():
        table, owner = _on_device(tuple(entries), device)
        launch(
            _columns_kernel, len(owner), device, table, owner, partials,
            ALIGNED=aligned, **names, **_COLUMNS_TILE,
        )  # fmt: skip
    if tables.final:
        table, owner = _on_device(tuple(tables.final), device)
        launch(
            _finalise_kernel, len(owner), device, table, owner, partials, out,
            REDUCTION=reduction, **_FINALISE_TILE,
        )  # fmt: skip
    return list(out.split(sizes))
