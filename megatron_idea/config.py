"""Every knob of a run: frozen dataclasses, one section per owner, read from YAML.

Values come in three layers: the defaults below, one YAML file, dotted overrides
(``schedule.total_tokens=4e6``). Unknown keys are errors that name the nearest known key.
A section checks itself in ``__post_init__``; ``validate`` checks sections against each other
and against the number of processes.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
import reprlib
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import yaml

from megatron_idea.errors import UserError
from megatron_idea.files import UnsafeFileError, check_yaml


class ConfigError(UserError):
    """A configuration that cannot be run; the message says what is legal."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name} is {value!r}; legal values: {', '.join(allowed)}")


@dataclass(frozen=True)
class ModelConfig:
    """Decoder-only GPT: RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases."""

    num_layers: int = 4
    hidden_size: int = 128
    ffn_hidden_size: int = 1024
    """FFN width of the enlarged model: neurons per layer before any are removed."""
    num_attention_heads: int = 4
    num_query_groups: int = 2
    """Key/value heads; equal to num_attention_heads for multi-head attention."""
    kv_channels: int = 32
    """Width of one attention head."""
    vocab_size: int = 4096
    """Rows of the embedding; at least the tokenizer's vocabulary, a multiple of TP."""
    share_embeddings_and_output_weights: bool = True
    qk_layernorm: bool = False
    """RMSNorm on each query and key head before RoPE."""
    rotary_base: int = 10000
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
            "num_query_groups", "kv_channels", "vocab_size", "rotary_base",
        ):  # fmt: skip
            value = getattr(self, name)
            _require(value > 0, f"model.{name} is {value}; it must be positive")
        _require(
            self.num_attention_heads % self.num_query_groups == 0,
            f"model.num_attention_heads ({self.num_attention_heads}) must be a multiple of "
            f"model.num_query_groups ({self.num_query_groups})",
        )
        _require(self.kv_channels % 2 == 0, "model.kv_channels must be even: RoPE rotates pairs")
        for name in ("hidden_dropout", "attention_dropout"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"model.{name} is {value}; it must be in [0, 1)")
        for name in ("layernorm_epsilon", "init_method_std"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"model.{name} is {value}; it must be positive")


@dataclass(frozen=True)
class BlendEntry:
    """One indexed dataset of a blend: ``prefix.bin`` and ``prefix.idx``, and its weight."""

    prefix: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        _require(self.weight > 0, f"weight of {self.prefix!r} is {self.weight}; must be positive")


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from. Relative paths are taken from the working directory."""

    tokenizer: str = "byte"
    """Path of a ``tokenizer.json``, or ``byte`` for the byte-level fallback (256 + 1 ids)."""
    train: list[BlendEntry] = field(default_factory=list)
    """Blended by weight."""
    validation: list[BlendEntry] = field(default_factory=list)
    """Held-out documents; empty: no held-out loss is measured."""
    cache_dir: str = ""
    """Where shuffled sample indices are kept; empty: ``<run_dir>/data_cache``."""


@dataclass(frozen=True)
class TrainingConfig:
    """Batch, sequence, numbers."""

    seq_length: int = 256
    micro_batch_size: int = 8
    """Sequences per data-parallel rank in one forward and backward pass."""
    global_batch_size: int = 8
    """Sequences in one optimizer step, over all ranks."""
    precision: str = "fp32"
    """``fp32``, or ``bf16`` with fp32 main weights, gradients and moments."""
    kernel_implementation: str = "auto"
    """Activation and scores of the FFN: ``auto`` (Triton on a GPU, PyTorch elsewhere), ``triton``,
    ``reference`` (PyTorch)."""
    seed: int = 1234

    def __post_init__(self) -> None:
        for name in ("seq_length", "micro_batch_size", "global_batch_size"):
            value = getattr(self, name)
            _require(value > 0, f"training.{name} is {value}; it must be positive")
        _one_of("training.precision", self.precision, ("fp32", "bf16"))
        _one_of(
            "training.kernel_implementation",
            self.kernel_implementation,
            ("auto", "triton", "reference"),
        )


@dataclass(frozen=True)
class ParallelConfig:
    """Tensor, pipeline, data parallelism. Data-parallel size = processes / (TP x PP)."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    """Model chunks per pipeline rank (interleaved 1F1B); 1 is plain 1F1B."""
    sequence_parallel: bool = True
    """Split norms and residuals over TP ranks too; has a meaning only when TP > 1."""
    use_distributed_optimizer: bool = True
    """Shard main weights and Adam moments over data-parallel ranks."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradients while the backward pass goes on; null: where there is CUDA."""
    overlap_param_gather: bool | None = None
    """Gather weights while the forward pass goes on; null: where there is CUDA, if gradients are
    reduced so and the optimizer is distributed."""
    bucket_size: int = 0
    """Elements per gradient bucket; 0 leaves the choice to megatron-core."""
    distributed_timeout_minutes: float = 10.0
    """How long a rank waits for the others."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size", "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
        ):  # fmt: skip
            value = getattr(self, name)
            _require(value >= 1, f"parallel.{name} is {value}; it must be at least 1")
        _require(
            self.virtual_pipeline_model_parallel_size == 1 or self.pipeline_model_parallel_size > 1,
            "parallel.virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1",
        )
        _require(
            not self.overlap_param_gather
            or (self.use_distributed_optimizer and bool(self.overlap_grad_reduce)),
            "parallel.overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce",
        )
        _require(self.bucket_size >= 0, "parallel.bucket_size must not be negative")
        _require(
            0 < self.distributed_timeout_minutes < math.inf,
            "parallel.distributed_timeout_minutes must be positive",
        )

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model: TP x PP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def num_stages(self) -> int:
        """Model chunks over all pipeline ranks: PP x virtual PP."""
        return self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size

    def resolved(self, cuda: bool) -> ParallelConfig:
        """The same with every null decided, for a machine with or without CUDA."""
        reduce, gather = self.overlap_grad_reduce, self.overlap_param_gather
        reduce = cuda if reduce is None else reduce
        gather = cuda and reduce and self.use_distributed_optimizer if gather is None else gather
        return dataclasses.replace(self, overlap_grad_reduce=reduce, overlap_param_gather=gather)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. The learning rate belongs to ``schedule``."""

    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    """Coefficient on weight x learning rate (torch and Megatron convention)."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    lr_scaling: str = "none"
    """``none``, or ``mup_simple``: matrices of attention and FFN step with lr x min(768/h, 1)."""

    def __post_init__(self) -> None:
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name} is {value}; it must be in [0, 1)")
        for name in ("adam_eps", "weight_decay", "clip_grad"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"optimizer.{name} is {value}; it must not be negative")
        _one_of("optimizer.lr_scaling", self.lr_scaling, ("none", "mup_simple"))

    def matrix_scale(self, hidden_size: int) -> float:
        """What the learning rate of attention's and FFN's matrices is multiplied by."""
        return min(768 / hidden_size, 1.0) if self.lr_scaling == "mup_simple" else 1.0


@dataclass(frozen=True)
class ScheduleConfig:
    """One curve over consumed tokens; ``schedule.py`` has the functions."""

    kind: str = "integrated"
    """``integrated``: one warm-up, one decay over all tokens. ``restarted``: the decay ends with
    the enlarged phase; pruning begins with a new warm-up and a new decay (the naive pipeline)."""
    total_tokens: int = 4_000_000
    """Consumed by the whole run, all phases together."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 5e-6
    """Learning rate at the last token; without a meaning for ``lr_decay_style: constant``, which
    ends at ``lr``."""
    lr_decay_style: str = "cosine"
    """From the warm-up's end on: ``cosine`` or ``linear`` to the last token; ``WSD``: ``lr``, then
    linear over the last ``lr_wsd_decay_fraction``; ``constant``: ``lr`` to the end."""
    lr_warmup_fraction: float = 0.01
    """Share of all tokens in the linear warm-up."""
    lr_wsd_decay_fraction: float = 0.1
    """Share of all tokens in the decay of ``WSD``; with ``restarted``, of each curve's own."""
    enlarged_fraction: float = 0.5
    """Share of all tokens in the phase before pruning; the three shares add up to 1."""
    prune_fraction: float = 0.15
    """Share in which units are scored and removed."""
    recover_fraction: float = 0.35
    """Share in which the small model trains on."""
    prune_warmup_fraction: float = 0.05
    """Share of the prune phase in which scores are gathered and nothing is removed."""
    removal: str | None = None
    """``cubic``: gradual, most of it early. ``linear``: gradual. ``rounds``: equal parts, ever
    further apart. ``one_shot``: everything at the end of the prune warm-up. null: the method's."""
    rounds: int = 20
    """How many, for ``removal: rounds``: the first when the prune warm-up ends, the last when the
    prune phase does."""

    def __post_init__(self) -> None:
        _one_of("schedule.kind", self.kind, ("integrated", "restarted"))
        styles = ("cosine", "WSD", "linear", "constant")
        _one_of("schedule.lr_decay_style", self.lr_decay_style, styles)
        if self.removal is not None:
            curves = ("cubic", "linear", "rounds", "one_shot")
            _one_of("schedule.removal", self.removal, curves)
        _require(self.rounds >= 1, f"schedule.rounds is {self.rounds}; it must be at least 1")
        _require(self.total_tokens > 0, "schedule.total_tokens must be positive")
        _require(
            0 <= self.min_lr <= self.lr and 0 < self.lr < math.inf,
            f"schedule.min_lr ({self.min_lr}) must be between 0 and schedule.lr ({self.lr})",
        )
        for name in (
            "lr_warmup_fraction", "lr_wsd_decay_fraction", "enlarged_fraction", "prune_fraction",
            "recover_fraction", "prune_warmup_fraction",
        ):  # fmt: skip
            value = getattr(self, name)
            _require(0 <= value <= 1, f"schedule.{name} is {value}; it must be in [0, 1]")
        _require(self.lr_warmup_fraction < 1, "schedule.lr_warmup_fraction must be below 1")
        _require(self.prune_warmup_fraction < 1, "schedule.prune_warmup_fraction must be below 1")
        phases = (self.enlarged_fraction, self.prune_fraction, self.recover_fraction)
        _require(
            abs(sum(phases) - 1) < 1e-9,
            "schedule.enlarged_fraction + prune_fraction + recover_fraction must be 1; "
            f"they are {' + '.join(map(str, phases))} = {sum(phases):.6g}",
        )
        _require(
            self.kind == "integrated"
            or self.lr_warmup_fraction < min(self.enlarged_fraction, 1 - self.enlarged_fraction),
            "schedule.kind=restarted warms up twice: lr_warmup_fraction must be shorter than the "
            "enlarged phase and than the rest",
        )
        if self.lr_decay_style == "WSD":
            self._require_room_for_wsd()

    def _require_room_for_wsd(self) -> None:
        decay, shortest = self.lr_wsd_decay_fraction, 1.0
        if self.kind == "restarted":
            shortest = min(self.enlarged_fraction, 1 - self.enlarged_fraction)
        _require(
            decay > 0,
            "schedule.lr_wsd_decay_fraction must be above 0 for lr_decay_style=WSD; without a "
            "decay it is lr_decay_style=constant",
        )
        _require(
            self.lr_warmup_fraction + decay * shortest <= shortest + 1e-9,
            f"schedule.lr_decay_style=WSD warms up before it decays: lr_warmup_fraction "
            f"({self.lr_warmup_fraction}) + {'' if shortest == 1 else f'{shortest:g} x '}"
            f"lr_wsd_decay_fraction ({decay}) must be at most {shortest:g}, the share of all "
            f"tokens that {'the' if shortest == 1 else 'the shorter'} curve has",
        )


@dataclass(frozen=True)
class Method:
    """What can be known of a value of ``prune.strategy`` without building it."""

    axes: tuple[str, ...]
    """What it can prune."""
    removal: str = "cubic"
    """Its own curve, which ``schedule.removal: null`` stands for."""
    finds_shape: bool = False
    """Whether it can find the shape itself, given a number of parameters."""
    fixed: tuple[str, ...] = ()
    """Keys of ``prune`` that it has no use for, of those that most methods read."""
    own: tuple[str, ...] = ()
    """Keys of ``prune`` that it alone reads."""


_SCORES = ("element", "row_reduce", "matrix_reduce")
_ALL_AXES = ("ffn_hidden_size", "num_query_groups", "hidden_size", "num_layers")
METHODS = {
    "idea": Method(_ALL_AXES),
    "random": Method(_ALL_AXES, fixed=(*_SCORES, "calibration_steps")),
    "magnitude": Method(_ALL_AXES, fixed=(*_SCORES[:1], "calibration_steps")),
    "taylor": Method(_ALL_AXES, fixed=_SCORES),
    "llm_pruner": Method(_ALL_AXES, fixed=_SCORES[1:]),
    "wanda": Method(_ALL_AXES[:2], fixed=_SCORES),
    "flap_score": Method(_ALL_AXES[:2], fixed=_SCORES),
    "minitron": Method(_ALL_AXES, fixed=_SCORES, own=("aggregation",)),
    "shortgpt": Method(_ALL_AXES[3:], fixed=_SCORES),
    "pca_stem": Method(("hidden_size",), "one_shot", fixed=(*_SCORES, "calibration_steps")),
    "adapt_pruner": Method(
        _ALL_AXES[:2], "rounds", finds_shape=True, fixed=_SCORES,
        own=("amplitude", "sparsity_step", "as_released", "skip_first_token"),
    ),
    "efficient_llm": Method(_ALL_AXES[:3], "linear", finds_shape=True, fixed=_SCORES[1:]),
}  # fmt: skip
"""By the value of ``prune.strategy``; ``none`` is plain training."""


@dataclass(frozen=True)
class PruneTarget:
    """The model that is shipped, in the words of the ``model`` section; null: as the enlarged one.

    A configuration that has a target at all says all of it: what it leaves out is not pruned.
    With ``parameters`` the method finds the shape: each axis that is given may shrink, and keeps
    at least so much; none given: all axes of the method may, down to the least legal count.
    adapt_pruner always finds it: counts alone say how many parameters they come to.
    """

    ffn_hidden_size: int | None = None
    """FFN width (mean over layers when ``prune.scope`` is global)."""
    num_query_groups: int | None = None
    """Key/value heads of a layer, each with its query heads (likewise a mean)."""
    hidden_size: int | None = None
    """Channels of the residual stream; ``kv_channels`` and the number of heads stay."""
    num_layers: int | None = None
    parameters: int | None = None
    """Most weights that it may have, a tied embedding counted once; for methods that find the shape
    themselves."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _require(
                value is None or value > 0, f"prune.target.{name} is {value}; it must be positive"
            )

    @property
    def counts(self) -> dict[str, int]:
        """What is given, by axis."""
        counts = {name: value for name, value in vars(self).items() if value is not None}
        counts.pop("parameters", None)
        return counts


DEFAULT_TARGET = PruneTarget(ffn_hidden_size=384)
"""That of the default model, and of no other: who asks for 384 neurons gives a target that is equal
to this one and not the same."""


@dataclass(frozen=True)
class AxisGoal:
    """Where an axis begins and where it is to end; per layer for neurons and KV groups."""

    full: int
    target: int
    """With ``prune.target.parameters`` a forecast: what equal shares of all axes come to."""
    multiple: int
    """Stored counts are multiples of this."""
    final_multiple: int
    """Those of the shipped model are multiples of this."""
    block: int
    """Units that are removed from memory together, but for the last."""
    begin: float = 0.0
    end: float = 1.0
    """The part of the removal window in which the axis shrinks, in shares of the window."""
    least: int = 1
    """Fewest units that may be left: the target, unless the method finds the shape."""


@dataclass(frozen=True)
class PruneConfig:
    """Which units go. Defaults are our reading of IDEA Prune; docs/method.md argues each."""

    strategy: str = "idea"
    """``idea``, ``adapt_pruner``, ``efficient_llm``, ``pca_stem``; to compare with, ``random``,
    ``magnitude``, ``taylor``, ``llm_pruner``, ``wanda``, ``flap_score``, ``minitron``,
    ``shortgpt``; ``none``: train at full width. docs/method.md says what each does."""
    target: PruneTarget = DEFAULT_TARGET
    order: list[str] = field(default_factory=list)
    """Axes one after the other, in equal parts of the removal window, as in ``[ffn_hidden_size,
    num_query_groups+num_layers]``: axes with a plus between them shrink together. Empty: all do."""
    element: str = "abs"
    """Importance of one weight: ``abs`` |w g|, ``squared`` (w g)^2, ``signed`` w g, ``fisher``
    |w g - w^2 v / 2| with Adam's second moment v."""
    row_reduce: str = "mean"
    """Over the weights of a unit in a matrix: ``mean``, ``sum``, ``l2``, ``max``."""
    matrix_reduce: str = "max"
    """Over the matrices that a unit has weights in: ``max``, ``mean``, ``sum``."""
    calibration_steps: int = 0
    """Batches of training data, drawn anew for each plan and not learnt from, that scores come
    from; 0: the training steps themselves."""
    aggregation: str = "sequence_mean"
    """Of activations, for ``minitron``: ``sequence_mean``, the mean of their sizes over a sample's
    tokens, then L2 over samples; ``sequence_norm``: L2 over tokens, then the mean over samples."""
    ema: float = 0.5
    """Coefficient of the moving average; which term it multiplies is ``ema_on``."""
    ema_on: str = "history"
    """``history``: the coefficient is that of the old average; ``new``: of what is new."""
    scope: str = "layer"
    """``layer``: equal widths. ``global``: one ranking over all layers, widths differ."""
    mask_interval_steps: int = 1
    """Optimizer steps between mask updates; importance is averaged inside the interval."""
    compact: bool = True
    """Cut zeroed units out of memory in blocks; False keeps them, as zeros, to the end."""
    compaction_block: int = 0
    """Neurons per layer and compaction; 0: a sixteenth of the enlarged width, made legal."""
    alignment: int = 8
    """Stored FFN widths are multiples of TP x alignment (8 for bf16 GEMMs, 16 for FP8)."""
    channel_alignment: int = 64
    """Stored hidden sizes are multiples of this."""
    serve_tensor_model_parallel_size: int = 0
    """TP size of the servers: final FFN widths are multiples of that x 128, and final KV groups of
    that, too; 0 asks for nothing."""
    layer_candidates: int = 4
    """Layers of the lowest scores, of which the one goes that raises the loss of the step's batch
    least when it is left out; each costs a forward pass whenever a layer goes. 0: scores decide."""
    norm_rescale: str = "none"
    """When channels go: ``mean_square`` rescales each norm's gains so that its output of those that
    stay is what it was on the step's batch, for a forward pass whenever channels go."""
    update: str = "none"
    """What is done for the survivors when units go, by ``efficient_llm``: ``none`` leaves it to
    training; ``obs`` refits each matrix that loses input columns, block by block, with a forward
    pass and 8 n^2 bytes for each matrix of n inputs."""
    update_form: str = "block"
    """Inputs that make up for each other: ``block``, those of a TP rank; ``exact``, all."""
    update_damping: float = 0.01
    """Of the mean square of inputs, what the update adds to each."""
    update_tokens: int = 32768
    """Tokens of the step's batch that the update looks at; as many of each sequence."""
    amplitude: float = 0.02
    """adapt_pruner: how far the sparsity that an inner step adds to a layer may be from
    ``sparsity_step``; 0: equal counts in all layers."""
    sparsity_step: float = 0.02
    """adapt_pruner: mean sparsity that an inner step adds; with an amplitude as large the most
    important layer loses nothing in it and the least important one twice as much."""
    as_released: bool = False
    """adapt_pruner: as the released code, errors included: each round forgets what layers still
    owe, and query heads count for the wrong KV group."""
    skip_first_token: bool = False
    """adapt_pruner: leave the first token of each sequence out of the cosine."""
    moments: str = "keep"
    """Adam's moments of what stays when units go: ``keep``; ``reset``: Adam begins anew, with
    removal in rounds alone."""
    placement: str = "min"
    """Survivors over TP ranks: ``min`` moves the fewest, ``ordered`` keeps the TP=1 order."""

    def __post_init__(self) -> None:
        _one_of("prune.strategy", self.strategy, (*METHODS, "none"))
        _one_of("prune.element", self.element, ("abs", "squared", "signed", "fisher"))
        _one_of("prune.row_reduce", self.row_reduce, ("mean", "sum", "l2", "max"))
        _one_of("prune.matrix_reduce", self.matrix_reduce, ("max", "mean", "sum"))
        _one_of("prune.aggregation", self.aggregation, ("sequence_mean", "sequence_norm"))
        _one_of("prune.update", self.update, ("none", "obs"))
        _one_of("prune.update_form", self.update_form, ("block", "exact"))
        _require(
            0 < self.update_damping < math.inf,
            f"prune.update_damping is {self.update_damping}; it must be positive",
        )
        if self.strategy != "none":
            self._require_use()
        _require(
            (self.element, self.row_reduce) != ("signed", "max"),
            "prune.row_reduce=max needs values of one sign: "
            "set prune.element to abs, squared or fisher",
        )
        _one_of("prune.ema_on", self.ema_on, ("history", "new"))
        _one_of("prune.scope", self.scope, ("layer", "global"))
        _one_of("prune.placement", self.placement, ("min", "ordered"))
        _one_of("prune.norm_rescale", self.norm_rescale, ("none", "mean_square"))
        _one_of("prune.moments", self.moments, ("keep", "reset"))
        for name in ("amplitude", "sparsity_step"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"prune.{name} is {value}; it must be in [0, 1]")
        _require(self.sparsity_step > 0, "prune.sparsity_step is 0: nothing would ever be removed")
        self._check_method()
        _require(0 <= self.ema <= 1, f"prune.ema is {self.ema}; it must be in [0, 1]")
        _require(self.history < 1, "prune.ema keeps only history: scores would stay 0 for ever")
        _require(self.mask_interval_steps >= 1, "prune.mask_interval_steps must be at least 1")
        for name in ("alignment", "channel_alignment"):
            _require(getattr(self, name) >= 1, f"prune.{name} must be at least 1")
        for name in (
            "compaction_block", "serve_tensor_model_parallel_size", "layer_candidates",
            "calibration_steps",
        ):  # fmt: skip
            _require(getattr(self, name) >= 0, f"prune.{name} must not be negative")
        if self.order:
            ordered = [axis for part in self.order for axis in part.split("+")]
            for axis in ordered:
                _one_of("an axis of prune.order", axis, tuple(self.target.counts))
            _require(
                sorted(ordered) == sorted(self.target.counts),
                f"prune.order must name each axis of prune.target once: "
                f"{', '.join(self.target.counts)}",
            )

    def _check_method(self) -> None:
        """Refuse what the method cannot follow. Raises: ConfigError."""
        if self.strategy == "none":
            return
        if METHODS[self.strategy].finds_shape:
            free = not self.order and self.scope == "layer"
            _require(
                free,
                f"prune.strategy={self.strategy} shares out itself what goes where and when: leave "
                "prune.order empty and prune.scope at layer",
            )
        else:
            finders = [name for name, method in METHODS.items() if method.finds_shape]
            _require(
                self.target.parameters is None,
                "prune.target.parameters is for methods that find the shape themselves, "
                f"{' and '.join(finders)}; prune.strategy={self.strategy} needs the shape, as in "
                "prune.target.ffn_hidden_size",
            )

    def _require_use(self) -> None:
        """Refuse what was set and would be ignored, of what some methods alone ask for."""
        others = (method.own for name, method in METHODS.items() if name != self.strategy)
        for name in itertools.chain(METHODS[self.strategy].fixed, *others):
            default = getattr(PruneConfig, name)
            _require(
                getattr(self, name) == default,
                f"prune.{name} means nothing to prune.strategy={self.strategy}: leave it out, or "
                f"at its default, {default}",
            )
        _require(
            self.update == "none" or self.strategy == "efficient_llm",
            f"prune.update={self.update} is a part of EfficientLLM: set prune.strategy="
            f"efficient_llm; prune.strategy={self.strategy} leaves survivors to training",
        )
        for name in ("update_form", "update_damping", "update_tokens"):
            _require(
                self.update != "none" or getattr(self, name) == getattr(PruneConfig, name),
                f"prune.{name} means nothing to prune.update=none: set prune.update=obs",
            )
        _require(
            self.strategy != "llm_pruner" or self.element != "squared",
            "prune.element for prune.strategy=llm_pruner is abs, fisher (its mixed form) or signed "
            "(its vector form), not squared",
        )

    @property
    def history(self) -> float:
        """Weight of the old average in the moving average, in [0, 1)."""
        return self.ema if self.ema_on == "history" else 1.0 - self.ema


@dataclass(frozen=True)
class DistillConfig:
    """A teacher inside the run: the loss is (1 - alpha) cross entropy + alpha KL to what it says.

    ``distill/`` has the loss and the teacher. Held-out losses stay those of the language model.
    """

    teacher: str = "none"
    """``none``. ``self``: the run's own enlarged model, from the prune phase on. Else a run, a
    checkpoint or a Hugging Face folder of the same tokenizer, from the first step on."""
    alpha: float = 0.9
    """Share of the KL divergence in the loss where teaching begins; 0 asks no teacher."""
    alpha_end: float = 0.5
    """The same at the last token: late, an annealed student knows better than ``self``."""
    alpha_shape: str = "linear"
    """From one to the other over tokens: ``linear`` or ``cosine``."""
    temperature: float = 1.0
    """Logits of both are divided by it before they are compared; the divergence is not multiplied
    by its square."""
    direction: str = "forward"
    """``forward``: KL(teacher || student). ``reverse``: KL(student || teacher)."""
    top_k: int = 0
    """Compare the teacher's k likeliest tokens and one that stands for the rest; 0: all."""
    token_chunk: int = 512
    """Tokens whose logits are in fp32 at a time."""
    average_last: int = 4
    """``self`` is the mean of so many snapshots of the enlarged phase, the last at its end."""
    average_spacing: float = 0.02
    """Share of all tokens between two snapshots."""
    keep_hidden: str = "device"
    """Where the teacher's last hidden states of a step wait: ``device`` or ``host``."""
    acceptance: bool = False
    """Record the sum of min(p, q) over tokens: how often speculative decoding accepts a token that
    the student drafts for the teacher."""

    def __post_init__(self) -> None:
        _one_of("distill.alpha_shape", self.alpha_shape, ("linear", "cosine"))
        _one_of("distill.direction", self.direction, ("forward", "reverse"))
        _one_of("distill.keep_hidden", self.keep_hidden, ("device", "host"))
        for name in ("alpha", "alpha_end"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"distill.{name} is {value}; it must be in [0, 1]")
        _require(
            0 < self.temperature < math.inf,
            f"distill.temperature is {self.temperature}; it must be positive",
        )
        for name in ("token_chunk", "average_last"):
            _require(getattr(self, name) >= 1, f"distill.{name} must be at least 1")
        _require(self.top_k >= 0, "distill.top_k must not be negative")
        _require(
            self.top_k == 0 or self.direction == "forward",
            "distill.top_k says what the teacher finds likely, which distill.direction=reverse "
            "does not ask for: set direction to forward, or top_k to 0",
        )
        _require(
            0 < self.average_spacing <= 1,
            f"distill.average_spacing is {self.average_spacing}; it must be in (0, 1]",
        )

    @property
    def teaches(self) -> bool:
        """Whether there is a teacher, and something that it says counts."""
        return self.teacher != "none" and (self.alpha > 0 or self.alpha_end > 0)


@dataclass(frozen=True)
class CheckpointConfig:
    """Written to ``<run_dir>/checkpoints/step_NNNNNNNN``, complete or absent."""

    every_tokens: int = 0
    """Tokens between checkpoints; 0: only at the end of each phase."""
    before_compaction: bool = True
    """Also right before neurons are removed physically, which cannot be undone."""
    keep_last: int = 2
    """Older checkpoints are deleted; 0 keeps all."""
    keep_every_tokens: int = 0
    """The first checkpoint at or after each multiple of so many tokens stays for good; 0: none."""
    keep_phase_ends: bool = False
    """Those at the ends of phases stay for good: the enlarged model, what pruning leaves of it."""
    asynchronous: bool = True
    """A thread writes a copy in the CPU's memory while training goes on."""
    on_damage: str = "stop"
    """A resume finds a damaged file: ``stop`` and say so, or take the ``previous`` checkpoint."""

    def __post_init__(self) -> None:
        for name in ("every_tokens", "keep_last", "keep_every_tokens"):
            _require(getattr(self, name) >= 0, f"checkpoint.{name} must not be negative")
        _one_of("checkpoint.on_damage", self.on_damage, ("stop", "previous"))


@dataclass(frozen=True)
class GuardConfig:
    """What happens when the loss is not what it should be; ``guard.py``."""

    max_skipped_in_row: int = 20
    """Steps with a loss or gradient that is not finite are not taken; so many in a row end the run.
    0: never."""
    spike_increase: float = 1.0
    """Nats above the moving average of the loss that make a spike; 0: none is looked for."""
    spike_window_steps: int = 50
    """Steps of the moving average."""
    on_spike: str = "warn"
    """``warn``; ``pause_pruning`` until it is over, or until all must be removed; ``rollback`` to
    the last checkpoint, leaving out the data in between."""
    max_rollbacks: int = 3
    """Of a run with ``on_spike: rollback``; the next spike ends it."""

    def __post_init__(self) -> None:
        _one_of("guard.on_spike", self.on_spike, ("warn", "pause_pruning", "rollback"))
        for name in ("max_skipped_in_row", "spike_increase", "max_rollbacks"):
            _require(getattr(self, name) >= 0, f"guard.{name} must not be negative")
        _require(self.spike_window_steps >= 1, "guard.spike_window_steps must be at least 1")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss: at the start, at every phase's end, around compactions, and in between."""

    every_tokens: int = 0
    """Tokens between two evaluations; 0: none in between."""
    num_samples: int = 64
    """Held-out sequences in one evaluation, always the same ones."""
    around_compaction: bool = True
    """Also right before and after each compaction, with the plan's masks before: the two agree."""
    sample_prompts: list[str] = field(default_factory=list)
    """Texts that the model goes on from at each evaluation but those around compactions; an empty
    text begins a document. ``samples.jsonl`` and the report have what it wrote."""
    sample_tokens: int = 48
    """Tokens written after each prompt at most; each costs a forward pass over the text so far."""

    def __post_init__(self) -> None:
        _require(self.every_tokens >= 0, "evaluation.every_tokens must not be negative")
        _require(self.num_samples > 0, "evaluation.num_samples must be positive")
        _require(self.sample_tokens > 0, "evaluation.sample_tokens must be positive")


@dataclass(frozen=True)
class LoggingConfig:
    """metrics.jsonl and events.jsonl are always written."""

    tensorboard: bool = True
    """Event files in ``<run_dir>/tensorboard``."""
    wandb: str = ""
    """Weights & Biases project that gets the same numbers; empty: none. ``WANDB_MODE=offline`` in
    the environment keeps them in the run folder."""
    mlflow: str = ""
    """MLflow experiment that gets the same numbers; empty: none. They are sent where
    ``MLFLOW_TRACKING_URI`` in the environment points, and kept in the run folder without it."""
    progress: bool = True
    """One live line in a terminal; a line now and then elsewhere."""


@dataclass(frozen=True)
class LawConfig:
    """Scaling law by which ``plan`` and ``report`` predict: L(N, D) = e + a / N^alpha + b / D^beta.

    L is the loss in nats per token, N the mean of the live parameters over the run's tokens, all of
    them, embeddings included, D the tokens. docs/method.md has sources and what it does not know.
    """

    name: str = "Besiroglu et al. 2024, over average parameters"
    e: float = 1.8172
    a: float = 482.01
    alpha: float = 0.3478
    b: float = 2085.43
    beta: float = 0.3658
    parameters: list[float] = field(default_factory=lambda: [58e6, 468e6])
    """Fewest and most for which the law was validated; beyond them it extrapolates."""
    tokens_per_parameter: list[float] = field(default_factory=lambda: [10.0, 400.0])
    """Likewise."""

    def __post_init__(self) -> None:
        for name in ("a", "alpha", "b", "beta"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"law.{name} is {value}; it must be positive")
        _require(0 <= self.e < math.inf, f"law.e is {self.e}; it must not be negative")
        for name in ("parameters", "tokens_per_parameter"):
            value = getattr(self, name)
            _require(
                len(value) == 2 and 0 < value[0] <= value[1] < math.inf,
                f"law.{name} is {value}; it must be [least, most], two positive numbers",
            )


@dataclass(frozen=True)
class Sections:
    """What a model and its optimizer are built from, at the start and after each compaction."""

    model: ModelConfig
    training: TrainingConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig


@dataclass(frozen=True)
class Config:
    run_dir: str = "runs/unnamed"
    """Where everything that the run writes is; the same folder again resumes it."""
    start_from: str = ""
    """Where a new run begins, in place of the seed: a checkpoint, or a run and which of its own, as
    in ``runs/wide`` (the latest), ``runs/wide@enlarged`` (the end of a phase) or
    ``runs/wide@1.5e12`` (after the step that came to so many consumed tokens)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    parallel_after_prune: ParallelConfig | None = None
    """The layout from the end of the prune phase on, of the same processes: the run saves, builds
    the small model in it and goes on. What it leaves out is as in ``parallel``; null: no change."""
    nodes_after_prune: int = 0
    """Nodes from the end of the prune phase on; 0: as before. A job on more of them saves there and
    ends with status 76, and examples/launch.sh submits one on so many that goes on."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    law: LawConfig = field(default_factory=LawConfig)

    @property
    def sections(self) -> Sections:
        """The sections that a model and its optimizer are built from."""
        return Sections(self.model, self.training, self.parallel, self.optimizer, self.schedule)

    @cached_property  # asked at every step from the end of the prune phase on
    def after_prune(self) -> Config:
        """The same in the layout that it has from the end of the prune phase on."""
        if self.parallel_after_prune is None:
            return self
        return dataclasses.replace(self, parallel=self.parallel_after_prune)

    @property
    def batch_tokens(self) -> int:
        """Tokens in one optimizer step."""
        return self.training.global_batch_size * self.training.seq_length

    @property
    def parameter_goal(self) -> int | None:
        """Most weights that the shipped model may have, where the method finds its shape."""
        return None if self.prune.strategy == "none" else self.prune.target.parameters

    @cached_property  # asked at every step of a course, a hundred thousand times
    def goals(self) -> dict[str, AxisGoal]:
        """The axes that pruning shrinks, in the order of the table of axes; none without it."""
        if self.prune.strategy == "none":
            return {}
        prune, finals, multiples = self.prune, self.final_multiples, self.multiples
        parts = [part.split("+") for part in prune.order]
        least = targets = prune.target.counts
        if prune.target.parameters is not None:
            least = least or {
                # An axis without room stays one: axes do not depend on the parallel layout.
                axis: min(finals[axis], getattr(self.model, axis))
                for axis in METHODS[prune.strategy].axes
            }
            targets = self._equal_shares(prune.target.parameters, least)
        goals = {}
        for axis, target in targets.items():
            full, multiple, final = getattr(self.model, axis), multiples[axis], finals[axis]
            if axis == "num_layers":
                wanted = 1  # one of zeros costs as much as any other until it is gone
            elif axis == "ffn_hidden_size":
                wanted = prune.compaction_block or full // 16
            else:
                wanted = full // 16
            place = next((i for i, part in enumerate(parts) if axis in part), 0)
            share = 1 / max(1, len(parts))
            goals[axis] = AxisGoal(
                full,
                target,
                multiple,
                final,
                max(1, wanted // multiple) * multiple,
                place * share,
                (place + 1) * share if place + 1 < len(parts) else 1.0,
                least[axis],
            )
        return goals

    def _equal_shares(self, parameters: int, least: dict[str, int]) -> dict[str, int]:
        from megatron_idea.shape import equal_shares  # it imports this module

        legal = {
            axis: range(
                count, max(count, getattr(self.model, axis)) + 1, self.final_multiples[axis]
            )
            for axis, count in least.items()
        }
        shape = equal_shares(self.model, parameters, tuple(legal.items()))
        return {axis: shape.counts(axis)[0] for axis in legal}

    @property
    def removal(self) -> str:
        """The removal curve, null decided: the method's own; ``cubic`` where nothing is pruned."""
        own = "cubic" if self.prune.strategy == "none" else METHODS[self.prune.strategy].removal
        return self.schedule.removal or own

    @property
    def multiples(self) -> dict[str, int]:
        """What stored counts are multiples of, by axis."""
        return {
            "ffn_hidden_size": self.ffn_multiple,
            "num_query_groups": self.parallel.tensor_model_parallel_size,
            "hidden_size": self.prune.channel_alignment,
            "num_layers": 1,
        }

    @property
    def final_multiples(self) -> dict[str, int]:
        """What counts of the shipped model are multiples of, by axis."""
        servers = self.prune.serve_tensor_model_parallel_size
        groups = math.lcm(self.multiples["num_query_groups"], servers or 1)
        return self.multiples | {
            "ffn_hidden_size": self.final_ffn_multiple,
            "num_query_groups": groups,
        }

    @property
    def ffn_multiple(self) -> int:
        """Stored FFN widths are multiples of this: TP x alignment."""
        return self.parallel.tensor_model_parallel_size * self.prune.alignment

    @property
    def final_ffn_multiple(self) -> int:
        """FFN widths of the shipped model are multiples of this: what servers need included."""
        servers = self.prune.serve_tensor_model_parallel_size
        return math.lcm(self.ffn_multiple, 128 * servers) if servers else self.ffn_multiple


def load(
    path: str | Path | None,
    overrides: list[str] | tuple[str, ...] = (),
    base: dict[str, Any] | None = None,
) -> Config:
    """Read a run's configuration: defaults, then the YAML file, then ``key.sub=value`` overrides.

    A key's type says how its value is read: a text is what was typed, whatever YAML would make of
    ``0012``, ``on`` or ``1e3``, and nothing in it is replaced. ``base`` has values that are better
    than the defaults, and give way to the file.

    Raises: ConfigError for a missing file, broken YAML, unknown keys, wrong types, illegal values.
    """
    given: dict[str, Any] = {}
    layers = [base or {}, {} if path is None else read_file(Path(path))]
    for layer in (*layers, *map(read_override, overrides)):
        reject_unknown(layer, Config, prefix="")
        given = merge(given, layer)
    return from_dict(given)


def from_dict(given: dict[str, Any]) -> Config:
    """Build a Config from nested plain values; raises ConfigError as ``load`` does."""
    reject_unknown(given, Config, prefix="")
    if isinstance(after := given.get("parallel_after_prune"), dict):
        given = given | {"parallel_after_prune": merge(given.get("parallel", {}), after)}
    config = _read_section(given, Config, prefix="")
    assert isinstance(config, Config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration, as it is saved in the run folder."""
    values = dataclasses.asdict(config)
    # No line is broken: whoever greps for a path finds it.
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=math.inf)


def replace(config: Config, **sections: Any) -> Config:
    """A copy with sections or fields replaced: ``replace(config, prune={"ema": 0.3})``."""
    return _replaced(config, sections)


def _replaced(section: Any, changes: dict[str, Any]) -> Any:
    values = {
        name: _replaced(getattr(section, name), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(section, **values)


def reject_unknown(
    given: dict[str, Any], section: type, prefix: str, also: tuple[str, ...] = ()
) -> None:
    """Raise ConfigError for the first key that neither ``section``, a dataclass, nor ``also`` has.

    ``prefix``: what stands before the keys in the message, with its dot.
    """
    known = get_type_hints(section)
    for key, value in given.items():
        if key in also:
            continue
        if key not in known:
            keys = [*also, *_keys(section)]
            same = [near for near in keys if near.endswith(f".{key}")]
            near = (same or difflib.get_close_matches(str(key), keys, n=1, cutoff=0.0))[0]
            raise ConfigError(
                f"unknown key {prefix + str(key)!r}; did you mean {prefix + near!r}? "
                f"known here: {', '.join((*also, *known))}"
            )
        if dataclasses.is_dataclass(known[key]):
            _require(
                isinstance(value, dict),
                f"{prefix}{key} is a section, not the value {_brief(value)}",
            )
            reject_unknown(value, known[key], prefix=f"{prefix}{key}.")


def _keys(section: type) -> list[str]:
    """The keys of a section, and below a section in it those of it: ``target.ffn_hidden_size``."""
    found = []
    for key, kind in get_type_hints(section).items():
        found.append(key)
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            found += [f"{key}.{inner}" for inner in _keys(kind)]
    return found


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Put one set of nested sections over another: key by key; of any other value the upper one."""
    both = {
        key: merge(under[key], value)
        if isinstance(under.get(key), dict) and isinstance(value, dict)
        else value
        for key, value in over.items()
    }
    return under | both


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one mapping of dotted keys."""
    if not isinstance(values, dict):
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else key)
    return found


class _Yaml(yaml.SafeLoader):  # type: ignore[misc]  # yaml is not annotated
    """YAML whose plain scalars are texts, but for null: a key's type decides what they mean.

    A key that is given twice is an error. No merge keys (``<<``): a few nested ones fill a memory.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"))]
        for first in ("~", "n", "N", "")
    }

    def flatten_mapping(self, node: Any) -> None:
        pass

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        seen = [key.value for key, _ in node.value]
        if len(mapping) < len(seen):
            twice = next(key for key in seen if seen.count(key) > 1)
            where = f"line {node.start_mark.line + 1}"
            raise yaml.YAMLError(f"the mapping at {where} has the key {twice!r} twice")
        return mapping


def read_file(path: Path) -> dict[str, Any]:
    """Read a YAML file of nested sections; its scalars are texts, but for null.

    Raises: ConfigError when it is missing, too large, broken, or no mapping.
    """
    _require(path.is_file(), f"no configuration file at {path}")
    try:
        check_yaml(path)  # it may come from a stranger, beside a checkpoint
    except UnsafeFileError as error:
        raise ConfigError(f"cannot read configuration {path}: {error}") from error
    given = _read_yaml(path.read_bytes(), str(path))
    given = {} if given is None else given
    _require(isinstance(given, dict), f"{path} must be a mapping of sections")
    return given


def read_override(text: str) -> dict[str, Any]:
    """Read ``key.sub=value`` as nested sections; YAML where a section or a list is asked for.

    Raises: ConfigError.
    """
    key, equals, value = text.partition("=")
    _require(bool(equals), f"override {text!r} is not of the form key.sub=value")
    names = key.split(".")
    kind: Any = Config
    for name in names:
        kind = get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
        kind = _given(kind)
    given: Any = value
    if dataclasses.is_dataclass(kind) or get_origin(kind) is list:
        given = _read_yaml(value, f"override {text!r}")
    for name in reversed(names):
        given = {name: given}
    return given


def _read_yaml(content: str | bytes, where: str) -> Any:
    try:
        return yaml.load(content, _Yaml)  # a SafeLoader
    except Exception as error:  # of explicit tags, of unreadable bytes: any type
        raise ConfigError(f"cannot read configuration {where}: {error}") from error


def _read_section(given: dict[str, Any], section: type, prefix: str) -> Any:
    kinds = get_type_hints(section)
    return section(**{k: read_value(v, kinds[k], f"{prefix}{k}") for k, v in given.items()})


def read_value(value: Any, kind: Any, name: str) -> Any:
    """Read ``value`` as a key's type wants it; from a file or the command line it is a text.

    Raises: ConfigError that says what is legal.
    """
    if NoneType in get_args(kind) and (value is None or value == "null"):
        return None
    kind = _given(kind)
    if dataclasses.is_dataclass(kind):
        _require(isinstance(value, dict), f"{name} is {_brief(value)}; it must be a mapping")
        assert isinstance(kind, type)
        reject_unknown(value, kind, prefix=f"{name}.")
        return _read_section(value, kind, prefix=f"{name}.")
    if get_origin(kind) is list:
        _require(isinstance(value, list), f"{name} is {_brief(value)}; it must be a list: [a, b]")
        (item,) = get_args(kind)
        return [read_value(one, item, f"{name}[{i}]") for i, one in enumerate(value)]
    found = _SCALARS[kind](value)
    if found is None:
        given = "empty" if value is None else _brief(value)
        raise ConfigError(f"{name} is {given}; it must be {_LEGAL[kind]}")
    return found


def _given(kind: Any) -> Any:
    """Return what a key's type is where its value is not null."""
    if NoneType not in get_args(kind):
        return kind
    (kind,) = (option for option in get_args(kind) if option is not NoneType)
    return kind


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _boolean(value: Any) -> bool | None:
    return _BOOLEANS.get(str(value).strip().lower()) if isinstance(value, (bool, str)) else None


def _number(value: Any) -> float | None:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else None


def whole_number(value: Any) -> int | None:
    """Read a whole number, also written as 4e6 or 2_000_000; always decimal; None if it is none."""
    number = _number(value)
    if number is None or not math.isfinite(number):
        return None
    exact = Decimal(value.strip().replace("_", "")) if isinstance(value, str) else value
    return int(exact) if exact == int(exact) else None


_NUMBER = re.compile(
    r"[-+]?((\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[-+]?\d+)?|\.?inf|\.?nan)", re.I | re.A
)
_BOOLEANS = dict.fromkeys(("true", "yes", "on", "y", "1"), True) | dict.fromkeys(
    ("false", "no", "off", "n", "0"), False
)
_SCALARS = {str: _text, bool: _boolean, float: _number, int: whole_number}
_LEGAL = {str: "a text", bool: "true or false", float: "a number", int: "a whole number"}


def _brief(value: Any) -> str:
    """In a few words: a file of a few lines can hold a value that has no end."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 200, 200
    return short.repr(value)


def validate(config: Config, world_size: int) -> None:
    """Check that a run is possible: its layout, and what it prunes when.

    Raises: ConfigError, saying what was given, what is legal and how to mend it.
    """
    validate_layout(config, world_size)
    validate_pruning(config)
    _validate_layout_after(config, world_size)
    _require(
        config.distill.teacher != "self" or config.prune.strategy != "none",
        "distill.teacher=self is the enlarged model of a run that prunes, and prune.strategy is "
        "none: name another run or a Hugging Face folder",
    )


def _validate_layout_after(config: Config, world_size: int) -> None:
    """Check the layout that a run changes to. Raises: ConfigError."""
    before, after = config.parallel, config.parallel_after_prune
    _require(
        config.nodes_after_prune >= 0,
        f"nodes_after_prune is {config.nodes_after_prune}; it must not be negative",
    )
    if after is None:
        return
    _require(
        config.prune.strategy != "none",
        "parallel_after_prune is the layout of the small model, and prune.strategy is none: leave "
        "it out",
    )
    tp = before.tensor_model_parallel_size, after.tensor_model_parallel_size
    _require(
        tp[0] % tp[1] == 0 and after.num_stages <= before.num_stages,
        f"parallel_after_prune shrinks with the model: its TP size ({tp[1]}) must divide that of "
        f"parallel ({tp[0]}), and its PP x virtual PP ({after.num_stages}) be at most "
        f"{before.num_stages}",
    )
    if config.nodes_after_prune:
        return  # it is that of another number of processes, which ``train`` knows
    try:
        validate_layout(config.after_prune, world_size)
    except ConfigError as error:
        raise ConfigError(f"parallel_after_prune: {error}") from error


def validate_layout(config: Config, world_size: int) -> None:
    """Check that model and batch can be split over so many processes. Raises: ConfigError."""
    model, training, parallel = config.model, config.training, config.parallel
    tp = parallel.tensor_model_parallel_size
    pp = parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    _require(
        world_size % (tp * pp) == 0,
        f"{world_size} processes cannot be split into TP {tp} x PP {pp} x DP: start a multiple of "
        f"{tp * pp} (TP x PP x DP = processes)",
    )
    dp = world_size // (tp * pp)
    for name in ("num_attention_heads", "num_query_groups", "vocab_size"):
        value = getattr(model, name)
        _require(
            value % tp == 0, f"model.{name} ({value}) must be a multiple of the TP size ({tp})"
        )
    _require(
        model.num_layers % (pp * vpp) == 0,
        f"model.num_layers ({model.num_layers}) must be a multiple of PP x virtual PP ({pp * vpp})",
    )
    _require(
        tp == 1 or not parallel.sequence_parallel or training.seq_length % tp == 0,
        f"training.seq_length ({training.seq_length}) must be a multiple of the TP size ({tp}) "
        "for sequence parallelism",
    )
    per_step = training.micro_batch_size * dp
    _require(
        training.global_batch_size % per_step == 0,
        f"training.global_batch_size ({training.global_batch_size}) must be a multiple of "
        f"micro_batch_size x DP = {training.micro_batch_size} x {dp} = {per_step}",
    )
    num_microbatches = training.global_batch_size // per_step
    _require(
        vpp == 1 or num_microbatches % pp == 0,
        f"interleaved pipelining needs a multiple of PP ({pp}) micro-batches per step; "
        f"this run has {num_microbatches}",
    )


def require_multiple(name: str, count: int, multiple: int, what: str) -> None:
    """Raises: ConfigError that names the nearest legal counts, unless ``count`` is one."""
    below = count // multiple * multiple
    _require(
        count % multiple == 0 and count > 0,
        f"{name} ({count}) must be a multiple of {what}; nearest legal values: "
        f"{', '.join(str(n) for n in (below, below + multiple) if n > 0)}",
    )


def validate_pruning(config: Config) -> None:
    """Check what is pruned, how and when. Raises: ConfigError."""
    prune, schedule = config.prune, config.schedule
    what = f"TP x prune.alignment = {config.ffn_multiple}"
    require_multiple(
        "model.ffn_hidden_size", config.model.ffn_hidden_size, config.ffn_multiple, what
    )
    if prune.strategy == "none":
        return
    first = METHODS[prune.strategy].axes[0]
    is_default_model = config.model.ffn_hidden_size == ModelConfig.ffn_hidden_size
    _require(
        prune.target is not DEFAULT_TARGET or (is_default_model and first in prune.target.counts),
        f"nothing says what to prune: add prune.target.{first}, below model.{first} "
        f"({getattr(config.model, first)}), or prune.strategy=none to train without pruning",
    )
    _require(
        bool(config.goals),
        "prune.target names nothing to prune: give it ffn_hidden_size, num_query_groups, "
        "hidden_size or num_layers; to train without pruning set prune.strategy=none",
    )
    for axis, count in prune.target.counts.items():
        goal = config.goals[axis]
        _one_of(f"an axis of prune.strategy={prune.strategy}", axis, METHODS[prune.strategy].axes)
        require_multiple(
            f"prune.target.{axis}", count, goal.final_multiple, _legal_because(axis, config)
        )
        _require(
            count < goal.full,
            f"prune.target.{axis} ({count}) must be below model.{axis} ({goal.full}); leave "
            "it out to keep all, and to train without pruning set prune.strategy=none",
        )
    _validate_parameter_goal(config)
    _require(
        prune.strategy != "pca_stem"
        or (config.removal == "one_shot" and not config.model.share_embeddings_and_output_weights),
        "prune.strategy=pca_stem turns the residual stream once, and folds the final norm's gain "
        "into the output layer: set schedule.removal=one_shot, or leave it out, and "
        "model.share_embeddings_and_output_weights=false",
    )
    samples = config.training.global_batch_size
    _require(
        prune.update == "none" or prune.update_tokens >= samples,
        f"prune.update_tokens ({prune.update_tokens}) must be at least "
        f"training.global_batch_size ({samples}): the update looks at every sequence",
    )
    _require(
        prune.moments == "keep" or config.removal in ("rounds", "one_shot"),
        f"prune.moments=reset would keep Adam from ever having moments while units go at every "
        f"step; set schedule.removal to rounds or one_shot (it is {config.removal}), or "
        "prune.moments=keep",
    )
    least = max(2, config.parallel.num_stages)
    layers = config.goals.get("num_layers")
    _require(
        layers is None or layers.target >= least,
        f"prune.target.num_layers is below {least}: at least two layers stay, and one for each of "
        f"the {config.parallel.num_stages} stages of PP x virtual PP",
    )
    observed = schedule.prune_fraction * schedule.prune_warmup_fraction * schedule.total_tokens
    _require(
        observed >= config.batch_tokens,
        f"units would be removed before any importance is known: the prune warm-up is "
        f"{observed:,.0f} tokens (total_tokens x prune_fraction x prune_warmup_fraction), one step "
        f"is {config.batch_tokens:,}; make it at least one step",
    )
    _require(
        prune.compaction_block % config.ffn_multiple == 0,
        f"prune.compaction_block ({prune.compaction_block}) must be a multiple of {what}",
    )


def _validate_parameter_goal(config: Config) -> None:
    from megatron_idea.shape import Shape  # it imports this module

    if config.parameter_goal is None:
        return
    full = least = Shape.full(config.model)
    for axis, goal in config.goals.items():
        least = least.with_counts(axis, goal.least)
    fewest, all_of_them = (shape.parameters(config.model).total for shape in (least, full))
    counts = ", ".join(f"{axis} {goal.least}" for axis, goal in config.goals.items())
    _require(
        fewest <= config.parameter_goal < all_of_them,
        f"prune.target.parameters ({config.parameter_goal:,}) must be at least {fewest:,}, what is "
        f"left with {counts}, and below {all_of_them:,}, what the enlarged model has",
    )


def _legal_because(axis: str, config: Config) -> str:
    """Say what the final counts of an axis are multiples of, and why."""
    what, servers = multiple_of(axis, config), config.prune.serve_tensor_model_parallel_size
    if not servers or axis not in ("ffn_hidden_size", "num_query_groups"):
        return what
    of_servers = "prune.serve_tensor_model_parallel_size"
    of_servers += " x 128" if axis == "ffn_hidden_size" else ""
    return f"{what} and of {of_servers}, together {config.goals[axis].final_multiple}"


def multiple_of(axis: str, config: Config) -> str:
    """Say what the stored counts of an axis are multiples of, and why."""
    multiple = config.multiples[axis]
    return {
        "ffn_hidden_size": f"TP x prune.alignment = {multiple}",
        "num_query_groups": f"the TP size ({multiple})",
        "hidden_size": f"prune.channel_alignment = {multiple}",
        "num_layers": f"{multiple}",
    }[axis]
