"""Pruning in a loop, and of a model and an optimizer, that are none of ours."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from jobs import on_ranks, random_tokens, run_job

from megatron_idea import config as configuration
from megatron_idea.config import Config, ConfigError, ParallelConfig, PruneTarget, replace
from megatron_idea.shape import Shape
from megatron_idea.testing import Workers, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH, LENGTH = 14, 4, 8
TARGET = {"ffn_hidden_size": 12, "num_query_groups": 2, "num_layers": 2}


def pruned(target: dict[str, int], **prune: Any) -> Config:
    """Removal in steps 4 to 9 of 14."""
    config = configuration.from_dict(
        {
            "model": {
                "num_layers": 4, "hidden_size": 16, "ffn_hidden_size": 24,
                "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 4,
                "vocab_size": 32, "qk_layernorm": True, "init_method_std": 0.1,
            },
            "training": {"seq_length": LENGTH, "global_batch_size": BATCH},
            "schedule": {
                "total_tokens": STEPS * BATCH * LENGTH, "enlarged_fraction": 2 / 14,
                "prune_fraction": 7 / 14, "recover_fraction": 5 / 14, "prune_warmup_fraction": 0.2,
            },
            "prune": {"alignment": 2, "compaction_block": 4},
        }
    )  # fmt: skip
    return replace(config, prune={"target": PruneTarget(**target), **prune})


class Host:
    """A team's own code: stock modules of megatron-core, and a loop of a few lines."""

    def __init__(self, groups: ProcessGroups, config: Config, **core: Any) -> None:
        self.groups, self.layout = groups, config.parallel
        self.config = replace(config, parallel=ParallelConfig())
        self.core, self.builds = core, 0
        self.ddp: dict[str, Any] = {"grad_reduce_in_fp32": True}
        self.adam: dict[str, Any] = {}
        self.chunks, self.optimizer = self.build(Shape.full(config.model))

    def build(self, shape: Shape) -> tuple[list[Any], Any]:
        import torch.nn.functional as F
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.module import Float16Module

        from megatron_idea.engine.model import initialize_weights, pipeline_layout

        self.builds += 1
        torch.rand(self.builds)  # a host may draw random numbers
        model, layer, groups = self.config.model, shape.layers[0], self.groups
        bf16 = self.config.training.precision == "bf16"
        numbers = {"bf16": bf16, "params_dtype": torch.bfloat16 if bf16 else torch.float32}
        core = TransformerConfig(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            ffn_hidden_size=layer.ffn_hidden_size,
            num_query_groups=layer.num_query_groups,
            num_attention_heads=layer.num_query_groups * layer.heads_per_group,
            kv_channels=model.kv_channels,
            tensor_model_parallel_size=groups.tp.size(),
            pipeline_model_parallel_size=groups.pp.size(),
            pipeline_model_parallel_layout=pipeline_layout(shape.num_layers, groups.pp.size()),
            pipeline_dtype=numbers["params_dtype"],
            normalization="RMSNorm",
            qk_layernorm=model.qk_layernorm,
            gated_linear_unit=True,
            activation_func=F.silu,
            attention_dropout=0.0,
            **numbers,
            **{"add_bias_linear": False, "hidden_dropout": 0.0, **self.core},
        )
        gpt = GPTModel(
            core,
            get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=model.qk_layernorm),
            model.vocab_size,
            LENGTH,
            pre_process=groups.pp.rank() == 0,
            post_process=groups.is_last_stage,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=True,
        )
        if not core.add_bias_linear:
            initialize_weights(model, 7, [gpt], groups)
        sharded = self.layout.use_distributed_optimizer
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=sharded, **self.ddp)
        inner = Float16Module(core, gpt) if bf16 else gpt
        chunks = [DistributedDataParallel(core, ddp, inner)]
        core.finalize_model_grads_func = finalize_model_grads
        adam = OptimizerConfig(
            **{"optimizer": "adam", "lr": 3e-3, "use_distributed_optimizer": sharded, **self.adam},
            **numbers,
        )
        return chunks, get_megatron_optimizer(adam, chunks, use_gloo_process_groups=False)

    def pruning(self, **arguments: Any) -> Any:
        from megatron_idea.library import Pruning

        collection = self.groups.collection
        return Pruning(
            self.config, self.chunks, self.optimizer, collection, self.build, **arguments
        )

    def passes(self, step: int, backward: bool = True) -> list[torch.Tensor]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        dp = self.groups.dp
        tokens = random_tokens(self.config, step).chunk(dp.size())[dp.rank()]

        def forward(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
            window = next(batches)
            places = torch.arange(LENGTH).expand(len(window), -1)
            losses = model(window[:, :-1], places, None, labels=window[:, 1:])
            return losses, lambda losses: (losses.mean(), losses.mean().detach())

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        found: list[torch.Tensor] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(tokens.split(2)),
            model=self.chunks,
            num_microbatches=len(tokens) // 2,
            seq_length=LENGTH,
            micro_batch_size=2,
            forward_only=not backward,
        )
        return found

    def train(self, pruning: Any, first: int = 1, last: int = STEPS) -> list[float]:
        """Take steps; returns their losses on the last pipeline stage."""
        losses = []
        for step in range(first, last + 1):
            self.step = step
            tokens = step * self.config.batch_tokens
            with pruning.watched(tokens):
                found = self.passes(step)
            pruning.observe(tokens)
            if step == 2:  # and never again: it has to survive the rebuilds
                for group in self.optimizer.param_groups:
                    group["lr"] = 1e-3
            taken, self.norm, _ = self.optimizer.step()
            if pruning.after_step(tokens, taken):
                self.chunks, self.optimizer = pruning.chunks, pruning.optimizer
            mean = torch.tensor([sum(map(float, found)) / max(1, len(found))])
            torch.distributed.all_reduce(mean, group=self.groups.dp)
            losses.append(float(mean) / self.groups.dp.size())
        return losses


def whole_run(groups: ProcessGroups, config: Config, **core: Any) -> dict[str, Any]:
    host = Host(groups, config, **core)
    pruning = host.pruning(losses=lambda: host.passes(host.step, backward=False))
    losses = host.train(pruning)
    return {
        "losses": losses if groups.is_last_stage else None,
        "live": pruning.live,
        "shape": pruning.shape,
        "builds": host.builds,
    }


def with_dropout(groups: ProcessGroups, config: Config) -> dict[str, Any]:
    return whole_run(groups, config, hidden_dropout=0.1)


# ----------------------------------------------------------------------------- silent = cut


@pytest.fixture(scope="module")
def alone(workers: Workers) -> dict[str, Any]:
    (found,) = run_job(workers, whole_run, 1, pruned(TARGET, compact=False))
    assert found["builds"] == 1
    return found


PLAIN = {"use_distributed_optimizer": False}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, PLAIN),
    "tp2": (2, {**PLAIN, "tensor_model_parallel_size": 2}),
    "pp2": (2, {**PLAIN, "pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stock_modules_train_alike_with_silent_units_and_without_them(
    workers: Workers, alone: dict[str, Any], layout: str
) -> None:
    world_size, parallel = LAYOUTS[layout]
    *_, cut = run_job(workers, whole_run, world_size, replace(pruned(TARGET), parallel=parallel))
    assert cut["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert cut["live"] == alone["live"]
    assert cut["builds"] >= 3
    assert {axis: set(cut["shape"].counts(axis)) for axis in TARGET} == {
        axis: {count} for axis, count in TARGET.items()
    }


def test_main_weights_of_bf16_come_along(workers: Workers, alone: dict[str, Any]) -> None:
    config = replace(pruned(TARGET), training={"precision": "bf16"})
    cut, _ = run_job(workers, whole_run, 2, config)
    assert cut["losses"] == pytest.approx(alone["losses"], abs=0.05)
    assert cut["builds"] >= 3


def test_a_rebuild_draws_no_random_number_that_training_would_miss(workers: Workers) -> None:
    config = pruned({"ffn_hidden_size": 12})
    silent, cut = (
        run_job(workers, with_dropout, 1, replace(config, prune={"compact": compact}))[0]
        for compact in (False, True)
    )
    assert cut["losses"] == pytest.approx(silent["losses"], rel=1e-6)
    assert cut["builds"] > silent["builds"] == 1


@on_ranks(1, **PLAIN)
def test_an_activation_method_prunes_a_stock_model(groups: ProcessGroups, config: Config) -> None:
    config = replace(pruned({"ffn_hidden_size": 12}, strategy="wanda"), parallel=config.parallel)
    host = Host(groups, config)
    pruning = host.pruning()
    host.train(pruning)
    assert pruning.live["ffn_hidden_size"] == [12] * 4


# -------------------------------------------------------------------------------- resume


@on_ranks(1, **PLAIN)
def test_a_state_from_mid_prune_goes_on_bit_for_bit(groups: ProcessGroups, config: Config) -> None:
    config = replace(
        pruned({"ffn_hidden_size": 12}, mask_interval_steps=2), parallel=config.parallel
    )
    host = Host(groups, config)
    pruning = host.pruning()
    host.train(pruning, last=7)
    assert pruning.shape != Shape.full(config.model)
    file = io.BytesIO()
    saved = [pruning.state_dict(), host.chunks[0].state_dict(), host.optimizer.state_dict()]
    torch.save(saved, file)
    losses = host.train(pruning, first=8)

    file.seek(0)
    of_pruning, weights, moments = torch.load(file)
    again = Host(groups, config)
    resumed = again.pruning()
    assert resumed.load_state_dict(of_pruning)
    again.chunks, again.optimizer = resumed.chunks, resumed.optimizer
    again.chunks[0].load_state_dict(weights)
    again.optimizer.load_state_dict(moments)
    assert again.train(resumed, first=8) == losses
    for one, other in zip(host.chunks[0].parameters(), again.chunks[0].parameters(), strict=True):
        assert_equal(one, other)
    assert not resumed.load_state_dict(resumed.state_dict())


# --------------------------------------------------------------------------- what is refused

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prune": {"strategy": "none"}}, "nothing to do"),
    ({"prune": {"strategy": "adapt_pruner"}}, "adapt_pruner gives layers different sizes"),
    ({"prune": {"scope": "global"}}, "scope=global gives layers different sizes"),
    ({"prune": {"target": PruneTarget(hidden_size=8)}}, "a norm divides by the number"),
    ({"prune": {"calibration_steps": 1}}, "scores come from your steps"),
    ({"prune": {"target": PruneTarget(num_layers=2)}}, "`losses` is needed"),
    ({"prune": {"target": PruneTarget(ffn_hidden_size=24)}}, "must be below"),
    ({"optimizer": {"clip_grad": 0.0}}, "optimizer means nothing here"),
    ({"training": {"precision": "bf16"}}, "training.precision is bf16"),
    ({"model": {"ffn_hidden_size": 28}}, r"by the configuration .* it is \(56, 16\)"),
    ({"model": {"qk_layernorm": False}}, "nobody knows who owns .*q_layernorm"),
]


@on_ranks(1, **PLAIN)
def test_what_cannot_be_pruned_is_refused_in_words(groups: ProcessGroups, config: Config) -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_idea.library import HostError

    plain = replace(pruned({"ffn_hidden_size": 12}), parallel=config.parallel)
    host = Host(groups, plain)
    given = host.config
    for change, words in REFUSED:
        host.config = replace(given, **change)
        with pytest.raises((HostError, ConfigError), match=words):
            host.pruning()
    host.config = given

    def refused(words: str, **changes: Any) -> None:
        before = {name: getattr(host, name) for name in changes}
        vars(host).update(changes)
        with pytest.raises(HostError, match=words):
            host.pruning()
        vars(host).update(before)

    refused("chunk is a GPTModel", chunks=[host.chunks[0].module])
    refused("optimizer is FP32Optimizer .sgd.", optimizer=rebuilt(host, adam={"optimizer": "sgd"}))
    lacking = type(groups)(ProcessGroupCollection(tp=groups.tp), groups.device)
    refused("lack pp, mp, dp, dp_cp", groups=lacking)
    with_bias = Host(groups, plain, add_bias_linear=True)
    with pytest.raises(HostError, match=r"nobody knows who owns .*bias"):
        with_bias.pruning()


def rebuilt(host: Host, **changes: Any) -> Any:
    """Another optimizer of the host's."""
    before = {name: getattr(host, name) for name in changes}
    vars(host).update(changes)
    _, optimizer = host.build(Shape.full(host.config.model))
    vars(host).update(before)
    return optimizer


@on_ranks(1, **PLAIN)
def test_a_loop_that_forgets_a_call_is_told_which(groups: ProcessGroups, config: Config) -> None:
    from megatron_idea.library import HostError

    config = replace(pruned({"ffn_hidden_size": 12}, strategy="wanda"), parallel=config.parallel)
    host = Host(groups, config)
    pruning = host.pruning()
    host.passes(1)
    with pytest.raises(HostError, match=r"with pruning.watched\(32\)"):
        pruning.observe(32)
    with pytest.raises(HostError, match=r"call observe\(32\)"):
        pruning.after_step(32)
    with pytest.raises(HostError, match="another model"):
        pruning.load_state_dict({**pruning.state_dict(), "tensors": {}})


@on_ranks(1, **PLAIN)
def test_after_a_rebuild_the_old_model_is_empty(groups: ProcessGroups, config: Config) -> None:
    from megatron_idea.library import HostError

    host = Host(groups, replace(pruned({"ffn_hidden_size": 12}), parallel=config.parallel))
    pruning, old, optimizer = host.pruning(), host.chunks, host.optimizer
    host.train(pruning, last=8)
    assert pruning.report is not None and old is not host.chunks
    assert all(parameter.numel() == 0 for parameter in old[0].parameters())
    for one, method in (
        (old[0], "zero_grad_buffer"),
        (old[0], "forward"),
        (optimizer, "step"),
    ):
        with pytest.raises(HostError, match=r"take pruning\.chunks and pruning\.optimizer"):
            getattr(one, method)()

    def unready(shape: Shape) -> tuple[list[Any], Any]:
        chunks, optimizer = host.build(shape)
        chunks[0].config.finalize_model_grads_func = None
        return chunks, optimizer

    pruning._trainable.build = unready
    with pytest.raises(HostError, match="had finalize_model_grads_func"):
        pruning._trainable.rebuilt(pruning.shape)


# ------------------------------------------------------------------------ example and documents

EXAMPLE = ROOT / "examples/library.py"


def run_example(_rendezvous: str) -> str:
    from megatron_idea.engine.distributed import stop_distributed

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    stop_distributed()
    return said.getvalue()


def test_the_example_trains_and_shrinks(workers: Workers) -> None:
    (said,) = workers.run(run_example, 1)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    sizes = [int(size.replace(",", "")) for size in re.findall(r"parameters ([\d,]+)", said)]
    assert losses[-1] < losses[0] - 1
    assert sizes[0] - sizes[-1] == 2 * 3 * 64 * 64  # of gate, up and down, in two layers


def run_snippets(_rendezvous: str, folder: Path) -> tuple[int, ...]:
    from megatron_idea.engine.distributed import stop_distributed
    from megatron_idea.prune.relocate import extension

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.S)
    assert len(blocks) == 5
    host = runpy.run_path(str(EXAMPLE))
    names = {
        **host,
        "config": host["CONFIG"],
        "steps": host["STEPS"],
        "path": folder / "pruning.pt",
    }
    names["groups"] = host["start"]()
    for block in blocks:
        if "_C" not in block or extension() is not None:
            exec(block, names)
    stop_distributed()
    counts: tuple[int, ...] = names["pruning"].shape.counts("ffn_hidden_size")
    return counts


def test_the_documents_snippets_run(workers: Workers, tmp_path: Path) -> None:
    assert workers.run(run_snippets, 1, tmp_path) == [(64, 64)]
