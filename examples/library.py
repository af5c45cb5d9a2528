"""Somebody else's training loop on megatron-core, with pruning in it: see docs/library.md.

    python examples/library.py

A tiny GPT learns the bytes of this file on one CPU, and its FFNs shrink from 128 to 64 neurons.
"""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import distributed as data_parallel
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_idea.config import (
    Config,
    ModelConfig,
    PruneConfig,
    PruneTarget,
    ScheduleConfig,
    TrainingConfig,
)
from megatron_idea.engine import cpu
from megatron_idea.library import Pruning
from megatron_idea.shape import Shape

STEPS, BATCH, LENGTH = 60, 8, 64
CONFIG = Config(
    model=ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=128, vocab_size=256),
    training=TrainingConfig(seq_length=LENGTH, global_batch_size=BATCH),
    schedule=ScheduleConfig(total_tokens=STEPS * BATCH * LENGTH, prune_warmup_fraction=0.2),
    prune=PruneConfig(target=PruneTarget(ffn_hidden_size=64)),
)
TEXT = torch.tensor(list(Path(__file__).read_bytes()))


def build(shape):
    """Build the host's own model and optimizer; only the sizes come from outside."""
    model, layer = CONFIG.model, shape.layers[0]
    core = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=layer.ffn_hidden_size,
        num_query_groups=layer.num_query_groups,
        num_attention_heads=layer.num_query_groups * layer.heads_per_group,
        kv_channels=model.kv_channels,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    gpt = GPTModel(
        core, spec, model.vocab_size, LENGTH, position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )  # fmt: skip
    settings = data_parallel.DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    chunks = [data_parallel.DistributedDataParallel(core, settings, gpt)]
    core.finalize_model_grads_func = data_parallel.finalize_model_grads
    return chunks, get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=3e-3), chunks)


def forward(batches, model):
    window = next(batches)
    tokens, labels = window[:, :-1], window[:, 1:]
    losses = model(tokens, torch.arange(LENGTH).expand_as(tokens), None, labels=labels)
    return losses, lambda losses: (losses.mean(), losses.mean().detach())


def forward_backward(chunks, step):
    """Run one micro-batch of random places in the text; returns its loss."""
    draw = torch.Generator().manual_seed(step)
    places = torch.randint(len(TEXT) - LENGTH, (BATCH,), generator=draw)
    windows = torch.stack([TEXT[at : at + LENGTH + 1] for at in places])
    (loss,) = get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iter([windows]), model=chunks,
        num_microbatches=1, seq_length=LENGTH, micro_batch_size=BATCH, forward_only=False,
    )  # fmt: skip
    return loss


def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    cpu.install()  # megatron-core without CUDA
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    chunks, optimizer = build(Shape.full(CONFIG.model))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    pruning = Pruning(CONFIG, chunks, optimizer, groups, build)
    for step in range(1, STEPS + 1):
        tokens = step * CONFIG.batch_tokens
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        with pruning.watched(tokens):
            loss = forward_backward(chunks, step)
        pruning.observe(tokens)
        optimizer.step()
        if pruning.after_step(tokens):
            chunks, optimizer = pruning.chunks, pruning.optimizer
        if step % 5 == 0:
            number = sum(parameter.numel() for parameter in chunks[0].parameters())
            print(f"step {step}  loss {loss:.3f}  parameters {number:,}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
