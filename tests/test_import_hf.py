"""A Hugging Face model becomes a run and comes back bit for bit; enlarged, it computes the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hf import ours, read, theirs, trained
from typer.testing import CliRunner

from megatron_idea import checkpoint, cli
from megatron_idea import config as configuration
from megatron_idea.config import Config, ConfigError, to_yaml
from megatron_idea.huggingface.export import byte_tokenizer_json, export_checkpoint
from megatron_idea.huggingface.import_ import (
    _sources,
    grow,
    import_checkpoint,
    read_factors,
)
from megatron_idea.huggingface.names import from_hf_config
from megatron_idea.prune.axis import Share
from megatron_idea.records.lock import RunFolderError, RunLock
from megatron_idea.records.read import read_events
from megatron_idea.testing import Workers, assert_close, assert_equal

transformers = pytest.importorskip("transformers", reason="needs megatron-idea[export]")

runner = CliRunner()
SHAPE = {
    "vocab_size": 264, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "initializer_range": 0.2, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256,
}  # fmt: skip
MODELS = {
    "llama_untied": {"rope_theta": 500_000.0},
    "llama_mqa": {"num_key_value_heads": 1},
    "llama_tied_wide_heads": {"tie_word_embeddings": True, "head_dim": 6, "rms_norm_eps": 1e-3},
    "qwen3_tied": {"tie_word_embeddings": True, "head_dim": 8},
}


def hf_model(folder: Path, name: str, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    """A random Llama or Qwen3 as transformers writes it, and a byte-level tokenizer."""
    torch.manual_seed(0)
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    settings, model = kinds[name.split("_")[0]]
    made = model(settings(**SHAPE | MODELS[name])).to(dtype)
    for norm in (p for n, p in made.named_parameters() if "norm" in n):
        norm.data.uniform_(0.5, 1.5)  # ones would hide an exchange
    made.save_pretrained(folder, **saving)
    (folder / "tokenizer.json").write_text(byte_tokenizer_json())
    return folder


def assert_same_tensors(one: Path, other: Path) -> None:
    a, b = read(one), read(other)
    assert a.keys() == b.keys()
    for name in a:
        assert_equal(a[name], b[name], name)


def test_a_shorter_context_is_said(tmp_path: Path) -> None:
    source = hf_model(tmp_path / "hf", "llama_untied")
    assert not any("context" in note for note in import_checkpoint(source, tmp_path / "a").notes)
    shorter = import_checkpoint(source, tmp_path / "b", overrides=["training.seq_length=16"])
    (note,) = (note for note in shorter.notes if "context" in note)
    assert note.startswith("trained on 16 tokens of context") and "32 were possible" in note


@pytest.mark.parametrize("name", MODELS)
def test_logits_stay_and_the_way_back_is_exact(name: str, workers: Workers, tmp_path: Path) -> None:
    source = hf_model(tmp_path / "hf", name, max_shard_size="20KB")
    assert (source / "model.safetensors.index.json").exists()
    imported = import_checkpoint(source, tmp_path / "run")
    assert imported.shape == imported.before
    assert imported.shape.counts("ffn_hidden_size") == (24, 24)
    assert_close(ours(workers, tmp_path / "run"), theirs(source)[0], "logits", 1e-5)
    export_checkpoint(tmp_path / "run", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", source)
    was, now = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "back"))
    for key, value in (SHAPE | MODELS[name]).items():
        if key not in ("pad_token_id", "rope_theta"):
            assert now[key] == value, key
    for key in ("architectures", "head_dim", "rms_norm_eps", "tie_word_embeddings"):
        assert now[key] == was[key], key
    theta = MODELS[name].get("rope_theta", 10_000.0)
    assert now["rope_theta"] == now["rope_parameters"]["rope_theta"] == theta
    assert theta in (was.get("rope_theta"), was.get("rope_parameters", {}).get("rope_theta"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_comes_back_exactly(dtype: str, tmp_path: Path) -> None:
    """bf16 stays bf16; fp16 becomes fp32, which holds all its values."""
    source = hf_model(tmp_path / "hf", "llama_untied", getattr(torch, dtype))
    import_checkpoint(source, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "back")
    was, now = read(source), read(tmp_path / "back")
    for name in was:
        wanted = was[name] if dtype == "bfloat16" else was[name].float()
        assert_equal(now[name], wanted, name)
    # Before the first step a bf16 run has no main weights: fp32 of it is the same numbers.
    export_checkpoint(tmp_path / "run", tmp_path / "fp32", dtype="fp32")
    for name, tensor in read(tmp_path / "fp32").items():
        assert_equal(tensor, now[name].float(), name)


@pytest.mark.parametrize("layout", ["padded", "compact"])
def test_an_export_with_different_widths_comes_back_with_them(
    layout: str, workers: Workers, tmp_path: Path
) -> None:
    _, live = trained(
        workers, tmp_path / "first", 1, 6, model={"qk_layernorm": False},
        prune={"scope": "global", "alignment": 1},
    )  # fmt: skip
    assert live[0] != live[1]
    export_checkpoint(tmp_path / "first", tmp_path / "one", layout=layout)
    imported = import_checkpoint(
        tmp_path / "one", tmp_path / "run", overrides=["prune.alignment=1", "prune.strategy=none"]
    )
    assert imported.shape.counts("ffn_hidden_size") == tuple(live), "zeros would never learn"
    export_checkpoint(tmp_path / "run", tmp_path / "two", layout=layout)
    assert_same_tensors(tmp_path / "one", tmp_path / "two")
    assert_close(ours(workers, tmp_path / "run"), ours(workers, tmp_path / "first"), "", 1e-5)


ENLARGE = {
    "ffn_hidden_size": 2.667, "num_query_groups": 2, "hidden_size": 1.5, "num_layers": 1.5,
}  # fmt: skip
LARGE = {"ffn_hidden_size": 64, "num_query_groups": 4, "hidden_size": 24, "num_layers": 3}
LEGAL = ["training.seq_length=32", "prune.channel_alignment=8"]


@pytest.mark.parametrize("axes", [*([axis] for axis in ENLARGE), [*ENLARGE]], ids="+".join)
@pytest.mark.parametrize("name", ["llama_untied", "llama_tied_wide_heads", "qwen3_tied"])
def test_an_enlarged_model_computes_the_same(
    name: str, axes: list[str], workers: Workers, tmp_path: Path
) -> None:
    source = hf_model(tmp_path / "hf", name)
    enlarge = {axis: ENLARGE[axis] for axis in axes}
    imported = import_checkpoint(source, tmp_path / "run", overrides=LEGAL, enlarge=enlarge)
    config = configuration.load(imported.config_path)
    for axis, small in SMALL.items():
        expected = LARGE[axis] if axis in axes else small
        assert max(imported.shape.counts(axis)) == expected == getattr(config.model, axis)
        assert max(imported.before.counts(axis)) == small
    assert config.prune.target.counts == {axis: SMALL[axis] for axis in axes}
    assert config.model.num_attention_heads == 2 * config.model.num_query_groups
    assert_close(ours(workers, tmp_path / "run"), theirs(source)[0], "logits", 1e-5)
    # Stock transformers says so, too.
    export_checkpoint(tmp_path / "run", tmp_path / "large")
    assert_close(theirs(tmp_path / "large")[0], theirs(source)[0], "logits", 1e-5)


def test_sizes_of_the_folder_are_no_floor_beside_a_number_of_parameters(tmp_path: Path) -> None:
    source = hf_model(tmp_path / "hf", "llama_untied")
    overrides = [*LEGAL, "prune.strategy=adapt_pruner", "prune.target.parameters=12_000"]
    imported = import_checkpoint(
        source, tmp_path / "run", overrides=overrides, enlarge={"ffn_hidden_size": 2}
    )
    target = configuration.load(imported.config_path).prune.target
    assert target == configuration.PruneTarget(parameters=12_000)


SMALL = {"ffn_hidden_size": 24, "num_query_groups": 2, "hidden_size": 16, "num_layers": 2}


def gradients_job(rendezvous: str, path: str) -> list[dict[str, torch.Tensor]]:
    """Gradients of two steps of a run, by parameter."""
    from jobs import backward

    from megatron_idea.engine.distributed import start_distributed, stop_distributed
    from megatron_idea.engine.model import named_parameters
    from megatron_idea.engine.optimizer import update
    from megatron_idea.engine.trainable import assemble
    from megatron_idea.prune.pruner import Pruner

    found = checkpoint.resolve(Path(path))
    config = checkpoint.read_config(found)
    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        shape = checkpoint.read_state(found).shape
        trainable = assemble(config.sections, groups, shape, initialize=False)
        checkpoint.load(trainable, Pruner(config, trainable), found)
        found_gradients = []
        for seed in range(2):
            backward(trainable, seed)
            named = named_parameters(trainable.chunks)
            found_gradients.append({name: p.main_grad.clone() for name, p in named})
            update(trainable.optimizer, 1e-2)
        return found_gradients
    finally:
        stop_distributed()


def test_new_units_of_every_axis_learn(workers: Workers, tmp_path: Path) -> None:
    """Something of each in the first step, everything from the second on."""
    from megatron_idea.prune.axis import shares_of

    source = hf_model(tmp_path / "hf", "qwen3_tied")
    imported = import_checkpoint(
        source, tmp_path / "run", enlarge=ENLARGE,
        overrides=[*LEGAL, "training.global_batch_size=8"],
    )  # fmt: skip
    model, shape = configuration.load(imported.config_path).model, imported.shape
    assert _sources(2, 3) == [0, 1, 1], "the last layer is new"
    (steps,) = workers.run(gradients_job, 1, str(imported.path))
    learning, new = set(), set()
    for step, gradients in enumerate(steps):
        for name, gradient in gradients.items():
            for share in shares_of(name, model, shape, tp=1):
                is_new = range(SMALL[share.axis], share.count)
                if share.axis == "num_layers":
                    is_new = range(share.layer == 2)
                units = gradient.reshape(-1, share.count, share.stride).transpose(0, 1).flatten(1)
                parts = units.split([numel for _, numel in share.matrices], dim=1)
                for (matrix, _), part in zip(share.matrices, parts, strict=True):
                    for unit in is_new:
                        layer = None if share.axis == "hidden_size" else share.layer
                        learns, key = bool(part[unit].any()), (share.axis, layer, unit)
                        new.add(key)
                        learning |= {key} if learns else set()
                        assert learns or step == 0, (name, share.axis, matrix, unit)
        assert learning == new and len(new) == 3 * (40 + 2) + 8 + 1


def test_new_units_look_like_old_ones_and_like_no_other(tmp_path: Path) -> None:
    """The spread of the matrix that they come to. Copies of one unit would stay copies."""
    share = Share("ffn_hidden_size", 0, 0, 64, 6, (("gate", 64), ("up", 64)))
    torch.manual_seed(0)
    old = torch.cat([torch.randn(6, 64), 3 * torch.randn(6, 64)])
    new = grow(old, share, 16, torch.Generator().manual_seed(1))
    for part, was in zip(new.chunk(2), old.chunk(2), strict=True):
        assert_equal(part[:6], was)
        assert 0.7 < float(part[6:].square().mean() / was.square().mean()) < 1.4
        assert torch.pdist(part / part.norm(dim=1, keepdim=True)).min() > 0.5


def train_job(rendezvous: str, config: Config) -> list[dict[str, Any]]:
    from megatron_idea.records.read import read_metrics
    from megatron_idea.train import train

    train(config, rendezvous)
    return [*read_metrics(Path(config.run_dir))]


def evaluate_job(rendezvous: str, path: str) -> float:
    from megatron_idea.evaluation.held_out import evaluate_checkpoint

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    return evaluate_checkpoint(Path(path))["loss"]


def test_a_widened_model_trains_on_and_is_pruned_back(
    workers: Workers, tiny: Config, tmp_path: Path
) -> None:
    """Over two ranks, in fp32 and bf16: it begins with the loss of the model that was imported."""
    source = hf_model(tmp_path / "hf", "qwen3_tied")
    given = yaml.safe_load(to_yaml(tiny))
    del given["model"], given["run_dir"]
    given["prune"]["target"] = {"ffn_hidden_size": 24}
    given["parallel"]["tensor_model_parallel_size"] = 2
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))

    def imported(precision: str, *options: str) -> Path:
        run = tmp_path / f"{precision}{''.join(options)}"
        arguments = ["import", str(source), str(run), "--config", str(tmp_path / "run.yaml")]
        setting = f"training.precision={precision}"
        result = runner.invoke(cli.app, [*arguments, *options, setting])
        assert result.exit_code == 0, result.output
        assert f"megatron-idea train {run}/config.yaml" in result.stdout
        assert ("rounded from float32" in result.stdout) == (precision == "bf16")
        return run

    plain = import_checkpoint(
        source, tmp_path / "plain", tmp_path / "run.yaml", ["prune.strategy=none"]
    )
    (before,) = workers.run(evaluate_job, 1, str(plain.path))
    losses = []
    for precision in ("fp32", "bf16"):
        run = imported(precision, "--enlarge=ffn_hidden_size=2.667")
        records = workers.run(train_job, 2, configuration.load(run / "config.yaml"))[0]
        assert len(records) == 24
        assert records[0].stored["ffn_hidden_size"] == [64, 64] and records[-1].stored[
            "ffn_hidden_size"
        ] == [24, 24]
        start = next(e["val_loss"] for e in read_events(run) if e["kind"] == "evaluated")
        assert start == pytest.approx(before, abs=1e-5 if precision == "fp32" else 2e-2)
        losses.append([record.loss for record in records])
    assert losses[0] == pytest.approx(losses[1], abs=3e-2), "bf16 began from other main weights"
    assert losses[0][-1] < losses[0][0] - 0.3


REFUSED = {
    "model_type": ("gemma", "is of model_type 'gemma'.* import reads dense llama, qwen3, mistral"),
    "model_type ": ("mistral", r"sliding_window is 4096 \(legal: null\)"),
    "hidden_act": ("gelu", r"hidden_act is 'gelu' \(legal: silu\)"),
    "attention_bias": (True, r"attention_bias is true \(legal: false\)"),
    "mlp_bias": (True, r"mlp_bias is true \(legal: false\)"),
    "rope_scaling": ({"rope_type": "llama3", "factor": 8.0}, "rope_scaling is of type 'llama3'"),
    "rope_parameters": (
        {"rope_type": "yarn", "factor": 4.0}, r"rope_parameters is of type 'yarn' \(legal: default",
    ),
    "rope_theta": (1e4 + 0.5, "rope_theta is 10000.5"),
    "vocab_size": (None, "gives no whole number above 0 for vocab_size"),
    "layer_types": (["full_attention", "sliding_attention"], "layer_types has sliding_attention"),
    "quantization_config": ({"bits": 4}, "the weights are quantized"),
    "partial_rotary_factor": (0.5, r"partial_rotary_factor is 0.5 \(legal: 1\)"),
    "hidden_size": (None, "gives no whole number above 0 for hidden_size"),
    "head_dim": ("4", "gives no whole number above 0 for head_dim"),
    "num_hidden_layers": (3, "lacks 9 tensors, as model.layers.2"),
    "num_attention_heads": (8, r"q_proj.weight as F32 \[16, 16\]; config.json says \[32, 16\]"),
    "num_key_value_heads": (4, r"k_proj.weight as F32 \[8, 16\]; config.json says \[16, 16\]"),
    "num_key_value_heads ": (3, r"num_attention_heads is 4 \(legal: multiples of num_key_value"),
    "intermediate_size": (None, "gives no whole number above 0 for intermediate_size"),
    "intermediate_size ": (20, r"gate_proj.weight as F32 .*; config.json says \[20, 16\]"),
}  # fmt: skip


# What the config.json of public models says, less what only names and versions are.
_SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu",
    "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
    "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
_LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    }, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
_QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def test_configs_of_public_models_are_read_or_refused_by_name() -> None:
    for hf, groups, head, theta, qk in (
        (_SMOLLM2_135M, 3, 64, 100_000, False), (_QWEN3_06B, 8, 128, 1_000_000, True),
    ):  # fmt: skip
        model, shape = from_hf_config(hf)
        widths = shape.counts("ffn_hidden_size")
        assert widths == (hf["intermediate_size"],) * hf["num_hidden_layers"]
        assert model["share_embeddings_and_output_weights"] and model["qk_layernorm"] == qk
        found = (model["num_query_groups"], model["kv_channels"], model["rotary_base"])
        assert found == (groups, head, theta)
        five = {k: v for k, v in hf.items() if k not in ("rope_theta", "rope_scaling")}
        five["rope_parameters"] = {"rope_type": "default", "rope_theta": float(theta)}
        assert from_hf_config(five) == (model, shape), "as transformers 5 writes it"
    with pytest.raises(ConfigError, match=r"rope_scaling is of type 'llama3' \(legal: default"):
        from_hf_config(_LLAMA_3_2_1B)


def test_what_our_model_cannot_compute_is_named(tmp_path: Path) -> None:
    source = hf_model(tmp_path / "hf", "llama_untied")
    good = json.loads((source / "config.json").read_text())
    for key, (value, says) in REFUSED.items():
        bad = tmp_path / "bad"
        shutil.copytree(source, bad, dirs_exist_ok=True)
        (bad / "config.json").write_text(json.dumps(good | {key.strip(): value}))
        with pytest.raises(ConfigError, match=says):
            import_checkpoint(
                bad, tmp_path / "run", overrides=["prune.alignment=4", "prune.strategy=none"]
            )
        assert not checkpoint.complete(tmp_path / "run"), key
    (bad / "config.json").write_text(json.dumps(good | {"hidden_act": "gelu", "mlp_bias": True}))
    with pytest.raises(ConfigError, match=r"hidden_act.*; mlp_bias"):
        import_checkpoint(bad, tmp_path / "run")


def test_what_the_user_asks_for_in_vain_is_said(tmp_path: Path) -> None:
    source = hf_model(tmp_path / "hf", "llama_untied")

    def refused(says: str, *overrides: str, folder: Path = source, **options: Any) -> None:
        with pytest.raises(ConfigError, match=says):
            import_checkpoint(folder, tmp_path / "run", overrides=overrides, **options)
        assert not checkpoint.complete(tmp_path / "run")

    for text in ("ffn_hidden_size=0.5", "num_layers=many", "heads=2", "2.667"):
        with pytest.raises(ConfigError, match=f"--enlarge has '{text}'; give axes and factors"):
            read_factors(text)
    assert read_factors("num_layers=1.5,hidden_size=2") == {"num_layers": 1.5, "hidden_size": 2}
    refused("asks for 5 layers where there are 2; at most twice", enlarge={"num_layers": 2.5})
    refused("model.hidden_size is 32 in your configuration and 16", "model.hidden_size=32")
    refused("24 FFN neurons, which is no multiple of TP x prune.alignment = 16",
            "prune.alignment=16", "prune.strategy=none")  # fmt: skip
    refused("cannot read .*config.json", folder=tmp_path)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused("has no model.safetensors; import reads safetensors")
    (source / "model.safetensors").write_bytes(b"nothing")
    refused("cannot read .*model.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text('{"weight_map": null}')
    refused("index.json has no weight_map")
    index.unlink()
    from safetensors.torch import save_file

    (source / "pytorch_model.bin").rename(source / "model.safetensors")
    tensors = read(source)
    extra = tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}
    save_file(extra, source / "model.safetensors")
    refused("1 tensors that our model has no place for: model.layers.0.self_attn.q_proj.bias")
    save_file(tensors, source / "model.safetensors")
    with RunLock(tmp_path / "run"), pytest.raises(RunFolderError, match="in use by process"):
        import_checkpoint(source, tmp_path / "run")
    import_checkpoint(source, tmp_path / "run")
    with pytest.raises(ConfigError, match="has checkpoints already"):
        import_checkpoint(source, tmp_path / "run")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_number_that_is_none_is_refused_with_its_tensor(tmp_path: Path, value: float) -> None:
    from safetensors.torch import save_file

    source = hf_model(tmp_path / "hf", "llama_mqa")
    sound = read(source)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        broken = sound[name].clone()
        broken.view(-1)[3] = value
        save_file(sound | {name: broken}, source / "model.safetensors", {"format": "pt"})
        with pytest.raises(ConfigError, match=f"hf holds NaN or infinity in {name}"):
            import_checkpoint(source, tmp_path / "run")
        assert not checkpoint.complete(tmp_path / "run")
