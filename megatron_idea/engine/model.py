"""(config, shape) -> GPT chunks of this rank, and the weights they start from.

The configuration describes the enlarged model; the shape says how many units of each kind are
stored. The enlarged model, a half-pruned one and the shipped one come from the same call.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from megatron_idea.config import ConfigError, ModelConfig, ParallelConfig, TrainingConfig
from megatron_idea.engine.distributed import ProcessGroups
from megatron_idea.engine.layers import (
    PrunableMLP,
    ResidualNorm,
    RMSNorm,
    ScaledDotProductAttention,
)
from megatron_idea.kernels.dispatch import uses_triton
from megatron_idea.shape import Shape

# Transformer Engine has these norms inside of the linear layers that follow them.
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def uses_transformer_engine() -> bool:
    """Whether layers are Transformer Engine's: it is installed and CUDA is there."""
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


def _leave(weight: Tensor) -> Tensor:
    """An init method that does nothing: ``initialize_weights`` sets every weight by its name."""
    return weight


@dataclass
class ShapedTransformerConfig(TransformerConfig):
    """Megatron-core's configuration of a model whose layers may differ in size.

    megatron-core builds each layer from what ``get_config_for_layer`` returns, because of
    ``heterogeneous_block_specs``; it does so for Nemotron-NAS models. Nothing else follows from
    that switch but checkpoint keys per layer. FFN and attention sizes of this configuration itself
    are the enlarged model's.
    """

    shape: Shape = field(kw_only=True)
    enlarged_hidden_size: int = field(kw_only=True)
    """Channels of the enlarged model, which norms divide by; ``hidden_size`` are stored."""

    def get_config_for_layer(self, layer_number: int) -> TransformerConfig:
        """Return the configuration of one layer; layers count from 1, over all pipeline stages.

        It is a copy: what is set on this configuration afterwards, such as the functions that
        reduce gradients, is read by megatron-core's schedules and never by a layer.
        """
        layer = self.shape.layers[layer_number - 1]
        config = copy.copy(self)
        config.ffn_hidden_size = layer.ffn_hidden_size
        config.num_query_groups = layer.num_query_groups
        config.num_attention_heads = layer.num_query_groups * layer.heads_per_group
        return config


def layers_by_stage(num_layers: int, stages: int) -> list[range]:
    """Deal layers out to pipeline stages, by their positions in the model.

    Where they do not divide, stages in the middle get one more before those at the ends, which
    have the embedding or the output layer.

    Args:
        stages: model chunks over all pipeline ranks, in the order in which a token meets them.
    """
    counts = [num_layers // stages] * stages
    for stage in sorted(range(stages), key=lambda n: (n in (0, stages - 1), n == stages - 1))[
        : num_layers % stages
    ]:
        counts[stage] += 1
    ends = list(itertools.accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def pipeline_layout(num_layers: int, stages: int) -> list[list[str]] | None:
    """Say ``layers_by_stage`` in megatron-core's words; None where layers divide."""
    if num_layers % stages == 0:
        return None
    layout = [["decoder"] * len(layers) for layers in layers_by_stage(num_layers, stages)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def transformer_config(
    model: ModelConfig, training: TrainingConfig, parallel: ParallelConfig, shape: Shape
) -> ShapedTransformerConfig:
    """Return megatron-core's view of a model of this shape."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
    fused = uses_transformer_engine()
    return ShapedTransformerConfig(
        shape=shape,
        enlarged_hidden_size=model.hidden_size,
        heterogeneous_block_specs=True,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        qk_layernorm=model.qk_layernorm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        pipeline_model_parallel_layout=pipeline_layout(shape.num_layers, pp * vpp),
        sequence_parallel=parallel.sequence_parallel and tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Interleaved stages with PP = 2 exchange two messages in opposite directions that batched
        # p2p cannot tell apart (Megatron-LM issue 750): it trains wrongly, without an error.
        overlap_p2p_comm=vpp > 1,
        batch_p2p_comm=vpp == 1,
        # By default the host waits for the whole device at each exchange, for torch of 2021.
        batch_p2p_sync=False,
        # Frees an output once it was handed to send. gloo may still be reading it then: the next
        # stage would compute on freed memory. CUDA orders the two on the stream.
        deallocate_pipeline_outputs=torch.cuda.is_available(),
        # apex's kernel: Transformer Engine brings its own, but the output layer insists on apex.
        gradient_accumulation_fusion=torch.cuda.is_available()
        and find_spec("fused_weight_gradient_mlp_cuda") is not None,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=fused,
        persist_layer_norm=False,
    )


def _mlp_class(
    groups: ProcessGroups, kernel_implementation: str, fused_norm: bool
) -> type[PrunableMLP]:
    """Return a PrunableMLP class that needs a layer's configuration only.

    megatron-core 0.16 and 0.17 build an MLP of ours from a class or a ModuleSpec and tell it no
    process group; since 0.18 they call whatever stands there. A class is what all of them take.
    """
    if uses_transformer_engine():
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TELayerNormColumnParallelLinear,
            TERowParallelLinear,
        )

        linears = MLPSubmodules(
            linear_fc1=TELayerNormColumnParallelLinear if fused_norm else TEColumnParallelLinear,
            linear_fc2=TERowParallelLinear,
        )
    else:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)

    class LayerMLP(PrunableMLP):
        def __init__(self, config: TransformerConfig, **_: Any) -> None:
            super().__init__(config, linears, groups.tp, kernel_implementation)

    return LayerMLP


def _layer_spec(qk_layernorm: bool, mlp: type[PrunableMLP], fused_norm: bool) -> ModuleSpec:
    """Describe a decoder layer; its sizes come from the configuration that it is built with.

    ``fused_norm``: with Transformer Engine norms are part of the linear layers behind them. Those
    divide by what is stored, so channels that are gone need norms of our own.
    """
    if uses_transformer_engine():
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear
        from megatron.core.models.gpt.gpt_layer_specs import (
            get_gpt_layer_with_transformer_engine_spec,
        )

        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
        spec.submodules.mlp = mlp
        if not fused_norm:
            spec.submodules.input_layernorm = ResidualNorm
            spec.submodules.pre_mlp_layernorm = ResidualNorm
            spec.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
            spec.submodules.sharded_state_dict_keys_map = dict(FUSED_NORMS)
        return spec
    qk_norm = RMSNorm if qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ScaledDotProductAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ResidualNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=ResidualNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(FUSED_NORMS),  # one name in checkpoints
        ),
    )


def _final_norm(fused_norm: bool) -> type:
    if uses_transformer_engine() and fused_norm:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return ResidualNorm


def build_model(
    model: ModelConfig,
    training: TrainingConfig,
    core: ShapedTransformerConfig,
    groups: ProcessGroups,
) -> list[torch.nn.Module]:
    """Build this rank's model chunks: one, or as many as virtual pipeline stages.

    Weights are unset until ``initialize_weights`` or a checkpoint sets them; no random number is
    drawn.

    Args:
        core: what ``transformer_config`` made of the same sections; it has the shape.
    Raises: ConfigError when the kernels asked for cannot run here; AssertionError if a layer comes
        out at another size.
    """
    try:
        uses_triton("masked_swiglu", training.kernel_implementation, groups.device)
    except ValueError as error:
        raise ConfigError(f"training.kernel_implementation: {error}") from error
    pp_rank, pp_size = groups.pp.rank(), groups.pp.size()
    vpp = core.virtual_pipeline_model_parallel_size or 1
    fused_norm = core.hidden_size == model.hidden_size
    mlp_class = _mlp_class(groups, training.kernel_implementation, fused_norm)
    layer = _layer_spec(model.qk_layernorm, mlp_class, fused_norm)
    chunks: list[torch.nn.Module] = []
    for chunk in range(vpp):
        vp_stage = chunk if vpp > 1 else None
        count = get_num_layers_to_build(core, vp_stage=vp_stage, pp_rank=pp_rank)
        block = TransformerBlockSubmodules(
            layer_specs=[layer] * count, layer_norm=_final_norm(fused_norm)
        )
        gpt = GPTModel(
            config=core,
            transformer_layer_spec=block,
            vocab_size=model.vocab_size,
            max_sequence_length=training.seq_length,
            pre_process=pp_rank == 0 and chunk == 0,
            post_process=pp_rank == pp_size - 1 and chunk == vpp - 1,
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=model.rotary_base,
            pg_collection=groups.collection,
            vp_stage=vp_stage,
        ).to(groups.device)
        for parameter in gpt.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        chunks.append(Float16Module(core, gpt) if core.bf16 else gpt)
    for number, mlp in prunable_mlps(chunks):
        stored = core.shape.layers[number].ffn_hidden_size
        assert mlp.width * groups.tp.size() == stored, (number, mlp.width, stored)
    return chunks


def unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    """The GPTModel inside DistributedDataParallel and Float16Module."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def prunable_mlps(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[int, PrunableMLP]]:
    """This rank's MLPs with their layer number in the whole model, counted from 0."""
    for chunk in chunks:
        for layer in unwrap(chunk).decoder.layers:
            yield layer.layer_number - 1, layer.mlp


def named_parameters(
    chunks: Sequence[torch.nn.Module],
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters by their name in the whole model, the same in any layout.

    Layers are numbered over all pipeline stages. The last stage's copy of a tied embedding is
    named after the embedding, and Transformer Engine's norms are named as those of other layers.
    """
    for chunk in chunks:
        model = unwrap(chunk)
        layers = model.decoder.layers
        tied = model.share_embeddings_and_output_weights
        for name, parameter in model.named_parameters():
            if tied and name == "output_layer.weight":
                name = "embedding.word_embeddings.weight"
            local = re.match(r"decoder\.layers\.(\d+)\.", name)
            if local:
                layer = layers[int(local[1])].layer_number - 1
                tensor = name[local.end() :]
                for plain, fused in FUSED_NORMS.items():
                    tensor = tensor.replace(fused, plain)
                name = f"decoder.layers.{layer}.{tensor}"
            yield name, parameter


def initialize_weights(
    model: ModelConfig, seed: int, chunks: Sequence[torch.nn.Module], groups: ProcessGroups
) -> None:
    """Set every weight as a function of the seed and the parameter's name alone.

    Matrices are normal with ``init_method_std``, those that write to the residual stream with that
    divided by sqrt(2 num_layers), norms are one (GPT-2 and Megatron). Each TP rank draws the whole
    tensor and keeps its part, so the starting point does not depend on TP, PP or DP.
    """
    std = model.init_method_std
    for name, parameter in named_parameters(chunks):
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
            continue
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        scale = std / math.sqrt(2.0 * model.num_layers) if residual else std
        shape = list(parameter.shape)
        if parameter.tensor_model_parallel:  # type: ignore[attr-defined]
            shape[parameter.partition_dim] *= groups.tp.size()  # type: ignore[attr-defined]
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator(parameter.device)
        generator.manual_seed(int.from_bytes(digest[:7], "little"))
        whole = torch.empty(shape, device=parameter.device).normal_(0.0, scale, generator=generator)
        parameter.data.copy_(own_part(name, parameter, whole, groups))


def own_part(
    name: str, parameter: torch.nn.Parameter, whole: Tensor, groups: ProcessGroups
) -> Tensor:
    """Cut this tensor-parallel rank's part out of a whole tensor."""
    if not parameter.tensor_model_parallel:  # type: ignore[attr-defined]
        return whole
    axis, tp = parameter.partition_dim, groups.tp  # type: ignore[attr-defined]
    # fc1 is [gate; up], each split over TP.
    halves = whole.chunk(2 if name.endswith("linear_fc1.weight") else 1, dim=axis)
    return torch.cat([h.chunk(tp.size(), dim=axis)[tp.rank()] for h in halves], dim=axis)
