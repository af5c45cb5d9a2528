"""Gradient x weight sums: what a neuron's weights contribute to the loss, to first order.

Reads a flat shard [lo, hi) of a row-major matrix [R, C], as the distributed optimizer holds it, and
adds up one value e(w, g) per element over each row or each column.

Shapes: w_N, g_N [hi - lo] flat shard; result [R] for rows, [C] for columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    if w_N.shape != (n,) or g_N.shape != (n,):
        raise ValueError(
            f"w and g must be flat and equally long, not {[*w_N.shape]}, {[*g_N.shape]}"
        )
    if not 0 <= lo <= lo + n <= rows * columns:
        raise ValueError(f"shard [{lo}, {lo + n}) is outside the {rows} x {columns} matrix")
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
    out = torch.zeros(rows if per == "row" else columns, device=w_N.device)
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
