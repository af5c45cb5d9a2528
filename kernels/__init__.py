"""Kernels of the product, one op a file: tensors and numbers in, tensors out.

Imported as ``megatron_idea.kernels``, never as ``kernels``: that name belongs to a package that
``transformers`` looks for.
"""

from megatron_idea.kernels.score import FfnShard, ffn_scores, matrix_scores
from megatron_idea.kernels.swiglu import masked_swiglu, masked_swiglu_backward

__all__ = ["FfnShard", "ffn_scores", "masked_swiglu", "masked_swiglu_backward", "matrix_scores"]
