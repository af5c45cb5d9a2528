"""The exported model is the trained one: equal logits in stock transformers, from any layout."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf import ours, read, some_tokens, theirs, trained
from jobs import small
from typer.testing import CliRunner

from megatron_idea import checkpoint, cli
from megatron_idea import config as configuration
from megatron_idea.checkpoint import storage
from megatron_idea.checkpoint.reader import CheckpointTensors
from megatron_idea.checkpoint.state import CheckpointError
from megatron_idea.config import Config, ConfigError
from megatron_idea.data.tokenizer import DataError, copy_tokenizer, load_tokenizer, train_tokenizer
from megatron_idea.evaluation.held_out import load_folder
from megatron_idea.huggingface.export import (
    _with_heads,
    byte_tokenizer_json,
    export_checkpoint,
)
from megatron_idea.huggingface.import_ import import_checkpoint
from megatron_idea.shape import LayerShape, Shape
from megatron_idea.testing import Workers, assert_close, assert_equal

transformers = pytest.importorskip("transformers", reason="needs megatron-idea[export]")

runner = CliRunner()
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def plain(workers: Workers, folder: Path) -> Path:
    """A Llama that one process trained: untied, masked in the middle of its prune phase."""
    trained(
        workers, folder / "plain", 1, 6,
        model={"qk_layernorm": False, "share_embeddings_and_output_weights": False},
    )  # fmt: skip
    return folder / "plain"


MODELS = {
    "llama_tied_gqa": {"qk_layernorm": False},
    "llama_untied_mha": {
        "qk_layernorm": False, "share_embeddings_and_output_weights": False,
        "num_query_groups": 4, "rotary_base": 500, "layernorm_epsilon": 1e-3,
    },
    "qwen3_tied_wide_heads": {"kv_channels": 6, "num_query_groups": 2},
    "qwen3_untied": {"share_embeddings_and_output_weights": False, "rotary_base": 1_000_000},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_ours_from_a_tp2_pp2_checkpoint_in_mid_prune(
    name: str, workers: Workers, tmp_path: Path
) -> None:
    """One ranking over all layers: they differ in live neurons, all of them masked, none gone."""
    _, live = trained(
        workers, tmp_path / "run", 4, 6, model=MODELS[name], parallel=TP2_PP2,
        prune={"scope": "global", "alignment": 1},
    )  # fmt: skip
    assert sum(live) < 48
    result = export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert result.live.counts("ffn_hidden_size") == tuple(live)
    assert result.shape.counts("ffn_hidden_size") == (max(live),) * 2
    logits, model = theirs(tmp_path / "out")
    assert type(model).__name__.lower().startswith(name.split("_")[0])
    assert_close(logits, ours(workers, tmp_path / "run"), "logits", 1e-5)
    assert sum(p.numel() for p in model.parameters()) == result.parameters


def test_layers_of_different_width_are_padded_with_zeros(workers: Workers, tmp_path: Path) -> None:
    _, live = trained(
        workers, tmp_path / "run", 2, 12, 
        parallel={"tensor_model_parallel_size": 2},
        prune={"scope": "global", "compact": True, "alignment": 1, "compaction_block": 2},
    )  # fmt: skip
    state = checkpoint.read_state(checkpoint.resolve(tmp_path / "run"))
    assert list(state.shape.counts("ffn_hidden_size")) == live and live[0] != live[1], (
        "the case needs unequal widths"
    )
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    logits, model = theirs(tmp_path / "out")
    assert_close(logits, ours(workers, tmp_path / "run"), "logits", 1e-5)
    narrow = live.index(min(live))
    mlp = model.model.layers[narrow].mlp
    for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T):
        assert weight.shape == (max(live), 16)
        assert not weight[min(live) :].any() and weight[: min(live)].any(dim=1).all()


# More of everything than `small` has, and no two counts alike.
LARGE = {
    "num_layers": 4, "hidden_size": 24, "ffn_hidden_size": 28, "num_attention_heads": 8,
    "num_query_groups": 4, "kv_channels": 6, "init_method_std": 0.2,
}  # fmt: skip
TARGETS = {
    "ffn_hidden_size": 14, "num_query_groups": 2, "hidden_size": 16, "num_layers": 3,
}  # fmt: skip


def axes_pruned(
    workers: Workers, run: Path, axes: Sequence[str], steps: int, **sections: Any
) -> Config:
    target = dict.fromkeys(TARGETS) | {axis: TARGETS[axis] for axis in axes}
    prune = {"target": target, "channel_alignment": 4, "layer_candidates": 0}
    model = LARGE | sections.pop("model", {})
    config, _ = trained(
        workers, run, sections.pop("world_size", 1), steps, model=model,
        prune=prune | sections.pop("prune", {}), **sections,
    )  # fmt: skip
    return config


PLAIN = ["prune.strategy=none", "prune.alignment=1"]
SHAPES = {
    "groups": (["num_query_groups"], 8, {"qk_layernorm": False}),
    "channels": (["hidden_size"], 6, {"qk_layernorm": False, "layernorm_epsilon": 1e-2}),
    "channels_qk": (["hidden_size"], 8, {"layernorm_epsilon": 1e-1}),
    "layers": (["num_layers"], 6, {"share_embeddings_and_output_weights": False}),
    "all": ([*TARGETS], 6, {"qk_layernorm": False}),
    "all_qk": ([*TARGETS], 8, {"share_embeddings_and_output_weights": False}),
}


@pytest.mark.parametrize(
    ("name", "compact"), [*((name, True) for name in SHAPES), ("all", False), ("all_qk", False)]
)
def test_logits_are_ours_whatever_axis_was_pruned(
    name: str, compact: bool, workers: Workers, tmp_path: Path
) -> None:
    """Six steps: in the middle of it. Eight: to the end. As zeros, and cut out."""
    axes, steps, model = SHAPES[name]
    config = axes_pruned(
        workers, tmp_path / "run", axes, steps, model=model, prune={"compact": compact}
    )
    result = export_checkpoint(tmp_path / "run", tmp_path / "out")
    full = Shape.full(config.model)
    for axis in TARGETS:
        live, here = (max(shape.counts(axis)) for shape in (result.live, result.shape))
        assert (live < full.counts(axis)[0]) == (axis in axes), axis
        multiple = {"ffn_hidden_size": 2, "hidden_size": 4}.get(axis, 1)
        assert here == -(-live // multiple) * multiple, axis
        assert steps < 8 or axis not in axes or live == TARGETS[axis]
    logits, made = theirs(tmp_path / "out")
    assert_close(logits, ours(workers, tmp_path / "run"), "logits", 1e-5)
    assert made.config.head_dim == 6 and made.config.num_hidden_layers == result.shape.num_layers
    assert sum(p.numel() for p in made.parameters()) == result.parameters
    assert result.shape.parameters(config.model).total == result.parameters
    epsilon = config.model.layernorm_epsilon * 24 / result.shape.hidden_size
    assert made.config.rms_norm_eps == pytest.approx(epsilon)
    odd = result.shape.hidden_size % made.config.num_attention_heads
    kind = "qwen3" if config.model.qk_layernorm else "mistral" if odd else "llama"
    assert made.config.model_type == kind
    # What transformers opens, our own reader does, too.
    back = import_checkpoint(tmp_path / "out", tmp_path / "back", overrides=PLAIN)
    assert_close(ours(workers, back.path), logits, "logits of the run that goes on", 1e-5)


def test_logits_of_all_axes_are_ours_from_tp2_pp2(workers: Workers, tmp_path: Path) -> None:
    axes_pruned(
        workers, tmp_path / "run", [*TARGETS], 7, world_size=4, parallel=TP2_PP2,
        prune={"scope": "global", "compact": True, "compaction_block": 2},
    )  # fmt: skip
    result = export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert result.live.num_layers < 4
    assert load_folder(tmp_path / "out").config.num_hidden_layers == result.live.num_layers
    assert_close(theirs(tmp_path / "out")[0], ours(workers, tmp_path / "run"), "logits", 1e-5)
    left = json.loads((tmp_path / "out/pruning.json").read_text())["live"]
    assert len(left["hidden_size"]) == result.live.hidden_size
    assert left["num_layers"] == [layer.number for layer in result.live.layers]
    for axis in ("ffn_hidden_size", "num_query_groups"):
        assert [len(of) for of in left[axis]] == list(result.live.counts(axis))
    card = (tmp_path / "out/README.md").read_text()
    for axis in TARGETS:
        assert f"{axis} {TARGETS[axis]}" in card and f"| {axis} | {LARGE[axis]} |" in card


def test_layers_of_different_groups_are_padded_with_zeros_or_said_in_blocks(
    workers: Workers, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    axes_pruned(
        workers, run, ["num_query_groups"], 8, model={"qk_layernorm": False},
        prune={"scope": "global", "compact": True},
    )  # fmt: skip
    result = export_checkpoint(run, tmp_path / "padded")
    groups = result.live.counts("num_query_groups")
    assert groups == (4, 2, 1, 1), "the case needs groups that differ"
    expected = ours(workers, run)
    assert_close(theirs(tmp_path / "padded")[0], expected, "logits", 1e-5)
    export_checkpoint(run, tmp_path / "compact", layout="compact")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "compact", trust_remote_code=True)
    blocks = [block.attention.n_heads_in_group for block in config.block_configs]
    assert [config.num_attention_heads // n for n in blocks] == list(groups)
    with pytest.raises(ConfigError, match=r"layer 5 has 3 KV groups.* 8 query heads.* padded"):
        _with_heads(LayerShape(5, 24, 3, 2), 8)
    for layout in ("padded", "compact"):
        back = import_checkpoint(tmp_path / layout, tmp_path / f"of_{layout}", overrides=PLAIN)
        assert back.shape.counts("num_query_groups") == groups
        assert_close(ours(workers, back.path), expected, "logits", 1e-5)


def test_no_layout_changes_the_export(workers: Workers, tmp_path: Path) -> None:
    """Tensor-parallel ranks hold neurons in another order; an export sorts them."""
    for world_size, parallel in ((1, {}), (4, TP2_PP2)):
        trained(
            workers, tmp_path / f"run{world_size}", world_size, 4, parallel=parallel,
            prune={"compact": True},
        )  # fmt: skip
        export_checkpoint(tmp_path / f"run{world_size}", tmp_path / f"out{world_size}")
    one, four = (tmp_path / f"out{n}" for n in (1, 4))
    assert (one / "pruning.json").read_text() == (four / "pruning.json").read_text()
    assert (one / "config.json").read_text() == (four / "config.json").read_text()
    assert_close(
        theirs(one)[0], theirs(four)[0], "logits", 1e-4
    )  # trained in another order of sums


def test_a_bf16_run_gives_its_weights_or_its_main_weights(workers: Workers, tmp_path: Path) -> None:
    trained(workers, tmp_path / "run", 2, 6, training={"precision": "bf16"})
    for dtype in ("bf16", "fp32"):
        export_checkpoint(tmp_path / "run", tmp_path / dtype, dtype=dtype)
    export_checkpoint(tmp_path / "run", tmp_path / "default")
    assert json.loads((tmp_path / "default/config.json").read_text())["torch_dtype"] == "bfloat16"
    half, full = (read(tmp_path / dtype) for dtype in ("bf16", "fp32"))
    name = "model.embed_tokens.weight"
    main = CheckpointTensors(checkpoint.resolve(tmp_path / "run"))
    key = "optimizer.main.embedding.word_embeddings.weight"
    assert_equal(full[name], main.read([key])[key])
    assert not torch.equal(full[name], full[name].bfloat16().float())
    for tensor in half:
        assert_equal(half[tensor], full[tensor].bfloat16(), tensor)
    # bf16 activations are rounded in other places: the weights are equal, logits nearly.
    expected = ours(workers, tmp_path / "run")
    difference = theirs(tmp_path / "bf16", torch.bfloat16)[0] - expected
    assert difference.norm() < 2e-2 * expected.norm()


def test_a_bf16_run_without_some_channels_is_nearly_itself(
    workers: Workers, tmp_path: Path
) -> None:
    """Gains are rounded once, after the factor; queries and keys keep their weights."""
    run = tmp_path / "run"
    axes_pruned(
        workers, run, ["hidden_size"], 8, training={"precision": "bf16"}, prune={"compact": True}
    )
    for dtype in ("bf16", "fp32"):
        export_checkpoint(run, tmp_path / dtype, dtype=dtype)
    half, full = (read(tmp_path / dtype) for dtype in ("bf16", "fp32"))
    stored = CheckpointTensors(checkpoint.resolve(run))
    gain = "decoder.final_layernorm.weight"
    exact = stored.read([gain])[gain].double() * (24 / 16) ** 0.5
    assert_equal(half["model.norm.weight"], exact.bfloat16())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert_close(full[name], half[name].float() * (24 / 16) ** 0.5, name, 4e-3)
    expected = ours(workers, run)
    difference = theirs(tmp_path / "bf16", torch.bfloat16)[0] - expected
    assert difference.norm() < 2e-2 * expected.norm()


def test_large_models_are_split_over_files(plain: Path, tmp_path: Path) -> None:
    export_checkpoint(plain, tmp_path / "one")
    export_checkpoint(plain, tmp_path / "many", max_shard_bytes=8_000)
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    whole = read(tmp_path / "one")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert set(index["weight_map"].values()) == set(files)
    assert_equal(theirs(tmp_path / "many")[0], theirs(tmp_path / "one")[0])


def test_the_compact_layout_says_each_layers_width(workers: Workers, tmp_path: Path) -> None:
    """transformers has no class for it: our own, from the folder's tensors and widths alone."""
    _, live = trained(
        workers, tmp_path / "run", 1, 6, model={"qk_layernorm": False},
        prune={"scope": "global", "alignment": 1},
    )  # fmt: skip
    assert live[0] != live[1]
    result = export_checkpoint(tmp_path / "run", tmp_path / "out", layout="compact")
    assert result.shape.counts("ffn_hidden_size") == tuple(live)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.model_type == "nemotron-nas" and config.architectures == ["DeciLMForCausalLM"]
    assert [block.ffn.intermediate_size for block in config.block_configs] == live
    assert not hasattr(config.block_configs[0].ffn, "ffn_mult")
    assert config.num_attention_heads // config.block_configs[0].attention.n_heads_in_group == 2
    llama = transformers.LlamaConfig(**{k: v for k, v in json.loads(
        (tmp_path / "out/config.json").read_text()).items() if k not in ("model_type", "auto_map",
        "block_configs", "architectures")})  # fmt: skip
    model = transformers.LlamaForCausalLM(llama).eval()
    for layer, width in zip(model.model.layers, live, strict=True):
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            part.weight = torch.nn.Parameter(torch.empty(width, 16))
        layer.mlp.down_proj.weight = torch.nn.Parameter(torch.empty(16, width))
    missing = model.load_state_dict(read(tmp_path / "out"), strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys  # tied
    with torch.no_grad():
        logits = model(torch.from_numpy(some_tokens())).logits
    assert_close(logits, ours(workers, tmp_path / "run"), "logits", 1e-5)


def test_compact_widths_that_allow_it_are_said_as_ffn_mult() -> None:
    from megatron_idea.huggingface.names import block_width, to_hf_config
    from megatron_idea.huggingface.nemotron_nas_config import NemotronNASConfig

    model = small(model={"qk_layernorm": False, "hidden_size": 48}).model
    widths = [256, 1024, 11_008]
    layer = LayerShape(0, 256, 2, 2)
    layers = tuple(dataclasses.replace(layer, ffn_hidden_size=width) for width in widths)
    shape = Shape(48, layers)
    blocks = to_hf_config(model, shape, 8, "float32", 0, compact=True)["block_configs"]
    for width, block in zip(widths, blocks, strict=True):
        for digits in (16, 6):  # some engines round it
            wanted = int(2 * round(block["ffn"]["ffn_mult"], digits) * 48 / 3)
            assert -(-wanted // 256) * 256 == width == block_width(block["ffn"], 48)
        assert set(block["ffn"]) == {"ffn_mult", "no_op", "replace_with_linear"}, "MLX's words"
    read = NemotronNASConfig(block_configs=blocks, hidden_size=48, num_attention_heads=4)
    assert read.intermediate_size == 11_008


TEXTS = ["def f(x):\n    return x  # Ünïcode ☃\n", "", "\x00\x7f\xa0 tab\t", "<a> [b] don't"]


def test_both_kinds_of_tokenizer_give_the_ids_of_training(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    bpe = train_tokenizer([tmp_path / "text.txt"], 264, tmp_path / "bpe.json")
    for given, mine in (("", load_tokenizer("byte")), (str(tmp_path / "bpe.json"), bpe)):
        out = tmp_path / f"out_{mine.vocab_size}"
        export_checkpoint(plain, out, tokenizer=given)
        loaded = transformers.AutoTokenizer.from_pretrained(out)
        for text in TEXTS:
            ids = mine.encode(text)
            assert loaded(text)["input_ids"] == ids
            assert loaded.decode(ids) == mine.decode(ids) == text
            assert load_tokenizer(out).encode(text) == ids
        assert loaded.eos_token_id == load_tokenizer(out).eod == mine.eod
        settings = json.loads((out / "generation_config.json").read_text())
        assert settings["eos_token_id"] == mine.eod
        # What masks padding must leave the end of a text, where the tokenizer has two tokens.
        collate = transformers.DataCollatorForLanguageModeling(loaded, mlm=False)
        rows = [{"input_ids": [*mine.encode(text), mine.eod]} for text in ("a", "abc")]
        last = collate(rows)["labels"][:, -1].tolist()
        pad = settings["pad_token_id"]
        read = json.loads((out / "config.json").read_text())
        assert loaded.pad_token_id == pad
        if mine is bpe:
            assert read["pad_token_id"] == pad != mine.eod and last == [-100, mine.eod]
        else:
            assert "pad_token_id" not in read and pad == mine.eod and last == [-100, -100]


def test_a_text_ends_where_training_or_the_tokenizer_says(plain: Path, tmp_path: Path) -> None:
    """A chat model's turns end with a token of their own."""
    from tokenizers import AddedToken, processors
    from tokenizers import Tokenizer as Engine

    engine = Engine.from_str(byte_tokenizer_json())
    engine.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    engine.post_processor = processors.TemplateProcessing(
        "<|im_end|> $A", None, [("<|im_end|>", 257)]
    )
    (tmp_path / "chat").mkdir()
    engine.save(str(tmp_path / "chat/tokenizer.json"))
    for name, said in (
        ("word", "<|im_end|>"),
        ("token", {"content": "<|im_end|>"}),
        ("none", None),
    ):
        (tmp_path / "chat/tokenizer_config.json").write_text(json.dumps({"eos_token": said}))
        export_checkpoint(plain, tmp_path / name, tokenizer=str(tmp_path / "chat"))
        settings = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert settings["eos_token_id"] == ([256, 257] if said else 256)
    assert (
        "The tokenizer puts `<|im_end|>` around a text" in (tmp_path / "word/README.md").read_text()
    )
    export_checkpoint(plain, tmp_path / "plain")
    assert "around a text" not in (tmp_path / "plain/README.md").read_text()


def test_a_folder_that_cannot_be_written_is_said_before_and_leaves_nothing(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path / "here")
    for out, says in (
        (Path("."), "cannot be replaced .*; name a folder that does not exist"),
        (tmp_path / "link", "cannot be replaced .Not a directory"),
        (tmp_path / "file/out", "cannot write .*out: .*Not a directory"),
    ):
        with pytest.raises(ConfigError, match=says):
            export_checkpoint(plain, out)
    export_checkpoint(plain, tmp_path / "here")  # empty, by its name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "here", "link"]

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ConfigError, match=r"cannot write .*out: .*No space left"):
        export_checkpoint(plain, tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]


def test_a_number_that_is_none_is_not_exported(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = "decoder.layers.1.mlp.linear_fc1.weight"
    read_tensors = CheckpointTensors.read

    def damaged(self: CheckpointTensors, names: Any) -> Any:
        found = read_tensors(self, names)
        if broken in found:
            found[broken].view(-1)[0] = float("nan")
        return found

    monkeypatch.setattr(CheckpointTensors, "read", damaged)
    with pytest.raises(CheckpointError, match=f"NaN or infinity in {broken}: nothing is exported"):
        export_checkpoint(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_runs_tokenizer_is_found_beside_it_from_anywhere(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration's own path is relative, and leads nowhere from here."""
    run = tmp_path / "moved"
    shutil.copytree(plain, run)
    found = checkpoint.latest(run)
    assert found is not None
    config = configuration.load(found / "config.yaml")
    config = configuration.replace(config, data={"tokenizer": "data/own.json"})
    (found / "config.yaml").write_text(configuration.to_yaml(config))
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    bpe = train_tokenizer([tmp_path / "text.txt"], 264, tmp_path / "bpe.json")
    assert checkpoint.read_config(found).data.tokenizer == "data/own.json"  # an older run
    copy_tokenizer(tmp_path / "bpe.json", run / "tokenizer")
    monkeypatch.chdir(run.parent)
    for path in (found, found.relative_to(run.parent)):
        kept = checkpoint.read_config(path).data.tokenizer
        assert load_tokenizer(kept).digest == bpe.digest
    monkeypatch.chdir(found)
    assert load_tokenizer(checkpoint.read_config(Path(".")).data.tokenizer).digest == bpe.digest
    given = checkpoint.read_config(found, ["data.tokenizer=byte"])
    assert given.data.tokenizer == "byte"


def test_the_byte_tokenizer_knows_every_byte() -> None:
    from tokenizers import Tokenizer as Engine

    engine = Engine.from_str(byte_tokenizer_json())
    for character in map(chr, range(0x20, 0x3000, 7)):
        assert engine.encode(character).ids == list(character.encode())


def test_the_command_writes_a_folder_with_a_model_card(plain: Path, tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["export", str(plain), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM" in result.stdout
    card = (tmp_path / "out/README.md").read_text()
    left = json.loads((tmp_path / "out/pruning.json").read_text())
    assert left["enlarged"]["ffn_hidden_size"] == 24 and left["live"]["num_layers"] == [0, 1]
    ids = left["live"]["ffn_hidden_size"]
    assert all(of == sorted(set(of)) and len(of) < 24 for of in ids)
    live = len(ids[0])
    assert f"neurons {live + live % 2}" in result.stdout and "of 24" in result.stdout
    for said in (
        "576 of 1,152 (prune phase)", "step 6", "target ffn_hidden_size 12",
        f"| ffn_hidden_size | 24 | {live} | {live + live % 2} |", "| num_layers | 2 | 2 | 2 |",
    ):  # fmt: skip
        assert said in card


def test_what_cannot_be_exported_is_said_and_leaves_nothing(
    plain: Path, tmp_path: Path, workers: Workers
) -> None:
    out = tmp_path / "out"

    def refused(path: Path, says: str, kind: type = ConfigError, **options: Any) -> None:
        with pytest.raises(kind, match=says):
            export_checkpoint(path, options.pop("out", out), **options)
        assert [p for p in tmp_path.iterdir() if p.name.startswith("out")] == []

    refused(tmp_path / "nowhere", "neither a checkpoint nor a run")
    refused(
        plain,
        "--layout is 'dense'; legal values: padded, compact",
        layout="dense",
    )
    refused(plain, "--dtype is 'fp16'; legal values of .*: fp32, bf16$", dtype="fp16")
    refused(plain, "exists already", out=plain)
    refused(plain, "must be a finite number above 0", max_shard_bytes=0)
    refused(plain, "no tokenizer at", DataError, tokenizer=str(tmp_path / "none.json"))
    damaged = tmp_path / "damaged"
    shutil.copytree(plain, damaged)
    tensors = max(damaged.glob("checkpoints/*/*.distcp"), key=lambda p: p.stat().st_size)
    tensors.write_bytes(tensors.read_bytes()[:1000])
    refused(damaged, "is damaged", storage.DamagedError)
    from megatron_idea.huggingface.names import to_hf_config

    model = small().model
    with pytest.raises(ConfigError, match="have no QK norm"):
        to_hf_config(model, Shape.full(model), 8, "float32", 0, compact=True)


def uneven_model(kind: str, folder: Path, narrow: int, **shape: int) -> Any:
    """A random model, also saved as ``hf``: layers of 512 neurons and of ``narrow``, then zeros."""
    torch.manual_seed(0)
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[kind]
    made = model(
        config(
            vocab_size=264, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.1, max_position_embeddings=128, **shape,
        )
    ).eval()  # fmt: skip
    mlp = made.model.layers[1].mlp
    for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T):
        weight.data[narrow:] = 0
    made.save_pretrained(folder / "hf")
    train_tokenizer([Path(__file__)], 264, folder / "hf/tokenizer.json")
    return made


def imported_widths(folder: Path) -> tuple[int, ...]:
    imported = import_checkpoint(folder / "hf", folder / "run")
    return imported.shape.counts("ffn_hidden_size")


READ_VLLM = """
import json, sys, vllm
folder, ids = sys.argv[1], json.loads(sys.argv[2])
if __name__ == "__main__":
    model = vllm.LLM(folder, dtype="float32", enforce_eager=True, trust_remote_code=True,
                     max_model_len=128, max_num_seqs=1, max_logprobs=-1)
    wanted = vllm.SamplingParams(temperature=0, max_tokens=32, prompt_logprobs=-1, ignore_eos=True)
    (answer,) = model.generate({"prompt_token_ids": ids}, wanted)
    rows = [[row[i].logprob for i in range(len(row))] for row in answer.prompt_logprobs[1:]]
    json.dump([rows, list(answer.outputs[0].token_ids)], open("said.json", "w"))
"""
READ_MLX = """
import json, sys, mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step
folder, ids = sys.argv[1], json.loads(sys.argv[2])
model, _ = load(folder, tokenizer_config={"trust_remote_code": True})
logits = model(mx.array([ids]))[0]
rows = (logits - mx.logsumexp(logits, axis=-1, keepdims=True))[:-1].tolist()
greedy = [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=32)]
json.dump([rows, greedy], open("said.json", "w"))
"""
ENGINES = {"VLLM_PYTHON": READ_VLLM, "MLX_PYTHON": READ_MLX}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", ["llama padded", "qwen3 padded", "llama compact"])
@pytest.mark.parametrize("narrow", [256, 384])
def test_an_engine_says_what_transformers_says(
    engine: str, case: str, narrow: int, tmp_path: Path
) -> None:
    """Log probabilities of a prompt, and the 32 tokens that follow it greedily."""
    kind, layout = case.split()
    if not os.environ.get(engine):
        pytest.skip(f"set {engine} to a python that has the engine")
    if (engine, layout, narrow) == ("MLX_PYTHON", "compact", 384):
        pytest.skip("MLX reads ffn_mult, which says multiples of 256 only")
    expected = uneven_model(kind, tmp_path, narrow, hidden_size=128, head_dim=32)
    assert imported_widths(tmp_path) == (512, narrow)
    export_checkpoint(tmp_path / "run", tmp_path / "out", layout=layout)
    ids = some_tokens().reshape(-1).tolist()
    environment = os.environ | {"PYTHONSAFEPATH": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    (tmp_path / "read.py").write_text(ENGINES[engine])
    command = [os.environ[engine], "read.py", "out", json.dumps(ids)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    rows, greedy = json.loads((tmp_path / "said.json").read_text())
    text = list(ids)
    with torch.no_grad():
        for _ in range(32):
            text.append(int(expected(torch.tensor([text])).logits[0, -1].argmax()))
        wanted = expected(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    assert_close(torch.tensor(rows), wanted, "log probabilities", 2e-5)
    assert greedy == text[len(ids) :]


LLAMA_CPP, LLAMA_CPP_PYTHON = (os.environ.get(name) for name in ("LLAMA_CPP", "LLAMA_CPP_PYTHON"))
READ_GGUF = """
import sys, numpy, llama_cpp
path, out, text = sys.argv[1:]
fp32 = 0  # of the cache; llama.cpp's own choice is fp16
model = llama_cpp.Llama(path, n_ctx=64, logits_all=True, verbose=False, type_k=fp32, type_v=fp32)
ids = model.tokenize(text.encode(), add_bos=False)
model.eval(ids)
numpy.savez(out, ids=ids, logits=model.scores[: len(ids)])
"""


@pytest.mark.skipif(
    not (LLAMA_CPP and LLAMA_CPP_PYTHON),
    reason="set LLAMA_CPP (a source tree) and LLAMA_CPP_PYTHON (a python that has llama_cpp)",
)
@pytest.mark.parametrize("case", ["llama padded", "qwen3 padded", "llama compact"])
def test_gguf_logits_are_ours_with_the_script_of_the_docs(case: str, tmp_path: Path) -> None:
    kind, layout = case.split()
    docs = (Path(__file__).parents[1] / "docs/export.md").read_text()
    (script,) = re.findall(r"runs this block -->\n```python\n(.*?)```", docs, re.DOTALL)
    (tmp_path / "to_gguf.py").write_text(script)
    made = uneven_model(kind, tmp_path, 256, hidden_size=64, head_dim=16)
    bpe = load_tokenizer(tmp_path / "hf")
    assert imported_widths(tmp_path) == (512, 256)
    export_checkpoint(tmp_path / "run", tmp_path / "out", layout=layout)
    text = "def main(x):\n    return x + 1  # don't Ünï"
    safe = os.environ | {"PYTHONSAFEPATH": "1"}
    to_gguf = [sys.executable, "to_gguf.py", LLAMA_CPP, "out", "model.gguf"]
    subprocess.run(to_gguf, cwd=tmp_path, env=safe, check=True, capture_output=True)
    read_gguf = [LLAMA_CPP_PYTHON, "-c", READ_GGUF, "model.gguf", "read.npz", text]
    subprocess.run(read_gguf, cwd=tmp_path, env=safe, check=True, capture_output=True)
    found = np.load(tmp_path / "read.npz")
    assert found["ids"].tolist() == bpe.encode(text)
    with torch.no_grad():
        expected = made(torch.tensor([bpe.encode(text)])).logits[0]
    assert_close(torch.from_numpy(found["logits"]), expected, "logits", 1e-5)
