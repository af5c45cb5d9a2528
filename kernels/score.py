"""Gradient x weight sums: what a neuron's weights contribute to the loss, to first order.

Reads a flat shard [lo, hi) of a row-major matrix [R, C], as the distributed optimizer holds it, and
adds up one value e(w, g) per element over each row or each column. For an FFN of f neurons: over
the rows of fc1 [2f, hidden] (gate rows, then up rows) and the columns of fc2 [hidden, f].

Shapes: w_N, g_N [hi - lo] flat shard; result [R] for rows, [C] for columns; [3, f] for an FFN, in
the order gate, up, down.

Bytes at the limit, per weight: 4 for its fp32 gradient and 2 (bf16) or 4 (fp32) for itself. Three
launches for all layers of a rank, whatever their number: a table tells each program its layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_idea.kernels.dispatch import jit, launch, tl, uses_triton

ELEMENTS = ("abs", "squared", "signed")
REDUCTIONS = ("sum", "sum_of_squares", "max")


def _elements(w_N: Tensor, g_N: Tensor, element: str, reduction: str) -> Tensor:
    e_N = w_N.float() * g_N.float()
    if element == "squared":
        e_N = e_N.square_()
    elif element == "abs":
        e_N = e_N.abs_()
    return e_N.square_() if reduction == "sum_of_squares" else e_N


def _reduce(e_RC: Tensor, axis: int, reduction: str) -> Tensor:
    return e_RC.amax(axis) if reduction == "max" else e_RC.sum(axis)


def _merge(into: Tensor, values: Tensor, reduction: str) -> None:
    if reduction == "max":
        torch.maximum(into, values, out=into)
    else:
        into.add_(values)


def _check_shard(w_N: Tensor, g_N: Tensor, lo: int, shape: tuple[int, int]) -> None:
    n = w_N.numel()
    if w_N.shape != (n,) or g_N.shape != (n,):
        raise ValueError(
            f"w and g must be flat and equally long, not {[*w_N.shape]}, {[*g_N.shape]}"
        )
    for name, t in (("w", w_N), ("g", g_N)):
        if not t.is_floating_point():
            raise ValueError(f"{name} is {t.dtype}; legal: a floating-point dtype")
    if w_N.device != g_N.device:
        raise ValueError(f"w is on {w_N.device} and g on {g_N.device}; legal: the same device")
    if not 0 <= lo <= lo + n <= math.prod(shape):
        raise ValueError(f"shard [{lo}, {lo + n}) is outside the {shape[0]} x {shape[1]} matrix")


def _check_names(per: str, element: str, reduction: str) -> None:
    for name, value, legal in (
        ("per", per, ("row", "column")),
        ("element", element, ELEMENTS),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in legal:
            raise ValueError(f"{name} is {value!r}; legal values: {', '.join(legal)}")
    if (element, reduction) == ("signed", "max"):
        # 0, which a shard leaves where it has nothing, is not below every signed value.
        raise ValueError("element 'signed' has no 'max'; take element 'abs' or another reduction")


def matrix_scores(
    w_N: Tensor,
    g_N: Tensor,
    lo: int,
    shape: tuple[int, int],
    per: str,
    element: str = "abs",
    reduction: str = "sum",
) -> Tensor:
    """Reduce e(w, g) of a flat shard over the rows or columns of its matrix.

    Args:
        w_N, g_N: [N] elements lo .. lo + N of a row-major [R, C] matrix; any float dtype.
        lo: first element, >= 0; lo + N <= R * C.
        shape: (R, C).
        per: ``row`` gives one value per row, ``column`` one per column.
        element: ``abs`` |w g|, ``squared`` (w g)^2, ``signed`` w g.
        reduction: ``sum``, ``sum_of_squares`` (of e), ``max``.
    Returns: fp32 [R] or [C]; rows or columns that the shard does not touch are 0. Partial results
        of the shards of one matrix add up (``max``: take the maximum) to that of the whole.
    Raises: ValueError for a shard outside the matrix, unequal lengths, unknown names, and the
        maximum of signed values.
    """
    rows, columns = shape
    n = w_N.numel()
    _check_shard(w_N, g_N, lo, shape)
    _check_names(per, element, reduction)
    out = torch.zeros(rows if per == "row" else columns, device=w_N.device)
    if n == 0:
        return out
    e_N = _elements(w_N, g_N, element, reduction)
    # The shard is the end of one row, then whole rows, then the start of one row.
    head = min(-lo % columns, n)
    whole = (n - head) // columns
    tail = n - head - whole * columns
    first = (lo + head) // columns
    middle_RC = e_N[head : head + whole * columns].view(whole, columns)
    if per == "row":
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


@dataclass(frozen=True)
class FfnShard:
    """This rank's flat parts of one FFN's weights and gradients; None where it has none.

    w1, g1: elements lo1 .. lo1 + len(w1) of fc1 [2f, hidden]; w2, g2: from lo2 on of fc2
    [hidden, f]. Weights bf16 or fp32, gradients fp32 (on CPU any float dtype).
    """

    f: int
    hidden: int
    w1: Tensor | None = None
    g1: Tensor | None = None
    lo1: int = 0
    w2: Tensor | None = None
    g2: Tensor | None = None
    lo2: int = 0


def _ffn_reference(
    layers: Sequence[FfnShard], element: str, reduction: str, device: torch.device
) -> list[Tensor]:
    """One matrix after the other: the law for the kernels."""
    sums = []
    for layer in layers:
        out = torch.zeros(3, layer.f, device=device)
        for w_N, g_N, lo, shape, per, rows in (
            (layer.w1, layer.g1, layer.lo1, (2 * layer.f, layer.hidden), "row", out[:2]),
            (layer.w2, layer.g2, layer.lo2, (layer.hidden, layer.f), "column", out[2:]),
        ):
            if w_N is not None and g_N is not None:
                scores = matrix_scores(w_N, g_N, lo, shape, per, element, reduction)
                rows.copy_(scores.view_as(rows))
        sums.append(out)
    return sums


@jit
def _value(w, g, ELEMENT: tl.constexpr, REDUCTION: tl.constexpr):
    e = w.to(tl.float32) * g.to(tl.float32)
    if ELEMENT == "abs":
        e = tl.abs(e)
    elif ELEMENT == "squared":
        e = e * e
    if REDUCTION == "sum_of_squares":
        e = e * e
    return e


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
def _shard(row_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """w, g, lo and n of a table row. A cast forgets what a pointer argument would tell: say it."""
    w_ptr = tl.load(row_ptr).to(tl.pointer_type(DTYPE))
    g_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(tl.float32))
    lo = tl.load(row_ptr + 2)
    n = tl.load(row_ptr + 3)
    if ALIGNED:
        w_ptr = tl.multiple_of(w_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        lo = tl.multiple_of(lo, 16)
        n = tl.multiple_of(n, 16)
    return w_ptr, g_ptr, lo, n


@jit(do_not_specialize=["blocks"])
def _rows_kernel(
    table_ptr, out_ptr, blocks,
    HIDDEN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    ELEMENT: tl.constexpr, REDUCTION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS whole rows of one fc1 shard. Table [w, g, lo, n, first, end, out]."""
    row_ptr = table_ptr + tl.program_id(0) // blocks * 7
    first = tl.load(row_ptr + 4) + (tl.program_id(0) % blocks).to(tl.int64) * ROWS
    end = tl.load(row_ptr + 5)
    if first < end:
        w_ptr, g_ptr, lo, n = _shard(row_ptr, DTYPE, ALIGNED)
        rows = first + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, HIDDEN, COLUMNS):
            columns = begin + tl.arange(0, COLUMNS)
            at = (rows * HIDDEN - lo)[:, None] + columns[None, :]
            here = (at >= 0) & (at < n) & (columns < HIDDEN)[None, :]
            w = tl.load(w_ptr + at, mask=here, other=0.0)
            g = tl.load(g_ptr + at, mask=here, other=0.0)
            total = _join(total, _value(w, g, ELEMENT, REDUCTION), REDUCTION)
        out_at = out_ptr + tl.load(row_ptr + 6) + rows
        tl.store(out_at, _fold(total, 1, REDUCTION), mask=rows < end)


@jit(do_not_specialize=["chunks", "blocks"])
def _columns_kernel(
    table_ptr, partials_ptr, chunks, blocks,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ELEMENT: tl.constexpr, REDUCTION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS columns of ROWS * STEPS rows of one fc2 shard.

    Table [w, g, lo, n, first, end, partials, f]; a chunk's partial sums are one row [f].
    """
    block = tl.program_id(0) % blocks
    chunk = (tl.program_id(0) // blocks % chunks).to(tl.int64)
    row_ptr = table_ptr + tl.program_id(0) // blocks // chunks * 8
    first = tl.load(row_ptr + 4) + chunk * (ROWS * STEPS)
    end = tl.load(row_ptr + 5)
    f = tl.load(row_ptr + 7)
    if ALIGNED:
        f = tl.multiple_of(f, 16)
    if (first < end) & (block * COLUMNS < f):
        w_ptr, g_ptr, lo, n = _shard(row_ptr, DTYPE, ALIGNED)
        columns = block * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for step in range(STEPS):
            rows = first + step * ROWS + tl.arange(0, ROWS)
            at = (rows * f - lo)[:, None] + columns[None, :]
            here = (at >= 0) & (at < n) & (columns < f)[None, :]
            w = tl.load(w_ptr + at, mask=here, other=0.0)
            g = tl.load(g_ptr + at, mask=here, other=0.0)
            total = _join(total, _value(w, g, ELEMENT, REDUCTION), REDUCTION)
        partials_at = partials_ptr + tl.load(row_ptr + 6) + chunk * f + columns
        tl.store(partials_at, _fold(total, 0, REDUCTION), mask=columns < f)


@jit
def _average(sums, average_at, history, here):
    """average <- history * average + (1 - history) * sums."""
    average = tl.load(average_at, mask=here, other=0.0)
    tl.store(average_at, history * average + (1.0 - history) * sums, mask=here)


@jit(do_not_specialize=["blocks", "history"])
def _finalise_kernel(
    table_ptr, out_ptr, partials_ptr, history, blocks,
    REDUCTION: tl.constexpr, AVERAGE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: all three sums of COLUMNS neurons of one layer.

    Table [f, out, first, end, partials, chunks, average]: rows of fc1 outside [first, end) belong
    to other ranks and are 0; the partial sums of fc2 are joined in order.
    """
    row_ptr = table_ptr + tl.program_id(0) // blocks * 7
    f = tl.load(row_ptr)
    out_ptr += tl.load(row_ptr + 1)
    first = tl.load(row_ptr + 2)
    end = tl.load(row_ptr + 3)
    partials_ptr += tl.load(row_ptr + 4)
    chunks = tl.load(row_ptr + 5)
    average_ptr = tl.load(row_ptr + 6).to(tl.pointer_type(tl.float32))
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < f
    for half in tl.static_range(2):
        rows = half * f + columns
        sums = tl.load(out_ptr + rows, mask=inside & (rows >= first) & (rows < end), other=0.0)
        tl.store(out_ptr + rows, sums, mask=inside)
        if AVERAGE:
            _average(sums, average_ptr + rows, history, inside)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, chunks, ROWS):
        chunk = begin + tl.arange(0, ROWS)
        here = (chunk < chunks)[:, None] & inside[None, :]
        partial = tl.load(partials_ptr + chunk[:, None] * f + columns[None, :], here, other=0.0)
        total = _join(total, partial, REDUCTION)
    sums = _fold(total, 0, REDUCTION)
    tl.store(out_ptr + 2 * f + columns, sums, mask=inside)
    if AVERAGE:
        _average(sums, average_ptr + 2 * f + columns, history, inside)


# 8 weights a thread: 128 bits of bf16, twice that of fp32. Not timed on a GPU yet.
_ROWS_TILE = {"ROWS": 4, "COLUMNS": 256, "num_warps": 4}
_COLUMNS_TILE = {"ROWS": 8, "COLUMNS": 128, "STEPS": 16, "num_warps": 4}
_FINALISE_TILE = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4}
_CHUNK = _COLUMNS_TILE["ROWS"] * _COLUMNS_TILE["STEPS"]


def _touched(lo: int, n: int, row_length: int) -> tuple[int, int]:
    """Rows [first, end) that elements [lo, lo + n) lie in; n > 0."""
    return lo // row_length, (lo + n - 1) // row_length + 1


@functools.lru_cache(maxsize=16)
def _on_device(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The table, copied once: addresses stay what they are until the model is rebuilt."""
    return torch.tensor(rows, dtype=torch.int64, device=device)


@dataclass
class _Tables:
    """What the kernels read, each row in the order that its kernel documents; no empty shards."""

    fc1: list[tuple[int, ...]] = field(default_factory=list)
    fc2: list[tuple[int, ...]] = field(default_factory=list)
    final: list[tuple[int, ...]] = field(default_factory=list)
    out_size: int = 0
    partials_size: int = 0

    def add(self, layer: FfnShard, average: Tensor | None) -> None:
        first = end = chunks = 0
        partials = self.partials_size
        if layer.w1 is not None and layer.g1 is not None and len(layer.w1):
            w, g, n = layer.w1.data_ptr(), layer.g1.data_ptr(), len(layer.w1)
            first, end = _touched(layer.lo1, n, layer.hidden)
            self.fc1.append((w, g, layer.lo1, n, first, end, self.out_size))
        if layer.w2 is not None and layer.g2 is not None and len(layer.w2):
            w, g, n = layer.w2.data_ptr(), layer.g2.data_ptr(), len(layer.w2)
            rows = _touched(layer.lo2, n, layer.f)
            self.fc2.append((w, g, layer.lo2, n, *rows, partials, layer.f))
            chunks = math.ceil((rows[1] - rows[0]) / _CHUNK)
        address = 0 if average is None else average.data_ptr()
        self.final.append((layer.f, self.out_size, first, end, partials, chunks, address))
        self.out_size += 3 * layer.f
        self.partials_size += chunks * layer.f


def _aligned(row: tuple[int, ...], row_length: int) -> bool:
    """Bytes of the addresses and elements of lo, n and the row length in sixteens."""
    return all(x % 16 == 0 for x in (*row[:4], row_length))


def _ffn_triton(
    layers: Sequence[FfnShard],
    element: str,
    reduction: str,
    device: torch.device,
    averages: Sequence[Tensor] | None,
    history: float,
) -> list[Tensor]:
    tables = _Tables()
    for index, layer in enumerate(layers):
        tables.add(layer, None if averages is None else averages[index])
    # The finalising launch writes all of it, also what no shard touches.
    out = torch.empty(tables.out_size, dtype=torch.float32, device=device)
    partials = torch.empty(tables.partials_size, dtype=torch.float32, device=device)
    weights = [w for layer in layers for w in (layer.w1, layer.w2) if w is not None]
    names: dict[str, Any] = {"ELEMENT": element, "REDUCTION": reduction}
    if weights:
        names["DTYPE"] = tl.bfloat16 if weights[0].dtype == torch.bfloat16 else tl.float32
    if tables.fc1:
        hidden = layers[0].hidden
        blocks = max(
            math.ceil((end - first) / _ROWS_TILE["ROWS"]) for *_, first, end, _out in tables.fc1
        )
        launch(
            _rows_kernel, len(tables.fc1) * blocks, device,
            _on_device(tuple(tables.fc1), device), out, blocks,
            HIDDEN=hidden, ALIGNED=all(_aligned(row, hidden) for row in tables.fc1),
            **names, **_ROWS_TILE,
        )  # fmt: skip
    if tables.fc2:
        chunks = max(
            math.ceil((end - first) / _CHUNK) for *_, first, end, _partials, _f in tables.fc2
        )
        blocks = max(math.ceil(f / _COLUMNS_TILE["COLUMNS"]) for *_, f in tables.fc2)
        launch(
            _columns_kernel, len(tables.fc2) * chunks * blocks, device,
            _on_device(tuple(tables.fc2), device), partials, chunks, blocks,
            ALIGNED=all(_aligned(row, row[-1]) for row in tables.fc2),
            **names, **_COLUMNS_TILE,
        )  # fmt: skip
    blocks = max(math.ceil(layer.f / _FINALISE_TILE["COLUMNS"]) for layer in layers)
    launch(
        _finalise_kernel, len(layers) * blocks, device,
        _on_device(tuple(tables.final), device), out, partials, history, blocks,
        REDUCTION=reduction, AVERAGE=averages is not None, **_FINALISE_TILE,
    )  # fmt: skip
    parts = out.split([3 * layer.f for layer in layers])
    return [part.view(3, layer.f) for part, layer in zip(parts, layers, strict=True)]


@torch.no_grad()
def ffn_scores(
    layers: Sequence[FfnShard],
    element: str = "abs",
    reduction: str = "sum",
    *,
    device: torch.device | None = None,
    averages: Sequence[Tensor] | None = None,
    history: float = 0.0,
    implementation: str = "auto",
) -> list[Tensor]:
    """Reduce e(w, g) over the gate row, up row and down column of every neuron of many FFNs.

    Args:
        layers: this rank's shards; all of one hidden size and, in Triton, one dtype.
        element, reduction: as for ``matrix_scores``.
        device: of the results; default: of the shards. Needed where no layer has any.
        averages: contiguous fp32 [3, f] per layer, updated in the same pass:
            average <- history * average + (1 - history) * sums.
        implementation: ``auto`` (Triton on CUDA, PyTorch elsewhere), ``triton``, ``reference``.
    Returns: fp32 [3, f] per layer: gate, up, down; 0 where the shards have nothing.
    Raises: ValueError, before anything launches: as ``matrix_scores``, and for shards on several
        devices or of several dtypes.
    Cost: in Triton three launches. A new set of addresses costs a copy of the tables to the device:
        call once before capturing a CUDA graph.
    """
    _check_names("row", element, reduction)
    tensors = [t for s in layers for t in (s.w1, s.g1, s.w2, s.g2) if t is not None]
    if device is None:
        if not tensors:
            raise ValueError("no layer has a shard: say on which device the results belong")
        device = tensors[0].device
    in_triton = uses_triton("ffn_scores", implementation, device)
    _check_ffns(layers, tensors, averages, device, in_triton)
    if not layers:
        return []
    if in_triton:
        return _ffn_triton(layers, element, reduction, device, averages, history)
    sums = _ffn_reference(layers, element, reduction, device)
    for average, value in zip(averages or [], sums, strict=averages is not None):
        average.mul_(history).add_(value, alpha=1 - history)
    return sums


def _check_ffns(
    layers: Sequence[FfnShard],
    tensors: Sequence[Tensor],
    averages: Sequence[Tensor] | None,
    device: torch.device,
    in_triton: bool,
) -> None:
    for index, s in enumerate(layers):
        for name, w_N, g_N, lo, shape in (
            ("fc1", s.w1, s.g1, s.lo1, (2 * s.f, s.hidden)),
            ("fc2", s.w2, s.g2, s.lo2, (s.hidden, s.f)),
        ):
            if (w_N is None) != (g_N is None):
                raise ValueError(f"{name} of layer {index} has only one of weight and gradient")
            if w_N is not None and g_N is not None:
                _check_shard(w_N, g_N, lo, shape)
    if averages is not None:
        if len(averages) != len(layers):
            raise ValueError(f"{len(averages)} averages for {len(layers)} layers; legal: one each")
        for average, layer in zip(averages, layers, strict=True):
            if average.shape != (3, layer.f) or average.dtype != torch.float32:
                raise ValueError(
                    f"average is {average.dtype} {tuple(average.shape)}; "
                    f"legal: torch.float32 (3, {layer.f})"
                )
            if not average.is_contiguous():
                raise ValueError(
                    f"average has strides {average.stride()}; legal: contiguous ({layer.f}, 1)"
                )
    for t in (*tensors, *(averages or ())):
        if t.device != device:
            raise ValueError(f"a tensor is on {t.device}; legal: all on {device}")
    if not in_triton:
        return
    if len({layer.hidden for layer in layers}) > 1:
        raise ValueError(f"hidden sizes differ: {sorted({s.hidden for s in layers})}; legal: one")
    weights = {w.dtype for s in layers for w in (s.w1, s.w2) if w is not None}
    gradients = {g.dtype for s in layers for g in (s.g1, s.g2) if g is not None}
    if len(weights) > 1 or not weights <= {torch.bfloat16, torch.float32}:
        names = ", ".join(sorted(map(str, weights)))
        raise ValueError(f"weights are {names}; legal: all torch.bfloat16 or all torch.float32")
    if not gradients <= {torch.float32}:
        names = ", ".join(sorted(map(str, gradients)))
        raise ValueError(f"gradients are {names}; legal: torch.float32")
    for t in tensors:
        if t.numel() > 1 and t.stride(0) != 1:
            raise ValueError(f"a shard has stride {t.stride(0)}; legal: 1; call contiguous()")
