"""Checkpoint -> one GGUF file, as llama.cpp reads it, through the PyPI package ``gguf`` alone.

What the file has to say, and in which order rows have to lie, is what llama.cpp's converter and its
loader (``conversion/llama.py``, ``src/llama-vocab.cpp``, ``src/models/deci.cpp``) agree on. Weights
are written one tensor at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_idea import files
from megatron_idea.config import ConfigError
from megatron_idea.huggingface.names import BLOCK_CONFIG_MODEL_TYPE, block_width

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen3": "qwen3", BLOCK_CONFIG_MODEL_TYPE: "deci",
}  # fmt: skip
"""By ``model_type``: a Mistral without a window is a Llama, Nemotron-NAS blocks are a ``deci``."""
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
_LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0}
"""Number that a format holds: a block of Q8_0 has a scale in fp16."""
_MOST_TEMPLATE_BYTES = 1 << 20

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_PRE_TOKENIZERS = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((_LLAMA_3, "bytes"), True): "llama-bpe",
    ((_LLAMA_3, "bytes"), False): "dbrx",
    ((_QWEN_2, "bytes"), False): "qwen2",
}
"""llama.cpp's name, by the steps of a pre-tokenizer and the model's ``ignore_merges``."""
_NO_MERGE = "\u00ff \u00ff"
"""A merge that no text asks for: the letter is that of the byte 0xFF, which is never in UTF-8.
llama.cpp does not load a file without merges."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF has it."""

    tokens: list[str]
    """By id, each another; those that stand for nothing are called ``[PADn]``."""
    types: list[str]
    """Of each token, by the names of ``gguf.TokenType``."""
    merges: list[str]
    pre: str
    """What llama.cpp calls the way in which text is split before merges."""
    notes: list[str] = field(default_factory=list)
    """What of ``tokenizer.json`` the file does not say."""


@dataclass(frozen=True)
class Written:
    """What ``write`` wrote."""

    architecture: str
    parameters: int
    bytes: int
    notes: list[str]


def package() -> Any:
    """Import ``gguf``. Raises: ConfigError that says how to install it."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            "--format gguf is written with the package gguf: pip install 'megatron-idea[gguf]'"
        ) from error
    return gguf


def write(
    path: Path,
    hf: dict[str, Any],
    folder: Path,
    sizes: Iterable[tuple[str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: str,
    about: dict[str, str],
) -> Written:
    """Write a model as the file ``path``.

    Norms are fp32 whatever the others are. A matrix of Q8_0 whose rows are not whole blocks of 32
    is fp16, as llama.cpp's own tools have it.

    Args:
        hf: the model's ``config.json``; layers that differ have ``block_configs``.
        folder: has ``tokenizer.json`` and its settings.
        sizes: name and shape of every tensor by its Hugging Face name, in the order of ``tensors``.
        dtype: one of ``DTYPES``.
        about: ``name``, ``description``, ``license`` of the model; empty ones are left out.
    Raises: ConfigError for a tokenizer or a number that such a file cannot hold.
    """
    gguf = package()
    architecture = ARCHITECTURES[hf["model_type"]]
    vocabulary = read_vocabulary((folder / "tokenizer.json").read_text("utf-8"), hf["vocab_size"])
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, text in about.items():
            writer.add_string(f"general.{key}", text)
        share = "ALL" if dtype == "fp32" else "MOSTLY"
        writer.add_file_type(gguf.LlamaFileType[f"{share}_{DTYPES[dtype]}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_sizes(writer, hf)
        _add_vocabulary(writer, vocabulary, hf, folder)
        tensor_names = gguf.get_tensor_name_map(
            {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture],
            hf["num_hidden_layers"],
        )
        kinds: dict[str, str] = {}
        parameters, rest = 0, 0
        fp32 = np.dtype(np.float32)  # of no account beside the kind
        for name, size in sizes:
            kinds[name] = _kind(dtype, size)
            rest += kinds[name] == "F16" and dtype == "q8_0"
            kind = gguf.GGMLQuantizationType[kinds[name]]
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            count = math.prod(size)
            parameters += count
            theirs = tensor_names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor_info(theirs, size, fp32, count // block * block_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (name, kind), (given, tensor) in zip(kinds.items(), tensors, strict=True):
            assert name == given, "tensors are not in the order of their sizes"
            if architecture != "qwen3" and name.endswith(("q_proj.weight", "k_proj.weight")):
                tensor = in_pairs(tensor, hf["head_dim"])
            writer.write_tensor_data(_encoded(name, tensor, kind))
    finally:
        writer.close()
    notes = list(vocabulary.notes)
    if rest:
        notes.append(f"{rest} matrices are fp16: their rows are not whole blocks of 32")
    return Written(architecture, parameters, path.stat().st_size, notes)


def in_pairs(weight: Tensor, channels: int) -> Tensor:
    """Reorder the rows of queries or keys for a RoPE that rotates neighbours, not halves.

    Row i of a head's first half comes before row i of its second: 0, c/2, 1, c/2 + 1, ...

    Args:
        weight: [heads x channels, H].
    """
    return weight.unflatten(0, (-1, 2, channels // 2)).transpose(1, 2).flatten(0, 2)


def _kind(dtype: str, size: Sequence[int]) -> str:
    if len(size) == 1:
        return "F32"
    return "F16" if dtype == "q8_0" and size[-1] % 32 else DTYPES[dtype]


def _encoded(name: str, tensor: Tensor, kind: str) -> Any:
    """Return a tensor's bytes as an array. Raises: ConfigError where a number is too large."""
    largest = float(tensor.abs().max())
    if largest > _LARGEST.get(kind, math.inf):
        raise ConfigError(
            f"{name} has a weight of size {largest:.3g}, and {kind} ends at {_LARGEST[kind]:g}; "
            "--dtype bf16 and fp32 hold it"
        )
    match kind:
        case "F32":
            return tensor.float().contiguous().numpy()
        case "F16":
            return tensor.half().contiguous().numpy()
        case "BF16":
            return tensor.bfloat16().contiguous().view(torch.int16).numpy()
    gguf = package()
    array = tensor.float().contiguous().numpy()
    return gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind])


def _add_sizes(writer: Any, hf: dict[str, Any]) -> None:
    heads = hf["num_attention_heads"]
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_head_count(heads)
    if blocks := hf.get("block_configs"):
        writer.add_feed_forward_length([block_width(b["ffn"], hf["hidden_size"]) for b in blocks])
        writer.add_head_count_kv([heads // b["attention"]["n_heads_in_group"] for b in blocks])
    else:
        writer.add_feed_forward_length(hf["intermediate_size"])
        writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(hf["head_dim"])
    writer.add_value_length(hf["head_dim"])
    writer.add_rope_dimension_count(hf["head_dim"])
    writer.add_rope_freq_base(hf["rope_theta"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_vocab_size(hf["vocab_size"])


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, hf: dict[str, Any], folder: Path) -> None:
    types = package().TokenType
    writer.add_tokenizer_model("gpt2")  # byte-level BPE, whoever's
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([types[each] for each in vocabulary.types])
    writer.add_token_merges(vocabulary.merges)
    eod = hf["eos_token_id"]
    writer.add_bos_token_id(eod)
    writer.add_eos_token_id(eod)
    # Training puts nothing around a text, whatever a tokenizer's template says.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    generation = files.read_json(folder / "generation_config.json")
    writer.add_pad_token_id(generation["pad_token_id"])
    if isinstance(generation["eos_token_id"], list):
        writer.add_eot_token_id(generation["eos_token_id"][1])
    if template := chat_template(folder):
        writer.add_chat_template(template)


def chat_template(folder: Path) -> str:
    """Return the chat template beside a tokenizer, the default one of several; empty if none.

    Raises: ConfigError for one that is not text, or too long.
    """
    file = folder / "chat_template.jinja"
    try:
        if file.is_file():
            return files.read_bytes(file, _MOST_TEMPLATE_BYTES).decode("utf-8")
        given = files.read_json(folder / "tokenizer_config.json").get("chat_template")
    except (files.UnsafeFileError, UnicodeDecodeError) as error:
        raise ConfigError(f"the tokenizer's chat template cannot be read: {error}") from error
    if isinstance(given, list):
        named = [one for one in given if isinstance(one, dict) and one.get("name") == "default"]
        given = named[0].get("template") if named else None
    return given if isinstance(given, str) else ""


def read_vocabulary(text: str, size: int) -> Vocabulary:
    """Say a ``tokenizer.json`` as GGUF does, for a model of ``size`` ids.

    Raises: ConfigError that lists what cannot be said.
    """
    from tokenizers import Tokenizer

    engine = Tokenizer.from_str(text)
    said = json.loads(engine.to_str())
    model, added = said["model"], said["added_tokens"]
    steps = _steps(said["pre_tokenizer"])
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    whole_words = bool(model.get("ignore_merges"))
    pre = _PRE_TOKENIZERS.get((steps, whole_words), "")
    if not merges and steps == ("bytes",) and not whole_words:
        pre, merges = "gpt-2", [_NO_MERGE]  # without merges it does not matter how text is split
    ids = engine.get_vocab(with_added_tokens=True)
    faults = list(_faults(model, said["normalizer"], added, pre))
    if len(set(ids.values())) < len(ids):
        faults.append("two of its tokens have one id")
    if any(merge.count(" ") != 1 for merge in merges):
        faults.append("its merges have blanks in them")
    if faults:
        raise ConfigError(
            f"GGUF cannot say this tokenizer: {'; '.join(faults)}. --format huggingface keeps "
            "tokenizer.json as it is"
        )
    tokens, types = [""] * size, ["NORMAL"] * size
    for token, i in ids.items():
        tokens[i] = token
    for one in added:
        types[one["id"]] = "CONTROL" if one["special"] else "USER_DEFINED"
    for i in sorted(set(range(size)) - set(ids.values())):
        tokens[i], types[i] = f"[PAD{i}]", "UNUSED"
        while tokens[i] in ids:
            tokens[i] += "_"
    notes = []
    if said["normalizer"]:
        notes.append("text has to be in Unicode's normal form C: llama.cpp does not bring it there")
    return Vocabulary(tokens, types, merges, pre, notes)


def _faults(model: dict[str, Any], normalizer: Any, added: list[Any], pre: str) -> Iterable[str]:
    if model["type"] != "BPE" or model.get("byte_fallback"):
        how = "BPE with byte fallback" if model["type"] == "BPE" else model["type"]
        yield f"it is {how}, and what is written is byte-level BPE"
        return
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            yield f"its model has {key} {model[key]!r:.100}"
    if normalizer and normalizer["type"] != "NFC":
        yield f"it changes text first, by {normalizer['type']}"
    if any(one["lstrip"] or one["rstrip"] or one["single_word"] for one in added):
        yield "it has tokens that swallow blanks or stand as words alone"
    if not pre:
        known = ", ".join(dict.fromkeys(_PRE_TOKENIZERS.values()))
        yield f"it splits text in none of the ways that are known here ({known})"


def _steps(pre_tokenizer: Any) -> tuple[str, ...]:
    """Describe how text is split before merges: a regular expression, or a word for it."""
    if not pre_tokenizer:
        return ()
    if pre_tokenizer["type"] == "Sequence":
        return tuple(s for one in pre_tokenizer["pretokenizers"] for s in _steps(one))
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return ("words" if use_regex else "bytes",)
        case {"type": "Digits", "individual_digits": True}:
            return ("digits",)
        case {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}:
            return (rule,)
    return (str(pre_tokenizer["type"]), "unknown")
