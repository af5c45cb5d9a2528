"""One model, two spellings: our tensors and settings as Hugging Face's Llama and Qwen3 have them.

A Llama is our model without ``qk_layernorm``, a Qwen3 the same with it. Both rotate the two halves
of a head (RoPE), normalise with RMSNorm, gate with SiLU and have no biases, so weights are renamed
and cut, never changed here. A Mistral without a window is a Llama whose heads need not divide the
hidden size. Names on our side are those that ``named_parameters`` gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_idea import files
from megatron_idea.config import ConfigError, ModelConfig
from megatron_idea.shape import LayerShape, Shape, round_up

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT = "output_layer.weight"
WHOLE_MODEL = {
    EMBEDDING: "model.embed_tokens.weight",
    FINAL_NORM: "model.norm.weight",
    OUTPUT: "lm_head.weight",
}
"""Tensors outside of layers, ours to theirs."""
RENAMED = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
}
"""A layer's tensors that have one counterpart each."""
QK_NORMS = {
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
QKV, PROJ = "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"
FC1, FC2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"
_O_PROJ = "self_attn.o_proj.weight"
_QKV_PARTS = tuple(f"self_attn.{x}_proj.weight" for x in "qkv")
_FFN_PARTS = tuple(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down"))

BLOCK_CONFIG_MODEL_TYPE = "nemotron-nas"
_FFN_MULT_UNIT = 256


def whole_model_names(model: ModelConfig) -> dict[str, str]:
    """List the tensors outside of layers that this model has, ours to theirs."""
    tied = model.share_embeddings_and_output_weights
    return {ours: hf for ours, hf in WHOLE_MODEL.items() if not (tied and ours == OUTPUT)}


def checkpoint_name(parameter: str) -> str:
    """Return a parameter's name in checkpoints: the one that Transformer Engine gives it."""
    for ours, fused in (
        (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
        (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
    ):
        parameter = parameter.replace(ours, fused)
    return parameter


def renamed_in_layer(model: ModelConfig) -> dict[str, str]:
    """List a layer's tensors that are renamed alone, ours to theirs."""
    return RENAMED | QK_NORMS if model.qk_layernorm else RENAMED


def in_layer(model: ModelConfig) -> list[str]:
    """List our names of all of a layer's tensors."""
    return [*renamed_in_layer(model), QKV, PROJ, FC1, FC2]


def split_qkv(weight: Tensor, groups: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Part Megatron's rows, one query group after another as [queries.., key, value].

    Args:
        weight: [groups x (heads of one + 2) x channels, H].
        channels: of a head.
    Returns: q [groups, heads of one, channels, H], k and v [groups, 1, channels, H]; views.
    """
    grouped = weight.view(groups, -1, channels, weight.shape[-1])
    q, k, v = grouped.split([grouped.shape[1] - 2, 1, 1], dim=1)
    return q, k, v


def join_qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Undo ``split_qkv``."""
    return torch.cat([q, k, v], dim=1).flatten(0, 2)


def with_epsilon(qkv: Tensor, groups: int, channels: int, ratio: float) -> Tensor:
    """Let norms of queries and keys compute the same with an epsilon that is ``ratio`` of theirs.

    A model has one epsilon for all norms, and those of the residual stream ask for another where
    channels come or go. norm(s x, s^2 eps) = norm(x, eps).
    """
    q, k, v = split_qkv(qkv, groups, channels)
    return join_qkv(q * ratio**0.5, k * ratio**0.5, v)


def layer_to_hf(
    position: int, tensors: dict[str, Tensor], layer: LayerShape, model: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield one layer of ours under its Hugging Face names.

    Args:
        position: the layer's number in the folder.
        tensors: the layer's, without the ``decoder.layers.N.`` before their names.
        layer: as the folder is to have it. Query heads that ``tensors`` have not got are zeros at
            the end of each group, and so are their columns of the output projection.
    """
    prefix = f"model.layers.{position}."
    groups, channels = layer.num_query_groups, model.kv_channels
    for ours, name in renamed_in_layer(model).items():
        yield prefix + name, tensors[ours]
    q, k, v = split_qkv(tensors[QKV], groups, channels)
    missing = layer.heads_per_group - q.shape[1]
    q = F.pad(q, (0, 0, 0, 0, 0, missing))
    for name, part in zip(_QKV_PARTS, (q, k, v), strict=True):
        yield prefix + name, part.flatten(0, 2)
    of_heads = tensors[PROJ].unflatten(1, (groups, -1, channels))
    yield prefix + _O_PROJ, F.pad(of_heads, (0, 0, 0, missing)).flatten(1)
    gate, up = tensors[FC1].chunk(2)
    of_ffn = names_of(position, "ffn_hidden_size")
    yield from zip(of_ffn, (gate, up, tensors[FC2]), strict=True)


def hf_shapes(model: ModelConfig, shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor of the Hugging Face model of this shape, in order."""
    hidden, channels = shape.hidden_size, model.kv_channels
    outside = whole_model_names(model)
    yield outside.pop(EMBEDDING), (model.vocab_size, hidden)
    for position, layer in enumerate(shape.layers):
        prefix = f"model.layers.{position}."
        keys = layer.num_query_groups * channels
        queries = keys * layer.heads_per_group
        for name in renamed_in_layer(model).values():
            yield prefix + name, (channels,) if name in QK_NORMS.values() else (hidden,)
        for name, rows in zip(_QKV_PARTS, (queries, keys, keys), strict=True):
            yield prefix + name, (rows, hidden)
        yield prefix + _O_PROJ, (hidden, queries)
        for name in _FFN_PARTS[:2]:
            yield prefix + name, (layer.ffn_hidden_size, hidden)
        yield prefix + _FFN_PARTS[2], (hidden, layer.ffn_hidden_size)
    for ours, name in outside.items():
        yield name, (hidden,) if ours == FINAL_NORM else (model.vocab_size, hidden)


def is_hugging_face(path: Path) -> bool:
    """Tell whether transformers can read it: an export, or another model."""
    return (path / "config.json").is_file()


def check_folder(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Make sure that a model folder is data: plain files, safetensors, no code from elsewhere.

    Returns: ``config.json``, and the files of weights.
    Raises: ConfigError.
    """
    try:
        for entry in folder.iterdir():
            if not entry.is_dir():
                files.inside(folder, entry.name)
        config = files.read_json(files.inside(folder, "config.json"))
        weights = _weight_files(folder)
    except (OSError, files.UnsafeFileError) as error:
        raise ConfigError(f"cannot read {folder}: {error}") from error
    if (folder / "adapter_config.json").exists():
        raise ConfigError(f"{folder} is an adapter of another model: merge the two first")
    kernel = _kernel_of(config)
    if kernel:
        raise ConfigError(
            f"{folder}: config.json asks for code from the Hub, {kernel!r:.100}; remove that line"
        )
    return config, weights


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        places = files.read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(map(files.plain_name, places.values())):
            raise ConfigError(f"{index} has no weight_map: it says no tensor's file")
        names = sorted(set(places.values()))
    absent = [name for name in names if not (folder / name).exists()]
    if absent or not names:
        raise ConfigError(
            f"{folder} has no {(absent or ['tensors'])[0]}; import reads safetensors, which "
            "transformers writes with save_pretrained"
        )
    return [files.inside(folder, name) for name in names]


_IMPLEMENTATIONS = re.compile(r"_?(attn|experts)_implementation(_internal)?")


def _kernel_of(config: Any, depth: int = 0) -> str:
    """A repository that transformers would load code from; empty when there is none."""
    if depth > 8 or not isinstance(config, dict):
        return ""
    for key, value in config.items():
        of_parts = list(value.values()) if isinstance(value, dict) else [value]
        if _IMPLEMENTATIONS.fullmatch(str(key)):
            for part in of_parts:
                if "/" in str(part):
                    return str(part)
        found = _kernel_of(value, depth + 1)
        if found:
            return found
    return ""


def names_of(position: int, axis: str) -> tuple[str, ...]:
    """Name the tensors of a layer that units have parts of: rows of all, columns of the last."""
    parts = _FFN_PARTS if axis == "ffn_hidden_size" else (*_QKV_PARTS, _O_PROJ)
    return tuple(f"model.layers.{position}.{name}" for name in parts)


def to_hf_config(
    model: ModelConfig, shape: Shape, seq_length: int, dtype: str, eod: int, compact: bool
) -> dict[str, Any]:
    """Make the ``config.json`` of a model of this shape, of as many query heads in every layer.

    Its norms divide by the stored hidden size and ours by the enlarged one, so it has another
    epsilon where channels were removed; ``ResidualNorm`` says why.

    Raises: ConfigError for a model that the layout cannot hold.
    """
    (heads,) = {layer.num_query_groups * layer.heads_per_group for layer in shape.layers}
    kind, architecture = "llama", "LlamaForCausalLM"
    if model.qk_layernorm:
        kind, architecture = "qwen3", "Qwen3ForCausalLM"
    elif shape.hidden_size % heads and not compact:  # which transformers' Llama refuses
        kind, architecture = "mistral", "MistralForCausalLM"
    result: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": kind,
        "torch_dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": max(shape.counts("ffn_hidden_size")),
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(shape.counts("num_query_groups")),
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": seq_length,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.layernorm_epsilon * (model.hidden_size / shape.hidden_size),
        "rope_theta": float(model.rotary_base),
        # transformers 5 asks for this, 4 for the line above.
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "attention_bias": False,
        "attention_dropout": model.attention_dropout,
        "use_cache": True,
        "bos_token_id": eod,
        "eos_token_id": eod,
    }
    if kind == "llama":
        result |= {"mlp_bias": False, "pretraining_tp": 1}
    if kind == "mistral":
        result["sliding_window"] = None
    if compact:
        _to_block_configs(result, shape, model)
    return result


def _to_block_configs(config: dict[str, Any], shape: Shape, model: ModelConfig) -> None:
    """Turn a Llama's config into one with sizes for each layer, as Nemotron-NAS models have it.

    A block says its width as ``ffn_mult``, which all engines read, when every width is a multiple
    of 256, and else as ``intermediate_size``, which vLLM alone reads. Never both: MLX takes no
    words but those it knows.
    """
    if model.qk_layernorm:
        raise ConfigError(
            "--layout compact writes Nemotron-NAS blocks, which have no QK norm, and this model "
            "was trained with model.qk_layernorm=true; --layout padded loads everywhere"
        )
    with_mult = all(width % _FFN_MULT_UNIT == 0 for width in shape.counts("ffn_hidden_size"))
    blocks = []
    for layer in shape.layers:
        width = layer.ffn_hidden_size
        ffn: dict[str, Any] = {"intermediate_size": width}
        if with_mult:  # aim at the middle of what is rounded up to the width
            ffn = {"ffn_mult": 1.5 * (width - _FFN_MULT_UNIT // 2) / shape.hidden_size}
        of_attention = {"n_heads_in_group": layer.heads_per_group}
        switches = {"no_op": False, "replace_with_linear": False}
        blocks.append({"attention": of_attention | switches, "ffn": ffn | switches})
    del config["intermediate_size"]
    config |= {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": BLOCK_CONFIG_MODEL_TYPE,
        "auto_map": {"AutoConfig": "configuration_nemotron_nas.NemotronNASConfig"},
        "block_configs": blocks,
    }


def block_width(ffn: dict[str, Any], hidden_size: int) -> int:
    """Return a block's FFN width; where ``ffn_mult`` is given, by the formula that engines have."""
    if ffn.get("ffn_mult"):
        return round_up(int(2 * ffn["ffn_mult"] * hidden_size / 3), _FFN_MULT_UNIT)
    return int(ffn["intermediate_size"])


_HEAD_DIM = {"qwen3": 128}  # where config.json leaves it out; others' follow from the hidden size


def from_hf_config(hf: dict[str, Any]) -> tuple[dict[str, Any], Shape]:
    """Read ``config.json`` as the ``model`` section of our configuration and the folder's shape.

    Layers of the compact layout differ in ``heads_per_group``, too: all have as many query heads.

    Raises: ConfigError that names all that is not supported.
    """
    ill = list(_ill_typed(hf))
    if ill:
        raise ConfigError(f"config.json: {'; '.join(ill)}")
    kind = hf.get("model_type")
    legal = ("llama", "qwen3", "mistral", BLOCK_CONFIG_MODEL_TYPE)
    if kind not in legal:
        raise ConfigError(
            f"config.json is of model_type {kind!r} ({', '.join(hf.get('architectures') or [])}); "
            f"import reads dense {', '.join(legal)} models"
        )
    needed = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
    needed += [name for name in ("num_key_value_heads", "head_dim") if hf.get(name) is not None]
    if kind != BLOCK_CONFIG_MODEL_TYPE:
        needed.append("intermediate_size")
    if kind == "mistral":  # leaving it out means 8 there
        needed.append("num_key_value_heads")
    missing = [name for name in needed if not files.is_whole(hf.get(name), 1, _MOST[name])]
    if missing:
        raise ConfigError(f"config.json gives no whole number above 0 for {', '.join(missing)}")
    faults = list(_unsupported(hf))
    if faults:
        raise ConfigError(f"this {kind} model has what ours has not: {'; '.join(faults)}")
    layers, heads, hidden = hf["num_hidden_layers"], hf["num_attention_heads"], hf["hidden_size"]
    if kind == BLOCK_CONFIG_MODEL_TYPE:
        blocks = hf["block_configs"]
        per_group = [block["attention"]["n_heads_in_group"] for block in blocks]
        widths = [block_width(block["ffn"], hidden) for block in blocks]
    else:
        per_group = [heads // (hf.get("num_key_value_heads") or heads)] * layers
        widths = [int(hf["intermediate_size"])] * layers
    sizes = zip(widths, per_group, strict=True)
    shape = Shape(
        hidden,
        tuple(LayerShape(n, width, heads // per, per) for n, (width, per) in enumerate(sizes)),
    )
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    model = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": max(widths),
        "num_attention_heads": heads,
        "num_query_groups": heads // min(per_group),
        "kv_channels": hf.get("head_dim") or _HEAD_DIM.get(str(kind), hidden // heads),
        "vocab_size": hf["vocab_size"],
        "share_embeddings_and_output_weights": bool(hf.get("tie_word_embeddings", False)),
        "qk_layernorm": kind == "qwen3",
        "rotary_base": int(hf.get("rope_theta") or rope.get("rope_theta") or 10000),
        "layernorm_epsilon": float(hf.get("rms_norm_eps", 1e-6)),
        "init_method_std": float(hf.get("initializer_range", 0.02)),
        "attention_dropout": float(hf.get("attention_dropout") or 0.0),
    }
    return model, shape


# Far above any model: a list of all tensors is made before the files are asked for them.
_MOST = {"num_hidden_layers": 10_000, "num_attention_heads": 1 << 20} | dict.fromkeys(
    ("hidden_size", "vocab_size", "num_key_value_heads", "head_dim", "intermediate_size"), 1 << 31
)
_WORDS = ("hidden_act", "dtype", "torch_dtype")
_NUMBERS = (
    "rope_theta", "rms_norm_eps", "initializer_range", "attention_dropout", "partial_rotary_factor",
    "max_position_embeddings",
)  # fmt: skip
_ROPES = ("rope_scaling", "rope_parameters")


def _ill_typed(hf: dict[str, Any]) -> Iterator[str]:
    """Values of a config.json that are not of their type; one that is not there is of any."""
    for name in _WORDS:
        if hf.get(name) is not None and not isinstance(hf[name], str):
            yield f"{name} is {hf[name]!r:.100}, not a word"
    for name in _NUMBERS:
        if hf.get(name) is not None and not files.is_number(hf[name]):
            yield f"{name} is {hf[name]!r:.100}, not a number"
    for name in ("architectures", "layer_types"):
        if not _list_of(str, hf.get(name) or []):
            yield f"{name} is {hf[name]!r:.100}, not a list of words"
    for name in _ROPES:
        rope = hf.get(name) or {}
        if not isinstance(rope, dict):
            yield f"{name} is {rope!r:.100}, not an object"
            continue
        for part in ("rope_theta", "partial_rotary_factor"):
            if part in rope and not files.is_number(rope[part]):
                yield f"{name}.{part} is {rope[part]!r:.100}, not a number"
    blocks = hf.get("block_configs") or []
    if not _list_of(dict, blocks) or not all(
        set(block) == {"attention", "ffn"} and _list_of(dict, list(block.values()))
        for block in blocks
    ):
        yield "block_configs is not a list of objects with attention and ffn"
        return
    for block in blocks:
        ffn, per_group = block["ffn"], block["attention"].get("n_heads_in_group")
        if (
            not files.is_number(ffn.get("ffn_mult") or 1)
            or not 0 <= (ffn.get("ffn_mult") or 1) < 1000
            or not files.is_whole(ffn.get("intermediate_size") or 1, 1, _MOST["intermediate_size"])
            or not files.is_whole(per_group or 1, 1, _MOST["num_attention_heads"])
        ):
            yield f"block_configs has {block!r:.100}"


def _list_of(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _unsupported(hf: dict[str, Any]) -> Iterator[str]:
    """What of a config.json our model cannot compute, with what would be legal."""
    act = hf.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        yield f"hidden_act is {act!r} (legal: silu)"
    for name in ("attention_bias", "mlp_bias", "rope_interleaved", "use_sliding_window"):
        if hf.get(name):
            yield f"{name} is true (legal: false)"
    for name in _ROPES:
        rope = hf.get(name) or {}
        how = rope.get("rope_type") or rope.get("type") or "default"
        if how != "default":
            yield f"{name} is of type {how!r} (legal: default, unscaled)"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            yield f"{name}.partial_rotary_factor is {rope['partial_rotary_factor']} (legal: 1)"
        if rope.get("rope_theta", 1) != int(rope.get("rope_theta", 1)):
            yield f"{name}.rope_theta is {rope['rope_theta']} (legal: whole numbers)"
    theta = hf.get("rope_theta") or 1
    nested = (hf.get("rope_parameters") or {}).get("rope_theta", theta)
    if theta != int(theta):
        yield f"rope_theta is {theta} (legal: whole numbers)"
    elif "rope_theta" in hf and nested != theta:  # transformers 4 reads one, 5 the other
        yield f"rope_theta is {theta}, and {nested} in rope_parameters (legal: the same)"
    if hf.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor is {hf['partial_rotary_factor']} (legal: 1)"
    other = set(hf.get("layer_types") or ()) - {"full_attention"}
    if other:
        yield f"layer_types has {', '.join(sorted(other))} (legal: full_attention)"
    if hf.get("quantization_config"):
        yield "the weights are quantized (legal: fp32, bf16, fp16)"
    if hf["model_type"] == "mistral" and hf.get("sliding_window", 4096) is not None:
        yield f"sliding_window is {hf.get('sliding_window', 4096)} (legal: null)"
    heads = hf["num_attention_heads"]
    if heads % (hf.get("num_key_value_heads") or 1):
        yield f"num_attention_heads is {heads} (legal: multiples of num_key_value_heads)"
    if (hf.get("head_dim") or 2) % 2:
        yield f"head_dim is {hf['head_dim']} (legal: even numbers)"
    if hf["model_type"] == BLOCK_CONFIG_MODEL_TYPE:
        yield from _unsupported_blocks(hf)


def _unsupported_blocks(hf: dict[str, Any]) -> Iterator[str]:
    blocks = hf.get("block_configs") or []
    if len(blocks) != hf["num_hidden_layers"]:
        yield f"block_configs has {len(blocks)} entries for {hf['num_hidden_layers']} layers"
        return
    if any(
        b[part].get(word) for b in blocks for part in b for word in ("no_op", "replace_with_linear")
    ):
        yield "layers without attention or FFN (no_op, replace_with_linear)"
    elif not all(block["attention"].get("n_heads_in_group") for block in blocks):
        yield "block_configs without attention.n_heads_in_group"
    elif any(hf["num_attention_heads"] % b["attention"]["n_heads_in_group"] for b in blocks):
        yield f"num_attention_heads is {hf['num_attention_heads']}, no multiple of n_heads_in_group"
    elif not all(b["ffn"].get("ffn_mult") or b["ffn"].get("intermediate_size") for b in blocks):
        yield "block_configs without ffn.ffn_mult and ffn.intermediate_size"
