"""Hugging Face folder -> a run that ``train`` goes on with, its FFNs widened if wanted.

The run's first checkpoint is of step 0: weights, no optimizer state, no token consumed. Every dense
Llama or Qwen3 in safetensors can be read; what our model cannot compute is refused by name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from megatron_idea import checkpoint
from megatron_idea import config as configuration
from megatron_idea.checkpoint.state import TrainState
from megatron_idea.config import Config, ConfigError, ModelConfig, validate
from megatron_idea.data.tokenizer import copy_tokenizer, load_tokenizer
from megatron_idea.engine.distributed import start_distributed, stop_distributed
from megatron_idea.engine.model import named_parameters
from megatron_idea.engine.trainable import assemble
from megatron_idea.huggingface import names as huggingface
from megatron_idea.prune.pruner import Pruner
from megatron_idea.records.lock import RunLock
from megatron_idea.records.readable import human_widths
from megatron_idea.shape import Shape, round_up

LONGEST_DEFAULT_SEQUENCE = 2048


@dataclass(frozen=True)
class Imported:
    """What an import wrote."""

    folder: Path
    """Where the model came from."""
    path: Path
    """The checkpoint of step 0."""
    config_path: Path
    widths_before: list[int]
    """FFN neurons of every layer in the folder; trailing zeros of a padded export not counted."""
    widths: list[int]
    notes: list[str]
    """What the user should know before training."""

    def as_text(self) -> str:
        before = f"{human_widths(self.widths_before)} in {self.folder}"
        lines = [
            f"FFN widths {human_widths(self.widths)} ({before}): {self.path}",
            f"megatron-idea train {self.config_path}",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def import_checkpoint(
    folder: Path,
    run_dir: Path,
    config_path: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    enlarge_ffn: float = 1.0,
) -> Imported:
    """Write run ``run_dir`` with the model of ``folder`` as its checkpoint of step 0.

    The model section of the configuration comes from ``config.json``; data, schedule and the rest
    from ``config_path`` and ``overrides``. Where these are silent the precision is the folder's
    (fp16 is read as fp32), the tokenizer a copy of its ``tokenizer.json``, and the width to prune
    back to the folder's own. A bf16 run takes weights rounded to bf16.

    ``enlarge_ffn`` widens every FFN to about so many times its width, the nearest legal one, and
    leaves what the model computes as it is; ``widen`` says how.

    Holds the model in memory, in bf16 with fp32 main weights besides, and once more to write it.

    Raises: ConfigError for a folder, a configuration or a width that cannot be; RunFolderError for
        a ``run_dir`` that another process writes to.
    """
    hf, weights = huggingface.check_folder(folder)
    model, hf_widths = huggingface.from_hf_config(hf)
    tensors = _Folder(folder, weights)
    tensors.check(ModelConfig(**model), hf_widths)
    multiple = configuration.load(config_path, list(overrides)).ffn_multiple
    old = _without_padding(tensors, hf_widths, multiple)
    widths = _enlarged(old, enlarge_ffn, multiple)
    model["ffn_hidden_size"] = max(widths)

    base: dict[str, Any] = {"model": model, "training": _training(hf), "prune": {}}
    if enlarge_ffn > 1:
        base["prune"]["target"] = {"ffn_hidden_size": max(old)}
    elif config_path is None and not any(o.startswith("prune.") for o in overrides):
        base["prune"]["strategy"] = "none"
    its_tokenizer = str(run_dir / checkpoint.TOKENIZER)
    if (folder / "tokenizer.json").is_file():
        base["data"] = {"tokenizer": its_tokenizer}
    config = configuration.load(config_path, list(overrides), base)
    config = configuration.replace(config, run_dir=str(run_dir))
    _check(config, model, widths, folder)
    with RunLock(run_dir):
        if checkpoint.complete(run_dir):
            raise ConfigError(f"{run_dir} has checkpoints already; name a folder that has none")
        if config.data.tokenizer == its_tokenizer:
            load_tokenizer(folder)  # to hear now whether it can be used
            copy_tokenizer(folder, run_dir / checkpoint.TOKENIZER)
        path = _write(config, _Ours(tensors, config, old), widths)
        (run_dir / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
    return Imported(folder, path, run_dir / "config.yaml", old, widths, _notes(config, hf))


def _write(config: Config, ours: _Ours, widths: list[int]) -> Path:
    """Build the model in this process, fill it, save it."""
    alone = configuration.load(None, checkpoint.ONE_PROCESS, dataclasses.asdict(config))
    groups = start_distributed(alone.parallel, config.training.seed)
    shape = Shape.full(config.model).with_counts("ffn_hidden_size", widths)
    try:
        trainable = assemble(alone.sections, groups, shape, initialize=False, gradients=False)
        with torch.no_grad():
            for name, parameter in named_parameters(trainable.chunks):
                parameter.copy_(ours.read(name, tuple(parameter.shape)))
        return checkpoint.save(
            config, trainable, Pruner(config, trainable), TrainState(0, 0, shape)
        )
    finally:
        stop_distributed()


_FLOATS = ("F32", "BF16", "F16", "F64")


class _Folder:
    """The safetensors of a model folder, by name; one tensor is read at a time."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                opened = safetensors.safe_open(file, framework="pt")
            except Exception as error:  # the library's own type, and OSError
                raise ConfigError(f"cannot read {file}: {error}") from error
            self._files |= dict.fromkeys(opened.keys(), opened)

    def check(self, model: ModelConfig, widths: Sequence[int]) -> None:
        """Raises: ConfigError unless the tensors are those of ``model``, no more and no less."""
        shapes = dict(huggingface.hf_shapes(model, widths))
        wanted = shapes.keys()
        missing = sorted(wanted - self._files.keys())
        if missing:
            raise ConfigError(f"{self._folder} lacks {len(missing)} tensors, as {missing[0]}")
        # A tied model may repeat its embedding; old Llamas carry the RoPE frequencies.
        known = {huggingface.WHOLE_MODEL[huggingface.OUTPUT]}
        unknown = [
            name
            for name in sorted(self._files.keys() - wanted - known)
            if not name.endswith("rotary_emb.inv_freq")
        ]
        if unknown:
            raise ConfigError(
                f"{self._folder} has {len(unknown)} tensors that our model has no place for: "
                f"{', '.join(unknown[:3])}"
            )
        for name, shape in shapes.items():
            part = self._files[name].get_slice(name)
            if tuple(part.get_shape()) != shape or part.get_dtype() not in _FLOATS:
                raise ConfigError(
                    f"{self._folder} has {name} as {part.get_dtype()} {part.get_shape()}; "
                    f"config.json says {list(shape)}, and legal are {', '.join(_FLOATS)}"
                )

    def read(self, name: str) -> Tensor:
        """Raises: ConfigError when a number of it is none: it would pass into everything."""
        tensor: Tensor = self._files[name].get_tensor(name)
        if not bool(tensor.isfinite().all()):
            raise ConfigError(
                f"{self._folder} holds NaN or infinity in {name}; the folder is damaged, or the "
                "model had diverged when it was saved"
            )
        return tensor

    def last(self, name: str, axis: int) -> Tensor:
        """The last row (axis 0) or column (axis 1) of a matrix."""
        part = self._files[name].get_slice(name)
        return part[-1:] if axis == 0 else part[:, -1:]


class _Ours:
    """The folder's tensors under our names, FFNs at their new width."""

    def __init__(self, tensors: _Folder, config: Config, old: list[int]) -> None:
        self._tensors, self._model, self._seed = tensors, config.model, config.training.seed
        self._old = old
        self._layer_ffn = functools.lru_cache(maxsize=1)(self._ffn)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = self._find(huggingface.checkpoint_name(name), shape)
        assert tuple(found.shape) == shape, (name, found.shape, shape)
        return found

    def _find(self, name: str, shape: tuple[int, ...]) -> Tensor:
        in_layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        if in_layer is None:
            return self._tensors.read(huggingface.WHOLE_MODEL[name])
        layer, name = int(in_layer[1]), name[in_layer.end() :]
        if name == huggingface.QKV:
            q, k, v = (self._tensors.read(part) for part in huggingface.qkv_names(layer))
            return huggingface.join_qkv(q, k, v, self._model)
        if name == huggingface.FC1:
            return self._layer_ffn(layer, shape[0] // 2)[0]
        if name == huggingface.FC2:
            return self._layer_ffn(layer, shape[1])[1]
        theirs = huggingface.renamed_in_layer(self._model)[name]
        return self._tensors.read(f"model.layers.{layer}.{theirs}")

    def _ffn(self, layer: int, width: int) -> tuple[Tensor, Tensor]:
        gate, up, down = (self._tensors.read(name) for name in huggingface.ffn_names(layer))
        old = self._old[layer]
        generator = torch.Generator()
        digest = hashlib.sha256(f"{self._seed} widened layer {layer}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:7], "little"))
        gate, up, down = widen(gate[:old], up[:old], down[:, :old], width, generator)
        return torch.cat([gate, up]), down


def widen(
    gate: Tensor, up: Tensor, down: Tensor, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Add neurons to an FFN that change nothing it computes, and can learn at once.

    A new neuron's gate and up rows are random, its down column is zero. It adds exactly zero to the
    output. The column's first gradient is activation x error, which is not zero; from the second
    step on its rows have a gradient too (LoRA starts the same way). Rows have the spread of the
    layer's own, so that new neurons react to text as strongly as trained ones.

    Splitting neurons into copies (Net2Wider) is function-preserving, too, but copies have gradients
    that differ by a factor alone, which Adam takes out: they stay copies, and the width is wasted.
    Down columns that are random would learn sooner, and change the function.

    Args: gate and up [f, H], down [H, f], ``width`` at least f.
    Returns: [width, H], [width, H], [H, width]; the first f neurons are the old ones, bit for bit.
    """
    new = width - gate.shape[0]
    if new == 0:
        return gate, up, down

    def rows(like: Tensor) -> Tensor:
        spread = like.float().square().mean().sqrt()
        drawn = torch.randn(new, like.shape[1], generator=generator) * spread
        return torch.cat([like, drawn.to(like.dtype)])

    return rows(gate), rows(up), torch.cat([down, down.new_zeros(down.shape[0], new)], dim=1)


def _without_padding(tensors: _Folder, widths: list[int], multiple: int) -> list[int]:
    """Widths without the zeros that a padded export ends with.

    A neuron of zeros gets no gradient and would stay dead. What rounding up to ``multiple`` asks
    for is kept.
    """
    result = []
    for layer, width in enumerate(widths):
        names = huggingface.ffn_names(layer)
        axes = (0, 0, 1)
        if not any(tensors.last(n, axis).any() for n, axis in zip(names, axes, strict=True)):
            used = torch.stack(
                [tensors.read(n).any(dim=1 - axis) for n, axis in zip(names, axes, strict=True)]
            ).any(dim=0)
            last = int(used.nonzero().max()) + 1 if bool(used.any()) else 1
            width = min(width, round_up(last, multiple))
        result.append(width)
    return result


def _enlarged(widths: list[int], factor: float, multiple: int) -> list[int]:
    """All layers at the legal width nearest to ``factor`` times the widest."""
    if not 1 <= factor < float("inf"):
        raise ConfigError(f"--enlarge-ffn is {factor}; it is a factor of at least 1, such as 2.667")
    if factor == 1:
        return widths
    wanted = max(widths) * factor
    nearest = max(1, round(wanted / multiple)) * multiple
    return [max(nearest, round_up(max(widths), multiple))] * len(widths)


def _training(hf: dict[str, Any]) -> dict[str, Any]:
    longest = int(hf.get("max_position_embeddings") or LONGEST_DEFAULT_SEQUENCE)
    return {
        "precision": "bf16" if _dtype(hf) == "bfloat16" else "fp32",
        "seq_length": min(longest, LONGEST_DEFAULT_SEQUENCE),
    }


def _dtype(hf: dict[str, Any]) -> str:
    return str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch.")


_NOT_OF_THE_WEIGHTS = {"attention_dropout", "init_method_std"}


def _check(config: Config, model: dict[str, Any], widths: list[int], folder: Path) -> None:
    """Raises: ConfigError when the configuration is not for this model, or cannot be run."""
    for name, value in model.items():
        given = getattr(config.model, name)
        if given != value and name not in _NOT_OF_THE_WEIGHTS:
            hint = ", or choose --enlarge-ffn to fit" if name == "ffn_hidden_size" else ""
            raise ConfigError(
                f"model.{name} is {given} in your configuration and {value} for {folder}; leave it "
                f"out{hint}"
            )
    uneven = [width for width in widths if width % config.ffn_multiple]
    if uneven:
        raise ConfigError(
            f"{folder} has layers of {uneven[0]} FFN neurons, which is no multiple of TP x "
            f"prune.alignment = {config.ffn_multiple}; set prune.alignment to a divisor, or widen "
            "with --enlarge-ffn"
        )
    parallel = config.parallel
    validate(config, parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)


def _notes(config: Config, hf: dict[str, Any]) -> list[str]:
    notes = []
    if config.training.precision == "bf16" and _dtype(hf) != "bfloat16":
        notes.append(f"weights were rounded from {_dtype(hf)} to bf16")
    if config.data.tokenizer == "byte":
        notes.append("data.tokenizer is 'byte': the folder has no tokenizer.json")
    window, before = config.training.seq_length, int(hf.get("max_position_embeddings") or 0)
    if window < before:
        notes.append(
            f"trained on {window:,} tokens of context (training.seq_length), where {before:,} were "
            "possible: exports will say so"
        )
    if not config.data.train:
        notes.append("data.train is empty: import with --config or data.train=... to train on")
    return notes
