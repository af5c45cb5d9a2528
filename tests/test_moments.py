"""What ``export --optimizer`` writes is the checkpoint's AdamW state, row for row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf import read, trained
from safetensors import safe_open
from safetensors.torch import load_file
from test_export import LARGE, TARGETS
from typer.testing import CliRunner

from megatron_idea import checkpoint, cli
from megatron_idea.checkpoint.reader import CheckpointTensors
from megatron_idea.config import ConfigError
from megatron_idea.huggingface.export import export_checkpoint
from megatron_idea.testing import Workers, assert_close, assert_equal

TP2 = {"tensor_model_parallel_size": 2}
PADDED = {"scope": "global", "alignment": 1}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one_process": (1, {}),
    "tp2": (2, {"parallel": TP2, "prune": {"compact": True}}),
    "bf16": (2, {"training": {"precision": "bf16"}}),
    "padded": (1, {"prune": PADDED}),
}


def moments_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "optimizer").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_moments_are_the_checkpoints_by_hand(case: str, workers: Workers, tmp_path: Path) -> None:
    """By hand: GQA's rows of q, k and v, gate above up, neurons in the order of their numbers."""
    world_size, sections = CASES[case]
    run, out = tmp_path / "run", tmp_path / "out"
    config, live = trained(workers, run, world_size, 6, **sections)
    export_checkpoint(run, out, optimizer=True)
    found, weights = moments_of(out), load_file(out / "model.safetensors")
    stored = CheckpointTensors(checkpoint.resolve(run))
    kinds = ["exp_avg", "exp_avg_sq"] + ["main"] * (case == "bf16")
    assert set(found) == {f"{kind}.{name}" for kind in kinds for name in weights}
    assert all(found[f"{k}.{n}"].shape == weights[n].shape for k in kinds for n in weights)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert all(bool(found[f"exp_avg_sq.{name}"].any()) for name in weights)

    def read(name: str) -> torch.Tensor:
        return stored.read([name])[name]

    width = max(weights[f"model.layers.{n}.mlp.up_proj.weight"].shape[0] for n in (0, 1))
    if case == "padded":
        assert live[0] != live[1]
    for kind in kinds:
        before = f"optimizer.{kind}."
        embedding = read(f"{before}embedding.word_embeddings.weight")
        assert_equal(found[f"{kind}.model.embed_tokens.weight"], embedding)
        gains = read(f"{before}decoder.final_layernorm.weight")
        assert_equal(found[f"{kind}.model.norm.weight"], gains)
        for layer in (0, 1):
            ours, theirs = f"{before}decoder.layers.{layer}.", f"{kind}.model.layers.{layer}."
            rows = read(f"{ours}self_attention.linear_qkv.weight").split(4)  # heads q q k v, twice
            for part, heads in (("q", (0, 1, 4, 5)), ("k", (2, 6)), ("v", (3, 7))):
                expected = torch.cat([rows[head] for head in heads])
                assert_equal(found[f"{theirs}self_attn.{part}_proj.weight"], expected, part)
            ids = read("pruner.stored.ffn_hidden_size").view(2, -1)[layer].tolist()
            alive = read("pruner.alive.ffn_hidden_size")[layer]
            places = [ids.index(number) for number in sorted(ids) if alive[number]]
            gate, up = read(f"{ours}mlp.linear_fc1.weight").chunk(2)
            down = read(f"{ours}mlp.linear_fc2.weight").T
            for part, rows in (("gate", gate), ("up", up), ("down", down)):
                expected = torch.zeros(width, 16)
                expected[: len(places)] = rows[places]
                actual = found[f"{theirs}mlp.{part}_proj.weight"]
                assert_equal(actual.T if part == "down" else actual, expected, part)
    for name in weights if case == "bf16" else ():
        assert_equal(weights[name], found[f"main.{name}"].bfloat16(), name)
    state = checkpoint.read_state(checkpoint.resolve(run))
    with safe_open(out / "optimizer/optimizer.safetensors", "pt") as file:
        assert file.metadata()["step"] == str(state.adam_step) == "6"
    said = json.loads((out / "optimizer/optimizer.json").read_text())
    assert (said["step"], said["consumed_tokens"]) == (6, state.consumed_tokens)
    assert (said["betas"], said["eps"]) == ([0.9, 0.95], config.optimizer.adam_eps)
    decay = {name: group["weight_decay"] for group in said["groups"] for name in group["names"]}
    assert decay == {name: 0.1 if tensor.dim() > 1 else 0.0 for name, tensor in weights.items()}


def test_moments_follow_the_factors_of_removed_channels(workers: Workers, tmp_path: Path) -> None:
    """A weight that is exported c times as large has gradients of 1 / c."""
    run = tmp_path / "run"
    target = dict.fromkeys(TARGETS) | {"hidden_size": 16}
    prune = {"target": target, "channel_alignment": 4, "compact": True}
    trained(workers, run, 1, 8, model=LARGE, prune=prune)
    export_checkpoint(run, tmp_path / "out", optimizer=True)
    stored, found = CheckpointTensors(checkpoint.resolve(run)), moments_of(tmp_path / "out")
    factor = (24 / 16) ** 0.5
    for kind, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        name = f"optimizer.{kind}.decoder.final_layernorm.weight"
        gains = stored.read([name])[name]
        assert_close(found[f"{kind}.model.norm.weight"] * factor**power, gains, kind)
        name = f"optimizer.{kind}.decoder.layers.0.self_attention.linear_qkv.weight"
        rows = stored.read([name])[name].split(6)
        queries = found[f"{kind}.model.layers.0.self_attn.q_proj.weight"]
        assert_close(queries[:6] * factor**power, rows[0], kind)
        values = found[f"{kind}.model.layers.0.self_attn.v_proj.weight"]
        assert_equal(values[:6], rows[3], kind)


def test_mup_says_the_rate_of_matrices_and_large_states_are_split(
    workers: Workers, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    trained(workers, run, 1, 1, model={"hidden_size": 1536}, optimizer={"lr_scaling": "mup_simple"})
    export_checkpoint(run, out, optimizer=True, max_shard_bytes=2e6)
    said = json.loads((out / "optimizer/optimizer.json").read_text())
    by_name = {
        name: (group["lr_mult"], group["weight_decay"])
        for group in said["groups"]
        for name in group["names"]
    }
    assert by_name["model.embed_tokens.weight"] == (1.0, 0.1)
    assert by_name["model.layers.0.mlp.up_proj.weight"] == (0.5, 0.2)
    assert by_name["model.norm.weight"] == (1.0, 0.0)
    export_checkpoint(run, tmp_path / "bf16", dtype="bf16", optimizer=True)
    mains = moments_of(tmp_path / "bf16")
    for name, tensor in read(out).items():
        assert_equal(mains[f"main.{name}"], tensor, name)
    index = json.loads((out / "optimizer/optimizer.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(moments_of(out)) and len(index["weight_map"]) > 2


def test_where_there_are_no_moments_they_are_refused(workers: Workers, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    trained(workers, run, 1, 0)
    with pytest.raises(ConfigError, match="no optimizer state before the first step"):
        export_checkpoint(run, out, optimizer=True)
    with pytest.raises(ConfigError, match="--optimizer has no meaning for --format gguf"):
        export_checkpoint(run, tmp_path / "out.gguf", format="gguf", optimizer=True)
    draft = ["export", str(run), str(out), "--draft-of", str(tmp_path / "large"), "--optimizer"]
    result = CliRunner().invoke(cli.app, draft)
    assert result.exit_code == 2 and "export with --optimizer alone" in result.stderr
    assert not out.exists()
