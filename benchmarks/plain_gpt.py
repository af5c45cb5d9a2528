"""The same GPT in plain PyTorch, as a yardstick: what the mathematics costs without an engine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_idea.config import ModelConfig


class PlainLayer(nn.Module):
    """Pre-norm attention and SwiGLU, no biases; gate and up in one matrix, as in Megatron."""

    def __init__(self, model: ModelConfig, ffn_hidden_size: int) -> None:
        super().__init__()
        hidden, channels = model.hidden_size, model.kv_channels
        self.heads, self.groups = model.num_attention_heads, model.num_query_groups
        self.channels = channels
        self.attention_norm = nn.RMSNorm(hidden, eps=model.layernorm_epsilon)
        self.qkv = nn.Linear(hidden, (self.heads + 2 * self.groups) * channels, bias=False)
        self.q_norm = self.k_norm = None
        if model.qk_layernorm:
            self.q_norm = nn.RMSNorm(channels, eps=model.layernorm_epsilon)
            self.k_norm = nn.RMSNorm(channels, eps=model.layernorm_epsilon)
        self.proj = nn.Linear(self.heads * channels, hidden, bias=False)
        self.ffn_norm = nn.RMSNorm(hidden, eps=model.layernorm_epsilon)
        self.fc1 = nn.Linear(hidden, 2 * ffn_hidden_size, bias=False)
        self.fc2 = nn.Linear(ffn_hidden_size, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        sizes = [self.heads, self.groups, self.groups]
        qkv = self.qkv(self.attention_norm(x)).view(b, s, sum(sizes), self.channels)
        q, k, v = qkv.transpose(1, 2).split(sizes, dim=1)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(b, s, -1))
        gate, up = self.fc1(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.fc2(F.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves layout: [b, heads, s, channels]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class PlainGPT(nn.Module):
    """Tied embeddings, RoPE, grouped-query attention; returns the mean loss."""

    def __init__(self, model: ModelConfig, ffn_hidden_size: int, seq_length: int) -> None:
        super().__init__()
        assert model.share_embeddings_and_output_weights, "the yardstick ties its embeddings"
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(
            PlainLayer(model, ffn_hidden_size) for _ in range(model.num_layers)
        )
        self.norm = nn.RMSNorm(model.hidden_size, eps=model.layernorm_epsilon)
        rate = model.rotary_base ** -(torch.arange(0, model.kv_channels, 2) / model.kv_channels)
        angle = torch.outer(torch.arange(seq_length), rate).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=model.init_method_std)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
