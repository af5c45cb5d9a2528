"""Let a model in training, a checkpoint, or an exported folder go on writing from a prompt.

For looking at a model, not for serving it: one sequence at a time, and our own model reads the
whole text again for every token.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea import checkpoint
from megatron_idea import config as configuration
from megatron_idea.checkpoint import storage
from megatron_idea.config import Config, ConfigError, validate
from megatron_idea.data.tokenizer import Tokenizer, load_tokenizer
from megatron_idea.engine.distributed import ProcessGroups, joined
from megatron_idea.engine.model import build_model, transformer_config
from megatron_idea.engine.passes import at_least, evaluating, through
from megatron_idea.evaluation.held_out import load_folder
from megatron_idea.records.log import RecordError
from megatron_idea.records.read import SAMPLES

Logits = Callable[[list[int]], Tensor]
"""Token ids to the next token's logits [vocab_size], fp32 on the CPU."""


@dataclass(frozen=True)
class Sample:
    prompt: str
    text: str
    """What the model wrote after the prompt."""
    ids: list[int]
    """Its tokens; the last one is the end of the document when the model ended it."""


LIVE_TEMPERATURE = 0.8
"""Of samples in training: the likeliest token alone soon repeats itself in a small model."""


@dataclass(frozen=True)
class Writer:
    """A model that can go on from token ids."""

    logits: Logits
    tokenizer: Tokenizer
    window: int
    """Tokens that the model looks back at most."""


def sample(
    path: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    tokenizer: str = "",
) -> list[Sample]:
    """Continue each prompt with a checkpoint, a run's latest checkpoint, or an exported folder.

    Each token is drawn from softmax(logits / temperature) over the ``top_k`` likeliest; 0 takes all
    of them, temperature 0 the likeliest. Every prompt draws its own numbers from ``seed``: what it
    gets does not depend on the others. An empty prompt begins a document.

    Raises: ConfigError for a path that is neither, and for settings out of range.
    Cost: one forward pass over the text for each token; an exported folder keeps its cache.
    """
    for what, value in (
        ("--max-new-tokens", max_new_tokens), ("--temperature", temperature), ("--top-k", top_k),
    ):  # fmt: skip
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{what} is {value}; it must not be negative")
    with open_writer(path, tokenizer) as writer:
        return [
            _continue(writer, prompt, max_new_tokens, temperature, top_k, seed)
            for prompt in prompts
        ]


def remember(run_dir: Path, samples: Sequence[Sample]) -> None:
    """Add samples of a run's latest checkpoint to ``samples.jsonl``: the report shows them."""
    state = checkpoint.read_state(checkpoint.resolve(run_dir))
    place = {"step": state.step, "tokens": state.consumed_tokens}
    lines = [json.dumps(place | {"prompt": one.prompt, "text": one.text}) for one in samples]
    try:
        with (run_dir / SAMPLES).open("a") as file:
            file.write("\n".join([*lines, ""]))
    except OSError as error:
        raise RecordError.of(run_dir, error) from error


def sample_live(
    chunks: Sequence[torch.nn.Module], config: Config, groups: ProcessGroups, tokenizer: Tokenizer
) -> list[Sample]:
    """Let a model in training go on from ``evaluation.sample_prompts``.

    Collective over all ranks and equal on all of them. Each prompt draws from the same numbers at
    every call: what changes from one call to the next is the model.
    """
    settings = config.evaluation
    with evaluating(chunks):
        writer = Writer(_live_logits(chunks, config, groups), tokenizer, config.training.seq_length)
        return [
            _continue(writer, prompt, settings.sample_tokens, LIVE_TEMPERATURE, 0, seed=0)
            for prompt in settings.sample_prompts
        ]


def _live_logits(
    chunks: Sequence[torch.nn.Module], config: Config, groups: ProcessGroups
) -> Logits:
    """Next-token logits of a model over TP x PP ranks; data-parallel peers all do the same.

    Collective over all ranks.
    """
    copies = at_least(chunks, groups)  # of the same row
    # Few different lengths: kernels are tuned, and rotary embeddings are kept, for each.
    multiple = math.lcm(64, groups.tp.size())

    def logits(ids: list[int]) -> Tensor:
        length = min(-(-len(ids) // multiple) * multiple, config.training.seq_length)
        row = torch.tensor([ids + [0] * (length - len(ids))], device=groups.device)
        batch = row, torch.arange(length, device=groups.device).unsqueeze(0)
        outputs = through(
            chunks,
            lambda: iter([batch] * copies),
            _forward,
            num_microbatches=copies,
            seq_length=length,
            micro_batch_size=1,
        )
        found = torch.zeros(config.model.vocab_size, device=groups.device)
        if groups.is_last_stage and groups.tp.rank() == 0 and groups.dp.rank() == 0:
            found += outputs[0][0, len(ids) - 1].float()
        dist.all_reduce(found)
        return found.cpu()

    return logits


def _forward(
    batches: Iterator[tuple[Tensor, Tensor]], model: torch.nn.Module
) -> tuple[Tensor, Any]:
    tokens, positions = next(batches)
    # No function of a loss: megatron-core then hands out what the last stage returns.
    return model(tokens, positions, None, runtime_gather_output=True), None


@torch.no_grad()
def _continue(
    writer: Writer, prompt: str, max_new_tokens: int, temperature: float, top_k: int, seed: int
) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    start = writer.tokenizer.encode(prompt) or [writer.tokenizer.eod]
    ids: list[int] = []
    while len(ids) < max_new_tokens and writer.tokenizer.eod not in ids[-1:]:
        logits = writer.logits([*start, *ids][-writer.window :])
        logits = logits[: writer.tokenizer.vocab_size]  # rows beyond it stand for nothing
        ids.append(draw(logits, temperature, top_k, generator))
    text = writer.tokenizer.decode([i for i in ids if i != writer.tokenizer.eod])
    return Sample(prompt, text, ids)


def draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token id from logits [vocab_size]."""
    if temperature == 0:
        return int(logits.argmax())
    values, ids = logits.sort(descending=True, stable=True)
    count = min(top_k, len(ids)) or len(ids)
    # The likeliest first: the numbers drawn mean the same for two models that differ by rounding.
    chances = torch.softmax(values[:count].double() / temperature, dim=0)
    return int(ids[int(torch.multinomial(chances, 1, generator=generator))])


@contextlib.contextmanager
def open_writer(path: Path, tokenizer: str = "") -> Iterator[Writer]:
    """Load a checkpoint into our own model in this process, or an exported folder."""
    if (path / "config.json").is_file():
        yield _exported(path, tokenizer)
        return
    with open_model(path) as (forward, config):
        yield Writer(
            lambda ids: forward(torch.tensor([ids]))[0, -1].float().cpu(),
            load_tokenizer(tokenizer or config.data.tokenizer),
            config.training.seq_length,
        )


@contextlib.contextmanager
def open_model(path: Path) -> Iterator[tuple[Callable[[Tensor], Tensor], configuration.Config]]:
    """A checkpoint's model in this process, whatever layout wrote it.

    Yields: token ids [b, s] -> logits [b, s, vocab_size], and the configuration.
    Raises: ConfigError without a checkpoint, CheckpointError when it cannot be read.
    """
    found = checkpoint.resolve(path)
    storage.verify(found)
    config = checkpoint.read_config(found, checkpoint.ONE_PROCESS)
    config = configuration.replace(
        config, training={"global_batch_size": config.training.micro_batch_size}
    )
    validate(config, world_size=1)
    state = checkpoint.read_state(found, config)
    with joined(config.parallel, config.training.seed) as groups:
        core = transformer_config(config.model, config.training, config.parallel, state.shape)
        (model,) = build_model(config.model, config.training, core, groups)
        checkpoint.load_weights([model], found, groups)
        model.eval()

        @torch.no_grad()
        def forward(tokens: Tensor) -> Tensor:
            tokens = tokens.to(groups.device)
            positions = torch.arange(tokens.shape[1], device=groups.device).expand_as(tokens)
            return model(tokens, positions, None)

        yield forward, config


def _exported(path: Path, tokenizer: str) -> Writer:
    model = load_folder(path)
    # With our own reader of tokenizer.json the same text gets the same ids as in training.
    loaded = load_tokenizer(tokenizer or path)
    return Writer(_Cached(model).logits, loaded, model.config.max_position_embeddings)


class _Cached:
    """Next-token logits of a ``transformers`` model that remembers the tokens it has read."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._read: list[int] = []
        self._cache: Any = None

    def logits(self, ids: list[int]) -> Tensor:
        if self._cache is None or ids[: len(self._read)] != self._read or ids == self._read:
            self._read, self._cache = [], None  # another prompt, or the window has moved
        new = torch.tensor([ids[len(self._read) :]], device=self._model.device)
        out = self._model(new, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._read, self._cache = list(ids), out.past_key_values
        return out.logits[0, -1].float().cpu()
