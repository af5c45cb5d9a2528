"""A second model in the student's layout that is never trained, pruned or saved with the run.

A step is two passes with megatron-core's own schedules: the teacher's forward passes over all
micro-batches, which leave its last hidden states on the last pipeline stage; then the student's
forward and backward passes, whose loss applies the teacher's output layer to the hidden states of
its micro-batch. Nothing of vocabulary size is kept or travels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_idea.config import DistillConfig, ModelConfig, ParallelConfig, TrainingConfig
from megatron_idea.distill.loss import TokenLosses, distillation_losses
from megatron_idea.engine.distributed import ProcessGroups
from megatron_idea.engine.model import build_model, transformer_config, unwrap
from megatron_idea.engine.passes import MicroBatches, through
from megatron_idea.shape import Shape


@dataclass
class Lessons:
    """What a step's losses are made of, on the last pipeline stage; elsewhere lists are empty.

    Means over the tokens of each micro-batch, in nats, none of them scaled.
    """

    cross_entropy: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    teacher_cross_entropy: list[Tensor] = field(default_factory=list)
    acceptance: list[Tensor] = field(default_factory=list)

    def note(self, losses: TokenLosses) -> None:
        """Take in a micro-batch."""
        self.cross_entropy.append(losses.cross_entropy.mean())
        self.kl.append(losses.kl.mean())
        self.teacher_cross_entropy.append(losses.teacher_cross_entropy.mean())
        if losses.acceptance is not None:
            self.acceptance.append(losses.acceptance.mean())


class Teacher:
    """A model of its own size over the student's ranks; it has weights once something is loaded."""

    def __init__(
        self,
        model: ModelConfig,
        shape: Shape,
        training: TrainingConfig,
        parallel: ParallelConfig,
        settings: DistillConfig,
        groups: ProcessGroups,
    ) -> None:
        """Build it, without weights.

        Args:
            model, shape: the teacher's; training, parallel: the student's.
        """
        self.model, self.shape = model, shape
        self._settings, self._groups = settings, groups
        core = transformer_config(model, training, parallel, shape)
        # Not what casts outputs to fp32.
        self.chunks: list[Any] = [unwrap(c) for c in build_model(model, training, core, groups)]
        for chunk in self.chunks:
            chunk.eval().requires_grad_(False)
        last = self.chunks[-1]
        self._head = last.output_layer if last.post_process else None
        self._head_weight = None
        if last.post_process and last.share_embeddings_and_output_weights:
            # With one stage the layer has no weight of its own.
            self._head_weight = last.shared_embedding_or_output_weight()

    @contextlib.contextmanager
    def _without_head(self) -> Iterator[None]:
        """Let the last chunk return hidden states: its own output layer is ours to call."""
        last = self.chunks[-1]
        last.post_process = False
        try:
            yield
        finally:
            last.post_process = self._head is not None

    @torch.no_grad()
    def hidden_states(self, data: MicroBatches, samples: int) -> list[Tensor]:
        """Run the forward passes of the step after ``samples`` samples; collective.

        Returns: [s / TP under sequence parallelism, b, H] of each micro-batch, after the final
            norm, on the last stage; elsewhere nothing.
        """
        with self._without_head():
            results = through(
                self.chunks,
                lambda: data.step(samples),
                _forward_to_host if self._settings.keep_hidden == "host" else _forward,
                data.num_microbatches,
                data.seq_length,
                data.micro_batch_size,
            )
        return [result["hidden"] for result in results]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output layer; [s, b, vocabulary / TP]."""
        assert self._head is not None, "the output layer is on the last pipeline stage"
        found, _bias = self._head(hidden.to(self._groups.device), weight=self._head_weight)
        return found

    @contextlib.contextmanager
    def teaching(
        self, chunks: Sequence[torch.nn.Module], data: MicroBatches, samples: int, alpha: float
    ) -> Iterator[Lessons]:
        """Let the losses of the student's next step be mixed ones; collective.

        Yields: what fills as micro-batches go by.
        """
        hidden = iter(self.hidden_states(data, samples))
        lessons, settings = Lessons(), self._settings

        def mixed(labels: Tensor, logits: Tensor) -> Tensor:
            """[b, s] labels and [s, b, vocabulary / TP] logits to [b, s] losses."""
            labels = labels.transpose(0, 1).contiguous()
            losses = distillation_losses(
                logits,
                self.logits(next(hidden)),
                labels,
                self._groups.tp,
                alpha=alpha,
                temperature=settings.temperature,
                direction=settings.direction,
                top_k=settings.top_k,
                token_chunk=settings.token_chunk,
                acceptance=settings.acceptance,
            )
            lessons.note(losses)
            return losses.mixed.transpose(0, 1).contiguous()

        last: Any = unwrap(chunks[-1])
        # megatron-core's model calls this with the logits as they are, in bf16 and split.
        last.compute_language_model_loss = mixed
        try:
            yield lessons
        finally:
            del last.compute_language_model_loss


def _forward(batches: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], None)
    return output, lambda hidden: (hidden.new_zeros(()), {"hidden": hidden.detach()})


def _forward_to_host(
    batches: Iterator[dict[str, Tensor]], model: torch.nn.Module
) -> tuple[Tensor, Any]:
    output, _ = _forward(batches, model)
    # One micro-batch at a time is on the device.
    return output, lambda hidden: (hidden.new_zeros(()), {"hidden": hidden.detach().cpu()})
