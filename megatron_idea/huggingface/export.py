"""Checkpoint -> Hugging Face folder that stock ``transformers`` loads.

Tensors are read from the checkpoint's files directly, one layer at a time, whatever TP x PP x DP
wrote them: no model is built, no process group is started. In memory are one layer and one output
file (``max_shard_bytes``).
"""

from __future__ import annotations

import dataclasses
import hashlib
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

from megatron_idea import __version__, checkpoint, files
from megatron_idea.checkpoint import storage
from megatron_idea.checkpoint.reader import CheckpointTensors
from megatron_idea.checkpoint.state import CheckpointError, TrainState
from megatron_idea.config import Config, ConfigError, ModelConfig
from megatron_idea.data.tokenizer import (
    END_OF_DOCUMENT,
    PADDING,
    ByteTokenizer,
    Tokenizer,
    copy_tokenizer,
    load_tokenizer,
    tokenizer_file,
)
from megatron_idea.huggingface import gguf, moments
from megatron_idea.huggingface import names as huggingface
from megatron_idea.huggingface.card import Facts, HeldOut, Origin, model_card, what_it_is
from megatron_idea.prune.axis import cut, shares_of
from megatron_idea.prune.plan import misfit
from megatron_idea.records.readable import human_widths, megabytes
from megatron_idea.shape import AXES, LAYER_AXES, UNITS, LayerShape, Shape, round_up

DTYPES = {"huggingface": ("fp32", "bf16"), "gguf": tuple(gguf.DTYPES)}
"""By format."""
LAYOUTS = ("padded", "compact")
DEFAULT_SHARD_BYTES = 5e9


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    path: Path
    kind: str
    """The model's class, or its GGUF architecture."""
    full: Shape
    """The enlarged model."""
    live: Shape
    """What of it is left."""
    shape: Shape
    """What is in the folder; units above ``live`` are zeros. The compact layout has as many query
    heads in every layer, however many groups."""
    parameters: int
    bytes: int
    notes: tuple[str, ...] = ()
    """What the user should know of the file."""

    def as_text(self) -> str:
        size = f"{self.parameters:,} parameters, {megabytes(self.bytes)}"
        lines = [f"{self.kind} of {size}: {self.path}"]
        for axis in AXES:
            full, live, here = (of.counts(axis) for of in (self.full, self.live, self.shape))
            if not full == live == here:
                alive = "" if live == here else f", of which live {human_widths(live)}"
                lines.append(
                    f"{UNITS[axis]}s {human_widths(here)}{alive}, of {human_widths(full[:1])}"
                )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Live:
    """The live units of a checkpoint, in order of their numbers: so no layout changes an export."""

    shape: Shape
    """How many."""
    layers: list[int]
    """Positions of the live layers among the stored ones."""
    places: dict[tuple[str, int | None], Tensor]
    """By axis and stored position of the layer, None for channels: places in memory."""
    numbers: dict[str, list[Any]]
    """By axis: numbers in the enlarged model, one list for each live layer, or one."""

    @staticmethod
    def of(path: Path, tensors: CheckpointTensors, stored: Shape, full: Shape) -> _Live:
        """Raises: CheckpointError when these are no units of such a model."""
        names = [f"pruner.{what}.{axis}" for axis in AXES for what in ("alive", "stored")]
        found = tensors.read(names)
        for axis in AXES:
            alive, ids = (found[f"pruner.{what}.{axis}"] for what in ("alive", "stored"))
            if problem := misfit(axis, alive, ids, stored, full):
                raise CheckpointError(f"{path} is damaged: {problem}")
        alive_layers = found["pruner.alive.num_layers"]
        layers = [n for n, layer in enumerate(stored.layers) if alive_layers[layer.number]]
        shape = stored.with_layers(stored.layers[n].number for n in layers)
        places: dict[tuple[str, int | None], Tensor] = {}
        numbers: dict[str, list[Any]] = {
            "num_layers": [layer.number for layer in shape.layers],
        }
        for axis in (*LAYER_AXES, "hidden_size"):
            ids, alive = found[f"pruner.stored.{axis}"], found[f"pruner.alive.{axis}"]
            parts = ids.split(list(stored.counts(axis)))
            rows: list[tuple[int | None, Tensor, Tensor]] = [(None, parts[0], alive)]
            if axis in LAYER_AXES:
                rows = [(n, parts[n], alive[stored.layers[n].number]) for n in layers]
            each = []
            for position, of_layer, lives in rows:
                in_order, order = of_layer.sort()
                here = lives[in_order]
                places[axis, position] = order[here]
                each.append(in_order[here].tolist())
            if not each or not all(each):
                raise CheckpointError(f"{path} is damaged: nothing of {axis} lives in a layer")
            numbers[axis] = each if axis in LAYER_AXES else each[0]
            shape = shape.with_counts(axis, [len(kept) for kept in each])
        return _Live(shape, layers, places, numbers)

    @staticmethod
    def all_of(shape: Shape) -> _Live:
        """Everything of a model that nothing was removed from."""
        places: dict[tuple[str, int | None], Tensor] = {
            (axis, position): torch.arange(count)
            for axis in LAYER_AXES
            for position, count in enumerate(shape.counts(axis))
        }
        places["hidden_size", None] = torch.arange(shape.hidden_size)
        numbers: dict[str, list[Any]] = {
            axis: [list(range(count)) for count in shape.counts(axis)] for axis in LAYER_AXES
        }
        for axis in ("hidden_size", "num_layers"):
            numbers[axis] = list(range(shape.counts(axis)[0]))
        return _Live(shape, list(range(shape.num_layers)), places, numbers)


@dataclass(frozen=True)
class Weights:
    """A checkpoint's weights as a folder of shape ``shape`` has them."""

    path: Path
    tensors: CheckpointTensors
    model: ModelConfig
    stored: Shape
    live: _Live
    shape: Shape
    dtype: torch.dtype
    of: str = ""
    """What is read of each parameter, by what stands before its name: its weight, its fp32 main
    weight, or a moment."""
    exact: bool = True
    """Whether what a Qwen3's one epsilon asks for goes into queries and keys."""

    def in_order(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its Hugging Face name; one layer is in memory at a time."""
        outside = huggingface.whole_model_names(self.model)
        embedding = huggingface.EMBEDDING
        yield outside[embedding], self._read([embedding])[embedding]
        in_layer = huggingface.in_layer(self.model)
        of_folder = zip(self.live.layers, self.shape.layers, strict=True)
        for position, (place, layer) in enumerate(of_folder):
            prefix = f"decoder.layers.{place}."
            found = self._read([prefix + name for name in in_layer])
            tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
            yield from huggingface.layer_to_hf(position, tensors, layer, self.model)
        for name, tensor in self._read([n for n in outside if n != embedding]).items():
            yield outside[name], tensor

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        places = {name: self._place(huggingface.checkpoint_name(name)) for name in names}
        found = self.tensors.read(list(places.values()))
        weights = {name: self._fit(name, found.pop(place)) for name, place in places.items()}
        for name, weight in weights.items():
            if not bool(weight.isfinite().all()):
                raise CheckpointError(
                    f"{self.path} holds NaN or infinity in {name}: nothing is exported; an "
                    "earlier checkpoint may be sound"
                )
        return weights

    def _place(self, name: str) -> str:
        place = self.of + name
        # A bf16 run has no main weights before its first step.
        return name if self.of == moments.MAINS and place not in self.tensors else place

    def _fit(self, name: str, weight: Tensor) -> Tensor:
        """Leave out what is dead and add the zeros that the folder's shape asks for.

        What weights are multiplied by, gradients are divided by, and so are their moments.
        """
        ratio = (self.model.hidden_size / self.shape.hidden_size) ** moments.POWERS.get(self.of, 1)
        for share in shares_of(name, self.model, self.stored, tp=1):
            if share.axis == "hidden_size":
                keep = self.live.places[share.axis, None]
                weight = cut(weight, share, keep, self.shape.hidden_size)
                if weight.dim() == 1:  # stock norms divide by what is stored: ``ResidualNorm``
                    weight = weight.double() * ratio**0.5
            elif share.axis in LAYER_AXES:
                assert share.layer is not None
                layer = self.shape.layers[self.live.layers.index(share.layer)]
                keep = self.live.places[share.axis, share.layer]
                weight = cut(weight, share, keep, getattr(layer, share.axis))
        exact = self.exact and ratio != 1
        if exact and self.model.qk_layernorm and name.endswith(huggingface.QKV):
            groups = self.shape.layers[0].num_query_groups
            weight = huggingface.with_epsilon(weight, groups, self.model.kv_channels, ratio)
        return weight.to(self.dtype)


@dataclass(frozen=True)
class Form:
    """How a folder, or a file, is to be written."""

    format: str
    """``huggingface``: a folder. ``gguf``: one file, for llama.cpp."""
    layout: str
    """``padded``: every layer gets the FFN width and the KV groups of the largest, the rest zeros,
    which change no logit; LlamaForCausalLM, or Qwen3ForCausalLM with QK norm. ``compact``: each
    layer its own, in the ``block_configs`` of Nemotron-NAS, which few engines load."""
    dtype: str
    """``fp32`` or ``bf16``; in a GGUF file also ``fp16`` or ``q8_0``; empty: the run's precision.
    All but ``bf16`` are made of a bf16 run's fp32 main weights."""
    tokenizer: str
    """In place of the run's; empty: that."""
    max_shard_bytes: float | None
    """Of a folder; None: 5 GB."""
    optimizer: bool
    """Write AdamW's state into the folder, too: ``moments.write``."""

    def __post_init__(self) -> None:
        for what, value, legal in (
            ("--format", self.format, tuple(DTYPES)),
            ("--layout", self.layout, LAYOUTS),
            ("--dtype", self.dtype, ("", *DTYPES.get(self.format, ()))),
        ):
            if value not in legal:
                named = ", ".join(each for each in legal if each)
                of = f" of --format {self.format}" if what == "--dtype" else ""
                raise ConfigError(f"{what} is {value!r}; legal values{of}: {named}")
        if self.optimizer and self.format == "gguf":
            raise ConfigError(
                "--optimizer has no meaning for --format gguf: nothing trains such a file"
            )
        if self.max_shard_bytes is None:
            return
        if self.format == "gguf":
            raise ConfigError("--max-shard-gb has no meaning for --format gguf: it is one file")
        if not 0 < self.max_shard_bytes < math.inf:
            raise ConfigError(
                f"--max-shard-gb is {self.max_shard_bytes / 1e9:g}; it must be a finite number "
                "above 0"
            )


def export_checkpoint(
    path: Path,
    out: Path,
    *,
    format: str = "huggingface",
    layout: str = "padded",
    dtype: str = "",
    tokenizer: str = "",
    max_shard_bytes: float | None = None,
    optimizer: bool = False,
    remark: str = "",
) -> Exported:
    """Write the checkpoint ``path`` (or a run's latest) as a Hugging Face model folder ``out``.

    With ``format="gguf"`` as one file.

    Removed units of every axis are left out, and layers numbered anew. Counts are multiples of what
    the run calls legal, so during pruning a few zeros remain.

    Args:
        format, layout, dtype, tokenizer, max_shard_bytes, optimizer: as in ``Form``.
        remark: what the model card says besides.
    Raises: ConfigError for what cannot be exported so, CheckpointError for a checkpoint that
        cannot be read, DataError for the tokenizer. ``out`` is complete or absent.
    """
    form = Form(format, layout, dtype, tokenizer, max_shard_bytes, optimizer)
    found = checkpoint.resolve(path)
    storage.verify(found)
    config = checkpoint.read_config(found)
    state = checkpoint.read_state(found, config)
    if optimizer:
        moments.check(state, found)
    tensors = CheckpointTensors(found)
    live = _Live.of(found, tensors, state.shape, Shape.full(config.model))
    run_dir = found.absolute().parent.parent
    held_out = HeldOut.of_run(run_dir, config, state)
    origin = Origin.of_run(run_dir)
    model = _Model(found, config, state, tensors, live, origin, held_out)
    about = what_it_is(config, state, Shape.full(config.model), live.shape, origin)
    return _export(model, out, form, about, remark)


def export_weights(
    path: Path, config: Config, state: TrainState, out: Path, form: Form, about: str, remark: str
) -> Exported:
    """Write weights alone, as ``checkpoint.save_weights`` leaves them, as such a folder.

    Args:
        config: of the run that they are from.
        state: when they are from, and of which shape; nothing is removed from them.
        about: what the model card says that they are.
    Raises: as ``export_checkpoint``.
    """
    storage.verify(path)
    live = _Live.all_of(state.shape)
    # What a run measures at that step is of its own weights, not of these.
    origin = Origin.of_run(Path(config.run_dir))
    model = _Model(path, config, state, CheckpointTensors(path), live, origin, None)
    return _export(model, out, form, about, remark)


@dataclass(frozen=True)
class _Model:
    """What is exported."""

    path: Path
    config: Config
    state: TrainState
    tensors: CheckpointTensors
    live: _Live
    origin: Origin
    held_out: HeldOut | None


def _export(one: _Model, out: Path, form: Form, about: str, remark: str) -> Exported:
    config, live = one.config, one.live
    dtype, stored = form.dtype or config.training.precision, one.state.shape
    if form.format == "gguf":
        gguf.package()  # to hear now whether it is there
        _check_free_file(out)
    else:
        check_free(out)
    words = _tokenizer_of(config, form.tokenizer)
    shape = _folder_shape(live.shape, stored, config, form.layout)
    weights = Weights(
        one.path, one.tensors, config.model, stored, live, shape,
        torch.bfloat16 if dtype == "bf16" else torch.float32,
        moments.MAINS if dtype != "bf16" and config.training.precision == "bf16" else "",
        # In bf16 the factor would round weights once more, which moves logits more than epsilon.
        exact=dtype != "bf16",
    )  # fmt: skip
    hf_config = huggingface.to_hf_config(
        config.model,
        shape,
        config.training.seq_length,
        str(weights.dtype).removeprefix("torch."),
        words.eod,
        compact=form.layout == "compact",
    )
    if form.format == "huggingface":
        _make_way(out)
    partial = out.parent / f"{out.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_tokenizer(partial, words, config.training.seq_length)
        pad = _named_token(partial, "pad_token")
        if pad not in (None, words.eod):
            hf_config["pad_token_id"] = pad
        ends = _ends_of_text(partial, words.eod)
        special = {
            "bos_token_id": words.eod,
            "eos_token_id": ends,
            "pad_token_id": words.eod if pad is None else pad,
        }
        _write_json(partial / "generation_config.json", special)
        if form.format == "gguf":
            result = _write_file(one, partial / "gguf", out, weights, hf_config, dtype, about)
            (partial / "gguf").rename(out)
        else:
            form = dataclasses.replace(form, dtype=dtype)
            result = _write_folder(one, partial, out, weights, hf_config, form, about, remark)
            partial.rename(out)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result


def _write_file(
    one: _Model,
    file: Path,
    out: Path,
    weights: Weights,
    hf: dict[str, Any],
    dtype: str,
    about: str,
) -> Exported:
    """Write ``file``, which is to become ``out``, beside the tokenizer's files."""
    state, full = one.state, Shape.full(one.config.model)
    said = {
        "name": Path(one.config.run_dir).name,
        "description": f"{about} Step {state.step:,}, {state.consumed_tokens:,} trained tokens. "
        f"Exported by megatron-idea {__version__}.",
        "license": one.origin.license,
    }
    sizes = huggingface.hf_shapes(one.config.model, weights.shape)
    done = gguf.write(file, hf, file.parent, sizes, weights.in_order(), dtype, said)
    kind = f"GGUF ({done.architecture}, {dtype})"
    return Exported(
        out, kind, full, one.live.shape, weights.shape, done.parameters, done.bytes,
        tuple(done.notes),
    )  # fmt: skip


def _write_folder(
    one: _Model, folder: Path, out: Path, weights: Weights, hf: dict[str, Any], form: Form,
    about: str, remark: str,
) -> Exported:  # fmt: skip
    """Write ``folder``, which is to become ``out`` and has the tokenizer's files."""
    full, live = Shape.full(one.config.model), one.live
    max_bytes = form.max_shard_bytes or DEFAULT_SHARD_BYTES
    writer = Shards(folder, max_bytes, "model", {})
    for name, tensor in weights.in_order():
        writer.add(name, tensor)
    writer.close()
    _write_json(folder / "config.json", hf)
    if form.layout == "compact":
        _write_config_class(folder)
    enlarged = {axis: full.counts(axis)[0] for axis in AXES}
    _write_json(folder / "pruning.json", {"enlarged": enlarged, "live": live.numbers})
    notes = []
    if form.optimizer:
        (folder / moments.FOLDER).mkdir()
        step = {"step": str(one.state.adam_step)}
        state_writer = Shards(folder / moments.FOLDER, max_bytes, "optimizer", step)
        notes.append(moments.write(weights, one.config, one.state, state_writer))
    (kind,) = hf["architectures"]
    result = Exported(
        out, kind, full, live.shape, weights.shape, writer.parameters, writer.bytes, tuple(notes)
    )
    facts = Facts(
        about, form.layout, form.dtype, full, live.shape, weights.shape, writer.parameters,
        hashlib.sha256((folder / "pruning.json").read_bytes()).hexdigest(),
        one.origin, one.held_out, bool(gguf.chat_template(folder)),
    )  # fmt: skip
    parts = [model_card(one.config, one.state, facts), remark, _added_tokens(folder)]
    (folder / "README.md").write_text("\n".join(part for part in parts if part), "utf-8")
    return result


def check_free(out: Path) -> None:
    """Raises: ConfigError unless ``out`` can be made: it is not there, or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already; name a folder that does not, or is empty")


def _check_free_file(out: Path) -> None:
    """Raises: ConfigError unless the file ``out`` can be made, and is called what it is."""
    if out.suffix != ".gguf":
        raise ConfigError(f"{out} is to be a GGUF file: give a name that ends in .gguf")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists already; name a file that does not")


def _make_way(out: Path) -> None:
    """An empty folder has to go now, when it costs nothing to hear that it cannot."""
    try:
        if out.exists():
            out.rmdir()
    except OSError as error:  # the current folder, a link, a mounted volume
        raise ConfigError(
            f"{out} cannot be replaced ({error.strerror}); name a folder that does not exist"
        ) from error


def _folder_shape(live: Shape, stored: Shape, config: Config, layout: str) -> Shape:
    """Return what a folder holds: live units, and zeros up to what is legal and the layout needs.

    Raises: ConfigError when the compact layout cannot say it.
    """
    multiples = {axis: goal.final_multiple for axis, goal in config.goals.items()}
    multiples["ffn_hidden_size"] = config.final_ffn_multiple
    shape = live
    for axis in LAYER_AXES:
        counts = [round_up(count, multiples.get(axis, 1)) for count in live.counts(axis)]
        shape = shape.with_counts(axis, max(counts) if layout == "padded" else counts)
    channels = round_up(live.hidden_size, multiples.get("hidden_size", 1))
    shape = shape.with_counts("hidden_size", min(channels, stored.hidden_size))
    heads = max(layer.num_query_groups * layer.heads_per_group for layer in shape.layers)
    layers = tuple(_with_heads(layer, heads) for layer in shape.layers)
    return dataclasses.replace(shape, layers=layers)


def _with_heads(layer: LayerShape, heads: int) -> LayerShape:
    """Give a layer so many query heads, as engines want in all layers of the compact layout."""
    if heads % layer.num_query_groups:
        raise ConfigError(
            f"--layout compact cannot say that layer {layer.number} has {layer.num_query_groups} "
            f"KV groups: its readers divide the model's {heads} query heads by a layer's "
            "n_heads_in_group, a whole number; --layout padded loads everywhere"
        )
    return dataclasses.replace(layer, heads_per_group=heads // layer.num_query_groups)


class Shards:
    """Writes tensors into safetensors files of about equal size, and their index."""

    def __init__(self, folder: Path, max_bytes: float, stem: str, metadata: dict[str, str]) -> None:
        """``stem``: what the files are called. ``metadata``: what each says besides."""
        self.folder, self._max_bytes = folder, max_bytes
        self._stem, self._metadata = stem, {"format": "pt"} | metadata
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
        part = self.folder / f"part-{len(self._files)}"
        try:
            safetensors.torch.save_file(self._pending, part, metadata=self._metadata)
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
            name = f"{self._stem}.safetensors"
            if count > 1:
                name = f"{self._stem}-{index + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"part-{index}").rename(self.folder / name)
            places |= dict.fromkeys(names, name)
        if count > 1:
            _write_json(
                self.folder / f"{self._stem}.safetensors.index.json",
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
                "pad_token": eod if _token_id(folder, PADDING) is None else PADDING,
                "model_max_length": seq_length,
                "clean_up_tokenization_spaces": False,
            },
        )


def _ends_of_text(folder: Path, eod: int) -> int | list[int]:
    """Ids that end a generated text: training's, and the one that a chat model's settings name."""
    other = _named_token(folder, "eos_token")
    return eod if other in (None, eod) else [eod, other]


def _named_token(folder: Path, role: str) -> int | None:
    """Id of the token that the tokenizer's settings name for ``pad_token`` and the like."""
    named = files.read_json(folder / "tokenizer_config.json").get(role)
    if isinstance(named, dict):  # an AddedToken, spelled out
        named = named.get("content")
    return _token_id(folder, named) if named else None


def _token_id(folder: Path, token: str) -> int | None:
    from tokenizers import Tokenizer as Engine

    found: int | None = Engine.from_file(str(folder / "tokenizer.json")).token_to_id(token)
    return found


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


def plain_tokenizer(name: str | Path) -> str:
    """Return the name of a tokenizer, of a tokenizer.json that an export wrote for it ``byte``."""
    file = tokenizer_file(name)
    is_byte = file.is_file() and file.read_bytes() == byte_tokenizer_json().encode()
    return "byte" if is_byte else str(name)


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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
