"""Held-out loss of a model in training, of a checkpoint, or of a Hugging Face folder.

Measured is on an indexed dataset, in the sequences that training would read, or on text, document
by document (``data/rolling.py``). Bytes are those of the text whose tokens were scored.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import Tensor

from megatron_idea import checkpoint, files
from megatron_idea import config as configuration
from megatron_idea.checkpoint import storage
from megatron_idea.config import BlendEntry, Config, ConfigError, validate_layout
from megatron_idea.data.batches import Batches, Rows
from megatron_idea.data.documents import DataError, input_files
from megatron_idea.data.indexed import check_dataset
from megatron_idea.data.of_run import cache_dir, open_batches
from megatron_idea.data.rolling import RollingBatches
from megatron_idea.data.tokenizer import Tokenizer, load_tokenizer
from megatron_idea.engine.distributed import ProcessGroups, joined, world_size_from_environment
from megatron_idea.engine.model import build_model, transformer_config
from megatron_idea.engine.passes import at_least, evaluating, through
from megatron_idea.evaluation.sums import (
    Measured,
    Step,
    add_up,
    micro_batches,
    progress_bar,
    sums_of,
)
from megatron_idea.guard import DivergedError
from megatron_idea.huggingface import names as huggingface
from megatron_idea.huggingface.export import plain_tokenizer
from megatron_idea.huggingface.names import is_hugging_face

_LARGEST_LOSS = 700.0
"""e to the power of more is no number in double precision."""

OWN_DATA = "data.validation"
"""What a run's own held-out data is called in results."""


@dataclass(frozen=True)
class Options:
    """How a model is measured, whatever it is and on whatever."""

    seq_length: int = 0
    """Tokens in a row; 0: as in training, or as many as a folder's model takes."""
    batch_size: int = 0
    """Sequences at once on a rank; 0: as in training, or 8."""
    limit: int = 0
    """Sequences of a dataset, documents of a text; 0: all."""
    tokenizer: str = ""
    """In place of the model's own."""

    def __post_init__(self) -> None:
        for name in ("seq_length", "batch_size", "limit"):
            value = getattr(self, name)
            if value < 0:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} is {value}; it must not be negative")


def _forward(batches: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, lambda losses: (losses.sum(), {"sums": sums_of(losses, batch)})


def _megatron_step(
    chunks: Sequence[torch.nn.Module],
    groups: ProcessGroups,
    token_bytes: Tensor | None,
    rows: Rows,
    begin: int,
) -> Tensor:
    """Collective over all ranks and equal on all of them."""
    results = through(
        chunks,
        lambda: micro_batches(rows, begin, token_bytes),
        _forward,
        # Not those beyond the last row: a step of 1024 sequences would be 16 times 64 samples.
        num_microbatches=rows.filled(begin, at_least(chunks, groups)),
        seq_length=rows.length(begin),
        micro_batch_size=rows.micro_batch_size,
    )
    sums = torch.zeros(3, dtype=torch.float64, device=groups.device)
    if groups.is_last_stage and groups.tp.rank() == 0:
        sums += sum(result["sums"] for result in results)
    dist.all_reduce(sums)
    return sums


def held_out_loss(
    chunks: Sequence[torch.nn.Module], batches: Batches, groups: ProcessGroups
) -> tuple[float, int]:
    """Mean loss in nats per token over the held-out samples, and how many tokens those are.

    Collective over all ranks and equal on all of them.
    """
    with evaluating(chunks):
        step = functools.partial(_megatron_step, chunks, groups, None)
        nats, tokens, _ = add_up(step, batches)
    return nats / tokens, int(tokens)


def evaluate_checkpoint(path: Path, overrides: Sequence[str] = ()) -> dict[str, float | int]:
    """Measure a checkpoint, or a run's latest, on the run's own held-out samples.

    Returns: ``loss`` in nats per token, ``perplexity``, ``tokens``; with a byte-level tokenizer
        ``bytes`` and ``bits_per_byte``.
    Raises: as ``evaluate_model``.
    """
    (measured,) = evaluate_model(path, overrides=overrides)
    return measured.as_dict()


def evaluate_model(
    path: Path,
    data: Sequence[str] = (),
    overrides: Sequence[str] = (),
    options: Options | None = None,
) -> list[Measured]:
    """Measure a checkpoint, a run's latest checkpoint, or a Hugging Face folder.

    A checkpoint takes its own configuration with ``overrides``, by default in one process; under
    torchrun the overrides say how it is split. A folder is read by transformers, in one process.

    Args:
        data: prefixes of indexed datasets, and text, JSONL or Parquet files or folders of them;
            none: a run's own held-out samples.
    Raises: ConfigError for a path that is neither, and without held-out data; DataError for data
        that cannot be read.
    """
    options = options or Options()
    _check_names(data)
    if is_hugging_face(path):
        return _evaluate_folder(path, data, overrides, options)
    found = checkpoint.resolve(path)
    world_size = world_size_from_environment()
    config = _config_of(found, overrides, options, world_size)
    if not data and not config.data.validation:
        raise ConfigError("data.validation is empty: there is nothing to measure on")
    if options.limit and not data:
        raise ConfigError("without --data set evaluation.num_samples=N in place of --limit")
    state = checkpoint.read_state(found, config)
    with joined(config.parallel, config.training.seed) as groups:
        storage.verify(found, groups)
        tokenizer = load_tokenizer(config.data.tokenizer)
        model, training = config.model, config.training
        core = transformer_config(model, training, config.parallel, state.shape)
        chunks = build_model(model, training, core, groups)
        checkpoint.load_weights(chunks, found, groups)
        sizes = _token_sizes(tokenizer, groups.device)
        step = functools.partial(_megatron_step, chunks, groups, sizes)
        with evaluating(chunks), progress_bar(groups.world.rank() == 0) as bar:
            return [
                _measure(step, name, _rows(name, config, tokenizer, groups, options.limit), bar)
                for name in (data or [OWN_DATA])
            ]


def _config_of(found: Path, overrides: Sequence[str], options: Options, world_size: int) -> Config:
    """A checkpoint's configuration for measuring it in so many processes."""
    defaults = checkpoint.ONE_PROCESS if world_size == 1 else ()
    config = checkpoint.read_config(found, [*defaults, *overrides])
    if options.seq_length:
        config = configuration.replace(config, training={"seq_length": options.seq_length})
    if options.tokenizer:
        config = configuration.replace(config, data={"tokenizer": options.tokenizer})
    micro = options.batch_size or config.training.micro_batch_size
    if world_size == 1 or options.batch_size:
        # One micro-batch for each rank; pipelines want as many as they have stages.
        count = max(1, world_size // config.parallel.tensor_model_parallel_size)
        sizes = {"micro_batch_size": micro, "global_batch_size": micro * count}
        config = configuration.replace(config, training=sizes)
    validate_layout(config, world_size)  # steps of measuring are none of the schedule's
    return config


def _rows(
    name: str, config: Config, tokenizer: Tokenizer, groups: ProcessGroups | None, limit: int
) -> Rows:
    """What ``name`` means, over the ranks of ``groups``, or for one process that has none."""
    if name == OWN_DATA and config.data.validation and groups is not None:
        return open_batches(config, groups, tokenizer, "validation", config.evaluation.num_samples)
    training = config.training
    common: dict[str, Any] = {
        "model_vocab_size": config.model.vocab_size,
        "seq_length": training.seq_length,
        "micro_batch_size": training.micro_batch_size,
        "global_batch_size": training.global_batch_size,
    }
    if groups is not None:
        place = {"dp_rank": groups.dp.rank(), "dp_size": groups.dp.size(), "device": groups.device}
        common |= place
    elif torch.cuda.is_available():
        common["device"] = "cuda"
    if _is_dataset(name):
        sequences = max(1, (check_dataset(name, tokenizer).tokens - 1) // training.seq_length)
        return Batches(
            [BlendEntry(name)],
            tokenizer,
            split="validation",
            num_samples=min(limit or sequences, sequences),
            seed=training.seed,
            cache_dir=cache_dir(config),
            **common,
        )
    parallel = config.parallel
    multiple = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return RollingBatches([name], tokenizer, limit=limit, multiple=multiple, **common)


def _check_names(data: Sequence[str]) -> None:
    """Look for all data before the first of it is measured. Raises: DataError."""
    for name in data:
        if _is_dataset(name):
            continue
        if not Path(name).exists():
            raise DataError(
                f"--data {name}: there is neither a dataset {name}.idx nor a file or folder {name}"
            )
        input_files([name])


def _is_dataset(name: str) -> bool:
    return Path(f"{name}.idx").is_file()


def _measure(step: Step, name: str, rows: Rows, bar: Progress | None) -> Measured:
    nats, tokens, text_bytes = add_up(step, rows, bar, name)
    loss = nats / tokens
    if not loss < _LARGEST_LOSS:
        raise DivergedError(
            f"the loss on {name} is {loss} nats per token: this model has diverged, or its weights "
            "are damaged; measure an earlier checkpoint"
        )
    return Measured(name, loss, int(tokens), int(text_bytes))


def _token_sizes(tokenizer: Tokenizer, device: torch.device | str) -> Tensor | None:
    """Bytes of text behind each token id; None when only their neighbours could tell."""
    sizes = tokenizer.token_bytes()
    return None if sizes is None else torch.tensor(sizes, device=device)


def _evaluate_folder(
    path: Path, data: Sequence[str], overrides: Sequence[str], options: Options
) -> list[Measured]:
    if overrides:
        raise ConfigError(f"{path} is a Hugging Face folder: {overrides[0]} has no meaning for it")
    if world_size_from_environment() > 1:
        raise ConfigError(f"{path} is a Hugging Face folder: measure it without torchrun")
    if not data:
        raise ConfigError(f"say what to measure {path} on: --data PREFIX_OR_TEXT")
    model = load_folder(path)
    file = options.tokenizer or plain_tokenizer(path)
    tokenizer = load_tokenizer(file)
    batch_size = options.batch_size or 8
    window = options.seq_length or model.config.max_position_embeddings
    with tempfile.TemporaryDirectory() as cache:
        config = configuration.replace(
            Config(),
            model={"vocab_size": model.get_input_embeddings().num_embeddings},
            data={"cache_dir": cache, "tokenizer": file},
            training={
                "seq_length": window, "micro_batch_size": batch_size,
                "global_batch_size": batch_size,
            },
        )  # fmt: skip
        step = functools.partial(_folder_step, model, _token_sizes(tokenizer, model.device))
        with progress_bar(True) as bar:
            return [
                _measure(step, name, _rows(name, config, tokenizer, None, options.limit), bar)
                for name in data
            ]


def load_folder(path: Path) -> Any:
    """A Hugging Face folder's model, in the precision it was saved in, on the GPU if there is one.

    Nothing of it runs: no code that comes with it or that it names, no pickled weights.

    Raises: ConfigError when transformers is missing or cannot load it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "a Hugging Face folder is read with transformers: pip install 'megatron-idea[export]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    _check_depth(path, *huggingface.check_folder(path))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        ).eval()
    except Exception as error:  # of whatever a config.json can make of a model: any type
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"transformers cannot load {path}: {reason}") from error
    return model.cuda() if torch.cuda.is_available() else model


def _check_depth(path: Path, config: dict[str, Any], weights: Sequence[Path]) -> None:
    """A layer has tensors: transformers builds as many layers as it is told before it looks."""
    import safetensors  # transformers brings it along

    tensors = 0
    for file in weights:
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                tensors += len(opened.keys())
        except Exception as error:  # the library's own type, and OSError
            raise ConfigError(f"cannot read {file}: {error}") from error
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if name in config and not files.is_whole(config[name], 1, tensors):
            raise ConfigError(
                f"{path}: config.json has {name} {config[name]!r:.100}, the files {tensors} tensors"
            )


def _folder_step(model: Any, token_bytes: Tensor | None, rows: Rows, begin: int) -> Tensor:
    total = torch.zeros(3, dtype=torch.float64, device=model.device)
    for batch in micro_batches(rows, begin, token_bytes):
        logits = model(batch["tokens"], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch["labels"].flatten(), reduction="none"
        ).view_as(batch["labels"])
        total += sums_of(losses, batch)
    return total
