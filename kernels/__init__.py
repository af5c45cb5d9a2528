"""Kernels of the product, one op a file: tensors and numbers in, tensors out.

Imported as ``megatron_idea.kernels``, never as ``kernels``: that name belongs to a package that
``transformers`` looks for.
"""

from megatron_idea.kernels.score import MatrixShard, matrix_scores
from megatron_idea.kernels.swiglu import masked_swiglu

__all__ = ["MatrixShard", "masked_swiglu", "matrix_scores"]
