"""Somebody else's training loop on megatron-core, with pruning in it: see docs/library.md.

    python examples/library.py

A tiny GPT learns the bytes of this file on one CPU, and its FFNs shrink from 128 to 64 neurons.
"""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import distributed, parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_idea import config as configuration
from megatron_idea.engine import cpu
from megatron_idea.library import Pruning
from megatron_idea.shape import Shape

STEPS, BATCH, LENGTH = 60, 8, 64
CONFIG = configuration.from_dict({
    "model": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "vocab_size": 256},
    "training": {"seq_length": LENGTH, "global_batch_size": BATCH},
    "schedule": {"total_tokens": STEPS * BATCH * LENGTH, "prune_warmup_fraction": 0.2},
    "prune": {"target": {"ffn_hidden_size": 64}},
})  # fmt: skip
TEXT = torch.tensor(list(Path(__file__).read_bytes()))


def build(shape):
    """Build the host's own model and optimizer; only the sizes come from outside."""
    layer = shape.layers[0]
    core = TransformerConfig(
        num_layers=shape.num_layers, hidden_size=shape.hidden_size, add_bias_linear=False,
        ffn_hidden_size=layer.ffn_hidden_size, num_query_groups=layer.num_query_groups,
        num_attention_heads=layer.num_query_groups * layer.heads_per_group, kv_channels=32,
        normalization="RMSNorm", gated_linear_unit=True, activation_func=F.silu,
    )  # fmt: skip
    gpt = GPTModel(
        core, get_gpt_layer_local_spec(normalization="RMSNorm"), 256, LENGTH,
        position_embedding_type="rope", share_embeddings_and_output_weights=True,
    )  # fmt: skip
    core.finalize_model_grads_func = distributed.finalize_model_grads
    settings = distributed.DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    chunks = [distributed.DistributedDataParallel(core, settings, gpt)]
    return chunks, get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=3e-3), chunks)


def forward(batches, model):
    windows = next(batches)
    losses = model(windows[:, :-1], None, None, labels=windows[:, 1:])
    return losses, lambda losses: (losses.mean(), losses.mean().detach())


def forward_backward(chunks):
    """Run one micro-batch of random places in the text; returns its loss."""
    windows = TEXT.unfold(0, LENGTH + 1, 1)[torch.randint(len(TEXT) - LENGTH, (BATCH,))]
    return get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iter([windows]), model=chunks,
        num_microbatches=1, seq_length=LENGTH, micro_batch_size=BATCH, forward_only=False,
    )[0]  # fmt: skip


def start():
    """Join a job of one process; returns its process groups."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    cpu.install()  # megatron-core without CUDA
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    return ProcessGroupCollection.use_mpu_process_groups()


def main():
    groups = start()
    chunks, optimizer = build(Shape.full(CONFIG.model))
    pruning = Pruning(CONFIG, chunks, optimizer, groups, build)
    for step in range(1, STEPS + 1):
        tokens = step * CONFIG.batch_tokens
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        with pruning.watched(tokens):
            loss = forward_backward(chunks)
        pruning.observe(tokens)
        optimizer.step()
        if pruning.after_step(tokens):
            chunks, optimizer = pruning.chunks, pruning.optimizer
        if step % 5 == 0:
            number = sum(parameter.numel() for parameter in chunks[0].parameters())
            print(f"step {step}  loss {loss:.3f}  parameters {number:,}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
