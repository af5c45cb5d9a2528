"""The parts of a transformer layer that are ours: RMSNorm, attention core, prunable MLP.

All are ModuleSpec parts for megatron-core and run on CPU and GPU. With Transformer Engine the norm
and the attention core are its own; the prunable MLP is ours in both cases.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_idea.engine.distributed import on_device
from megatron_idea.kernels import masked_swiglu


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, under sequence parallelism too.

    Sequence parallelism shows each TP rank its own tokens only; the ``sequence_parallel`` mark on
    the weight makes megatron-core add the ranks' gradients up.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class ResidualNorm(RMSNorm):
    """The norm of a residual stream from which channels may be gone.

    It goes on dividing by the number H of the enlarged model's channels, whose zeros added nothing:

        x / sqrt(sum(x^2) / H + eps) * weight

    so cutting zeroed channels away changes no activation, no gradient and no weight. Over h stored
    channels that is RMSNorm with weight * sqrt(H / h) and eps * H / h, which export writes.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__(config, hidden_size, eps)
        self._ratio = config.enlarged_hidden_size / hidden_size  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self._ratio == 1:
            return super().forward(x)
        weight = self.weight * self._ratio**0.5
        return F.rms_norm(x, weight.shape, weight, self.eps * self._ratio)


class ScaledDotProductAttention(MegatronModule):
    """Causal attention core on ``torch.nn.functional.scaled_dot_product_attention``.

    Never forms the [sequence, sequence] score matrix where torch has a fused kernel: flash on
    GPU, the blocked kernel on CPU.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.dropout_p = (
            config.attention_dropout if attention_dropout is None else attention_dropout
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """[s, b, heads, kv_channels] queries and [s, b, groups, kv_channels] keys and values.

        Returns: [s, b, heads * kv_channels].
        """
        s, b, heads, channels = query.shape
        groups = key.shape[2]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if groups != heads:
            key, value = (
                x[:, :, None].expand(b, groups, heads // groups, s, channels).flatten(1, 2)
                for x in (key, value)
            )
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            dropout_p=self.dropout_p if self.training else 0.0,
            scale=self.softmax_scale,
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * channels)


class PrunableMLP(MLP):
    """SwiGLU MLP of ``config.ffn_hidden_size`` neurons that leaves removed ones out.

    A neuron is one intermediate index: a gate row and an up row of ``linear_fc1`` and a column of
    ``linear_fc2``. On a TP rank with ``f`` neurons, neuron ``c`` is rows ``c`` and ``f + c`` and
    column ``c``. The weights of a removed neuron are 0, so its activation is 0 whatever stands
    here; the mask, which is not saved, keeps it exactly so in formats that scale what they store.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        tp_group: torch.distributed.ProcessGroup,
        kernel_implementation: str = "auto",
    ) -> None:
        assert config.ffn_hidden_size is not None
        # fc2 takes its width from the config, fc1 from the argument.
        super().__init__(
            config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group
        )
        width = config.ffn_hidden_size // tp_group.size()
        expected = (2 * width, width)
        actual = (self.linear_fc1.weight.shape[0], self.linear_fc2.weight.shape[1])
        assert actual == expected, f"fc1 rows, fc2 columns are {actual}, wanted {expected}"
        self._mask: Tensor | None = None
        self._implementation = kernel_implementation

    @property
    def width(self) -> int:
        """Stored neurons on this TP rank."""
        return int(self.linear_fc2.weight.shape[1])

    def set_alive(self, alive: Tensor) -> None:
        """Say which of this rank's neurons are alive: bool [width], on the CPU."""
        weight = self.linear_fc1.weight
        assert alive.shape == (self.width,), (alive.shape, self.width)
        whole = bool(alive.all())
        self._mask = None if whole else on_device(alive.to(weight.dtype), weight.device)

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] to [s, b, h]; the second value is fc2's bias, which this model has not."""
        assert per_token_scale is None, "only a mixture of experts scales tokens"
        gate_up, _bias = self.linear_fc1(hidden_states)
        activation = masked_swiglu(gate_up, self._mask, implementation=self._implementation)
        return self.linear_fc2(activation)
