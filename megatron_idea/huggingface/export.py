"""Checkpoint -> Hugging Face folder that stock ``transformers`` loads.

Tensors are read from the checkpoint's files directly, one layer at a time, whatever TP x PP x DP
wrote them: no model is built, no process group is started. In memory are one layer and one output
file (``max_shard_bytes``).
"""

from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from megatron_idea import __version__, checkpoint
from megatron_idea.checkpoint import storage
from megatron_idea.checkpoint.reader import CheckpointTensors
from megatron_idea.checkpoint.state import CheckpointError, TrainState
from megatron_idea.config import Config, ConfigError
from megatron_idea.data.tokenizer import (
    END_OF_DOCUMENT,
    ByteTokenizer,
    Tokenizer,
    copy_tokenizer,
    load_tokenizer,
)
from megatron_idea.huggingface import names as huggingface
from megatron_idea.prune.plan import misfit
from megatron_idea.records.readable import human_widths, megabytes
from megatron_idea.schedule import phase
from megatron_idea.shape import Shape, round_up

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = ("padded", "compact")


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    path: Path
    live: list[int]
    """Live FFN neurons of every layer."""
    widths: list[int]
    """FFN neurons of every layer in the folder; what is above ``live`` is zeros."""
    parameters: int
    bytes: int

    def as_text(self) -> str:
        (kind,) = json.loads((self.path / "config.json").read_text())["architectures"]
        return (
            f"{kind} of {self.parameters:,} parameters, {megabytes(self.bytes)}: {self.path}\n"
            f"FFN widths {human_widths(self.widths)}, of which live {human_widths(self.live)}"
        )


class _Weights:
    """A checkpoint's weights in one dtype, by the model's names."""

    def __init__(self, path: Path, config: Config, dtype: torch.dtype) -> None:
        self._path, self._tensors = path, CheckpointTensors(path)
        self._dtype = dtype
        # A bf16 run's fp32 main weights; before its first step there are none.
        self._mains = dtype == torch.float32 and config.training.precision == "bf16"

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        stored = {name: self._main(name) for name in names}
        found = self._tensors.read(list(stored.values()))
        weights = {name: found[key].to(self._dtype) for name, key in stored.items()}
        for name, weight in weights.items():
            if not bool(weight.isfinite().all()):
                raise CheckpointError(
                    f"{self._path} holds NaN or infinity in {name}: nothing is exported; an "
                    "earlier checkpoint may be sound"
                )
        return weights

    def _main(self, name: str) -> str:
        main = f"optimizer.main.{name}"
        return main if self._mains and main in self._tensors else name

    def live(self, shape: Shape, full: Shape) -> list[tuple[Tensor, Tensor]]:
        """Return each layer's live neurons: places in memory and numbers, in order of the numbers.

        So no layout changes an export.
        """
        names = [f"pruner.{what}.ffn_hidden_size" for what in ("alive", "stored")]
        alive, stored = self._tensors.read(names).values()
        if problem := misfit("ffn_hidden_size", alive, stored, shape, full):
            raise CheckpointError(f"{self._path} is damaged: {problem}")
        found = []
        of_layers = stored.split(list(shape.counts("ffn_hidden_size")))
        for layer, ids in zip(shape.layers, of_layers, strict=True):
            numbers, places = ids.sort()
            here = alive[layer.number][numbers]
            found.append((places[here], numbers[here]))
        return found


def export_checkpoint(
    path: Path,
    out: Path,
    *,
    layout: str = "padded",
    dtype: str = "",
    tokenizer: str = "",
    max_shard_bytes: float = 5e9,
) -> Exported:
    """Write the checkpoint ``path`` (or a run's latest) as a Hugging Face model folder ``out``.

    Masked neurons are left out. ``padded``: every layer gets the widest layer's width, the rest
    zeros, which change no logit; LlamaForCausalLM, or Qwen3ForCausalLM with QK norm. ``compact``:
    each layer its own width, in the ``block_configs`` of Nemotron-NAS, which few engines load.
    Widths are multiples of what the run calls legal, so during pruning a few zeros remain.

    Args:
        dtype: ``fp32`` (of a bf16 run: its main weights) or ``bf16``; empty: the run's precision.
        tokenizer: in place of the run's.
    Raises: ConfigError for what cannot be exported so, CheckpointError for a checkpoint that
        cannot be read, DataError for the tokenizer. ``out`` is complete or absent.
    """
    found = checkpoint.resolve(path)
    storage.verify(found)
    config = checkpoint.read_config(found)
    dtype = dtype or config.training.precision
    for what, value, legal in (("--layout", layout, LAYOUTS), ("--dtype", dtype, tuple(DTYPES))):
        if value not in legal:
            raise ConfigError(f"{what} is {value!r}; legal values: {', '.join(legal)}")
    if not 0 < max_shard_bytes < math.inf:
        raise ConfigError(
            f"--max-shard-gb is {max_shard_bytes / 1e9:g}; it must be a finite number above 0"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already; name a folder that does not, or is empty")
    _make_way(out)
    words = _tokenizer_of(config, tokenizer)
    state = checkpoint.read_state(found, config)
    weights = _Weights(found, config, DTYPES[dtype])
    live, numbers = zip(*weights.live(state.shape, Shape.full(config.model)), strict=True)
    widths = [round_up(len(kept), config.final_ffn_multiple) for kept in live]
    if layout == "padded":
        widths = [max(widths)] * len(widths)
    hf_config = huggingface.to_hf_config(
        config.model,
        widths,
        config.training.seq_length,
        str(DTYPES[dtype]).removeprefix("torch."),
        words.eod,
        compact=layout == "compact",
    )
    partial = out.parent / f"{out.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        writer = _Shards(partial, max_shard_bytes)
        for name, tensor in _all_tensors(config, weights, live, widths):
            writer.add(name, tensor)
        writer.close()
        _write_json(partial / "config.json", hf_config)
        if layout == "compact":
            _write_config_class(partial)
        _write_tokenizer(partial, words, config.training.seq_length)
        ends = _ends_of_text(partial, words.eod)
        special = {"bos_token_id": words.eod, "eos_token_id": ends, "pad_token_id": words.eod}
        _write_json(partial / "generation_config.json", special)
        counts = [len(kept) for kept in live]
        ids = {str(layer): kept.tolist() for layer, kept in enumerate(numbers)}
        _write_json(
            partial / "pruning.json",
            {"ffn_hidden_size": config.model.ffn_hidden_size, "live_neuron_ids": ids},
        )
        result = Exported(out, counts, widths, writer.parameters, writer.bytes)
        card = _model_card(config, state, result, layout, dtype)
        (partial / "README.md").write_text(card + _added_tokens(partial))
        partial.rename(out)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result


def _make_way(out: Path) -> None:
    """An empty folder has to go now, when it costs nothing to hear that it cannot."""
    try:
        if out.exists():
            out.rmdir()
    except OSError as error:  # the current folder, a link, a mounted volume
        raise ConfigError(
            f"{out} cannot be replaced ({error.strerror}); name a folder that does not exist"
        ) from error


def _all_tensors(
    config: Config, weights: _Weights, live: list[Tensor], widths: list[int]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its Hugging Face name; one layer is in memory at a time."""
    model = config.model
    outside = huggingface.whole_model_names(model)
    yield (
        outside[huggingface.EMBEDDING],
        weights.read([huggingface.EMBEDDING])[huggingface.EMBEDDING],
    )
    in_layer = [
        *huggingface.renamed_in_layer(model), huggingface.QKV, huggingface.FC1, huggingface.FC2,
    ]  # fmt: skip
    for layer, (kept, width) in enumerate(zip(live, widths, strict=True)):
        prefix = f"decoder.layers.{layer}."
        found = weights.read([prefix + name for name in in_layer])
        tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        yield from huggingface.layer_to_hf(layer, tensors, kept, width, model)
    for name, tensor in weights.read([n for n in outside if n != huggingface.EMBEDDING]).items():
        yield outside[name], tensor


class _Shards:
    """Writes tensors into safetensors files of about equal size, and their index."""

    def __init__(self, folder: Path, max_bytes: float) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self.parameters = self.bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self.bytes += tensor.nbytes
        self.parameters += tensor.numel()

    def _flush(self) -> None:
        part = self._folder / f"part-{len(self._files)}"
        try:
            safetensors.torch.save_file(self._pending, part, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # what it makes of an OSError
            raise OSError(str(error)) from error
        part.chmod(0o644)  # safetensors leaves it to its owner alone
        self._files.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Write what is left and give the files their names, which say how many there are."""
        self._flush()
        count = len(self._files)
        places = {}
        for index, names in enumerate(self._files):
            name = "model.safetensors"
            if count > 1:
                name = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            (self._folder / f"part-{index}").rename(self._folder / name)
            places |= dict.fromkeys(names, name)
        if count > 1:
            _write_json(
                self._folder / "model.safetensors.index.json",
                {"metadata": {"total_size": self.bytes}, "weight_map": places},
            )


def _tokenizer_of(config: Config, given: str) -> Tokenizer:
    tokenizer = load_tokenizer(given or config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids and the model "
            f"{config.model.vocab_size}; it is not the one that the model was trained with"
        )
    return tokenizer


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, seq_length: int) -> None:
    """``tokenizer.json`` and its settings; ids are those of training.

    One difference stays: ``transformers`` turns a document's end that is spelled out in a text into
    the special token, training never does.
    """
    if isinstance(tokenizer, ByteTokenizer):
        (folder / "tokenizer.json").write_text(byte_tokenizer_json(), encoding="utf-8")
    else:
        copy_tokenizer(tokenizer.name, folder)
    if not (folder / "tokenizer_config.json").exists():
        eod = tokenizer.decode([tokenizer.eod])
        _write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": eod,
                "eos_token": eod,
                "pad_token": eod,
                "model_max_length": seq_length,
                "clean_up_tokenization_spaces": False,
            },
        )


def _ends_of_text(folder: Path, eod: int) -> int | list[int]:
    """Ids that end a generated text: training's, and the one that a chat model's settings name."""
    from tokenizers import Tokenizer as Engine

    named = json.loads((folder / "tokenizer_config.json").read_text()).get("eos_token")
    if isinstance(named, dict):  # an AddedToken, spelled out
        named = named.get("content")
    other = Engine.from_file(str(folder / "tokenizer.json")).token_to_id(named) if named else None
    return eod if other in (None, eod) else [eod, other]


def _added_tokens(folder: Path) -> str:
    """What the model card says of tokens that the tokenizer puts around a text."""
    from tokenizers import Tokenizer as Engine

    engine = Engine.from_file(str(folder / "tokenizer.json"))
    if not engine.num_special_tokens_to_add(is_pair=False):
        return ""
    added = ", ".join(f"`{token}`" for token in engine.encode("").tokens)
    return (
        f"The tokenizer puts {added} around a text. Training by megatron-idea never did: give "
        "`add_special_tokens=False`.\n"
    )


def byte_tokenizer_json() -> str:
    """The byte-level fallback as a ``tokenizer.json`` with the same ids.

    A BPE without merges whose 256 letters stand for the bytes, each with the byte as its id.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    vocab = {letter: byte for byte, letter in enumerate(_byte_letters())}
    engine = Engine(models.BPE(vocab=vocab, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True)])
    assert engine.token_to_id(END_OF_DOCUMENT) == ByteTokenizer.eod
    return engine.to_str(pretty=True)


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte: itself, or the next free code point above 255."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b if b in printable else 256 + others.index(b)) for b in range(256)]


def _write_config_class(folder: Path) -> None:
    """The config class of the compact layout: no released ``transformers`` has one."""
    from megatron_idea.huggingface import nemotron_nas_config

    source = inspect.getsource(nemotron_nas_config)
    (folder / "configuration_nemotron_nas.py").write_text(source)


def _model_card(
    config: Config, state: TrainState, result: Exported, layout: str, dtype: str
) -> str:
    schedule, prune, model = config.schedule, config.prune, config.model
    tokens, total = state.consumed_tokens, schedule.total_tokens
    zeros = sum(result.widths) - sum(result.live)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [megatron-idea, pruned]",
        "---",
        "",
        f"# {Path(config.run_dir).name}",
        "",
        f"A GPT trained with FFN layers of {model.ffn_hidden_size} neurons that were pruned while "
        "it trained, under one learning-rate curve. Exported by megatron-idea "
        f"{__version__}, layout `{layout}`, {dtype}.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {result.parameters - 3 * zeros * model.hidden_size:,} |",
        f"| layers, hidden size | {model.num_layers}, {model.hidden_size} |",
        f"| attention heads, key/value heads, head size | {model.num_attention_heads}, "
        f"{model.num_query_groups}, {model.kv_channels} |",
        f"| vocabulary | {model.vocab_size:,} |",
        f"| sequence length in training | {config.training.seq_length:,} |",
        f"| trained tokens | {tokens:,} of {total:,} ({phase(schedule, max(tokens, 1))} phase), "
        f"step {state.step:,} |",
        f"| FFN width when training began | {model.ffn_hidden_size:,} |",
        f"| FFN width now | {_brief(result.live)} |",
        f"| FFN width in this folder | {_brief(result.widths)} ({zeros:,} neurons of zeros) |",
        f"| schedule | {schedule.kind}, lr {schedule.lr:g} to {schedule.min_lr:g}, phases "
        f"{schedule.enlarged_fraction:g} / {schedule.prune_fraction:g} / "
        f"{schedule.recover_fraction:g}, removal {schedule.removal} |",
        f"| pruning | strategy {prune.strategy}, target {config.target_ffn_hidden_size:,}, "
        f"element {prune.element}, rows {prune.row_reduce}, matrices {prune.matrix_reduce}, "
        f"ema {prune.ema:g} on {prune.ema_on}, scope {prune.scope} |",
        "",
        "`pruning.json` lists the neurons of every layer that are left, by their index in the "
        "enlarged model.",
        "",
    ]
    if layout == "compact":
        lines += [
            "The layers differ in width, as `block_configs` in `config.json` say. "
            "`transformers` has no model class for that.",
            "",
        ]
    return "\n".join(lines)


def _brief(widths: Sequence[int]) -> str:
    if len(set(widths)) == 1:
        return f"{widths[0]:,} in every layer"
    return ", ".join(map(str, widths))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
