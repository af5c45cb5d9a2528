"""Compaction of a checkpoint on disk: the oracle of the live one, and a tool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import mask_of
from typer.testing import CliRunner

from megatron_idea import checkpoint, cli
from megatron_idea.config import METHODS, Config, replace, validate
from megatron_idea.records.lock import RunLock
from megatron_idea.testing import Workers

runner = CliRunner()


def online_job(rendezvous: str, config: Config) -> list[tuple[str, str]]:
    """Train to the end; the checkpoints right before and right after each compaction."""
    import shutil

    from megatron_idea.engine.distributed import start_distributed, stop_distributed
    from megatron_idea.train import build, step

    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        run, state = build(config, groups)
        out = []
        while state.consumed_tokens < config.schedule.total_tokens:
            shape = state.shape
            step(run, state)
            if state.shape == shape:
                continue
            before = checkpoint.latest(config.run_dir)
            assert before is not None and checkpoint.read_state(before).plan_due
            kept = Path(config.run_dir).parent / f"before_{state.step}"
            if groups.is_writer:
                shutil.copytree(before, kept / "checkpoints" / before.name)
            after = checkpoint.save(config, run.trainable, run.pruner, state)
            out.append((str(kept), str(after)))
        run.log.close()
        return out
    finally:
        stop_distributed()


def content_job(rendezvous: str, config: Config, path: str) -> dict[str, Any]:
    """All that a checkpoint holds, as one process sees it: state, parameters, scores."""
    import torch

    from megatron_idea.engine.distributed import start_distributed, stop_distributed
    from megatron_idea.engine.model import named_parameters
    from megatron_idea.engine.trainable import assemble
    from megatron_idea.prune.pruner import Pruner

    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        state = checkpoint.read_state(Path(path))
        trainable = assemble(config.sections, groups, state.shape, initialize=False)
        pruner = Pruner(config, trainable)
        checkpoint.load(trainable, pruner, Path(path))
        shards = trainable.exchange()
        out: dict[str, Any] = {
            "widths": state.shape.counts("ffn_hidden_size"),
            "step": state.adam_step,
        }
        for name, parameter in named_parameters(trainable.chunks):
            whole = shards.gather(parameter)
            assert whole is not None
            out[name] = whole.view(3, *parameter.shape).numpy()
        for layer, mlp in trainable.mlps:
            ids = pruner.stored["ffn_hidden_size"][layer]
            out[f"{layer}.ids"] = ids.numpy().copy()
            out[f"{layer}.mask"] = mask_of(mlp).numpy()
            # Neurons by id: tensor-parallel ranks may have put them in another order.
            order = torch.argsort(ids).numpy()
            fc1, fc2 = (out[f"decoder.layers.{layer}.mlp.linear_fc{i}.weight"] for i in (1, 2))
            fc1 = fc1.reshape(3, 2, len(order), -1)
            ids, mask = out[f"{layer}.ids"], out[f"{layer}.mask"]
            out[f"{layer}.sorted"] = [fc1[:, :, order], fc2[:, :, order], ids[order], mask[order]]
        out["scores"] = pruner.state(trainable)["scores.average.0.ffn_hidden_size"].numpy()
        return out
    finally:
        stop_distributed()


TP2 = {"tensor_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("world_size", "parallel", "placement", "precision"),
    [
        (1, {}, "min", "fp32"),
        (2, TP2, "ordered", "bf16"),
        (2, {"pipeline_model_parallel_size": 2}, "min", "bf16"),
        (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, "min", "bf16"),
    ],
    ids=["one", "tp2_ordered_bf16", "pp2_bf16", "dp2_overlapped_bf16"],
)
def test_online_and_offline_compaction_agree_bit_for_bit(
    world_size: int,
    parallel: dict[str, Any],
    placement: str,
    precision: str,
    tiny_halved: Config,
    workers: Workers,
) -> None:
    one = replace(tiny_halved, training={"precision": precision}, prune={"placement": placement})
    config = replace(one, parallel=parallel, checkpoint={"before_compaction": True, "keep_last": 0})
    validate(config, world_size)
    pairs = workers.run(online_job, world_size, config)[0]
    assert len(pairs) >= 3
    for before, after in pairs[:: len(pairs) - 1]:
        out = Path(f"{before}_offline")
        result = runner.invoke(cli.app, ["compact", before, "--out", str(out)])
        assert result.exit_code == 0, result.output
        offline = result.stdout.replace("\n", "").strip()
        assert Path(offline) == checkpoint.latest(out)
        (theirs,) = workers.run(content_job, 1, one, after)
        (ours,) = workers.run(content_job, 1, one, offline)
        assert ours["widths"] == theirs["widths"] and ours["step"] == theirs["step"] > 0
        for key, value in theirs.items():
            if key.endswith(".sorted"):
                for a, b in zip(value, ours[key], strict=True):
                    assert a.tobytes() == b.tobytes(), key
            elif isinstance(value, np.ndarray) and (
                world_size == 1 or "tensor_model_parallel_size" not in parallel
                or placement == "ordered" or ("mlp" not in key and not key[0].isdigit())
            ):  # fmt: skip
                assert value.tobytes() == ours[key].tobytes(), key


@pytest.fixture
def trained(tiny: Config, tmp_path: Path, workers: Workers) -> Path:
    """A run that ended in the middle of its prune phase, with scores and masked neurons."""
    workers.run(half_job, 1, replace(tiny, prune={"compact": False}))
    return tmp_path / "run"


def half_job(rendezvous: str, config: Config) -> None:
    from megatron_idea.engine.distributed import start_distributed, stop_distributed
    from megatron_idea.train import build, save, step

    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        run, state = build(config, groups)
        for number in range(12):
            step(run, state)
            if number == 3:
                early = replace(config, run_dir=f"{config.run_dir}_early")
                checkpoint.save(early, run.trainable, run.pruner, state)
        save(run, state, wait=True)
        run.log.close()
    finally:
        stop_distributed()


def widths_of(path: Path) -> tuple[int, ...]:
    return checkpoint.read_state(checkpoint.resolve(path)).shape.counts("ffn_hidden_size")


def compact(*arguments: Any) -> Any:
    return runner.invoke(cli.app, ["compact", *map(str, arguments)])


def test_masked_neurons_leave_by_default(trained: Path, tmp_path: Path) -> None:
    state = checkpoint.read_state(checkpoint.resolve(trained))
    assert widths_of(trained) == (64, 64)
    result = compact(trained, "--out", tmp_path / "small")
    assert result.exit_code == 0, result.output
    small = checkpoint.read_state(checkpoint.resolve(tmp_path / "small"))
    assert all(24 <= w < 64 and w % 4 == 0 for w in widths_of(tmp_path / "small"))
    assert (small.step, small.consumed_tokens) == (state.step, state.consumed_tokens)
    again = compact(tmp_path / "small", "--out", tmp_path / "smaller")
    assert again.exit_code == 2 and "nothing to compact" in " ".join(again.stderr.split())


def test_the_most_important_neurons_stay_and_the_result_can_be_trained_on(
    trained: Path, tmp_path: Path, tiny: Config, workers: Workers
) -> None:
    result = compact(trained, "--out", tmp_path / "small", "--to", "24,20")
    assert result.exit_code == 0, result.output
    path = checkpoint.resolve(tmp_path / "small")
    widths = widths_of(path)
    assert widths == (24, 20)
    (content,) = workers.run(content_job, 1, tiny, str(path))
    (before,) = workers.run(content_job, 1, tiny, str(checkpoint.resolve(trained)))
    for layer, width in enumerate(widths):
        scores = before["scores"][layer].max(axis=0) * before[f"{layer}.mask"]
        expected = sorted(np.argsort(-scores, kind="stable")[:width].tolist())
        assert content[f"{layer}.ids"].tolist() == expected
        assert content[f"{layer}.mask"].all()
    from megatron_idea.config import to_yaml

    config = replace(tiny, run_dir=str(tmp_path / "small"), prune={"compact": False})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    went_on = runner.invoke(cli.app, ["train", str(tmp_path / "run.yaml")])
    assert went_on.exit_code == 0, went_on.output
    assert checkpoint.read_state(checkpoint.resolve(tmp_path / "small")).step == 24


def test_widths_that_cannot_be_are_refused(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"

    def refused(*arguments: Any, says: str) -> None:
        result = compact(*arguments)
        assert result.exit_code == 2 and says in " ".join(result.stderr.split()), result.output
        assert not checkpoint.complete(out)

    refused(trained, "--out", out, "--to", "30", says="nearest legal values: 28, 32")
    refused(trained, "--out", out, "--to", "0", says="nearest legal values: 4")
    refused(trained, "--out", out, "--to", "68", says="is 68, and there are 64")
    refused(trained, "--out", out, "--to", "28,28,28", says="--to has 3 values for ffn_hidden_size")
    refused(trained, "--out", out, "--to", "small", says="give whole numbers")
    refused(trained, "--out", trained, says="has checkpoints already")
    with RunLock(out):
        refused(trained, "--out", out, "--to", "28", says=f"{out} is in use by process")
    refused(tmp_path / "nowhere", "--out", out, says="neither a checkpoint nor a run")
    refused(f"{trained}_early", "--out", out, "--to", "32", says="has no scores")


def untrained_job(rendezvous: str, config: Config) -> None:
    from megatron_idea.engine.distributed import start_distributed, stop_distributed
    from megatron_idea.train import build, save

    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        run, state = build(config, groups)
        save(run, state, wait=True)
        run.log.close()
        split = replace(config, run_dir=f"{config.run_dir}_split", parallel=SPLIT)
        checkpoint.save(split, run.trainable, run.pruner, state)
    finally:
        stop_distributed()


# Tensor-parallel ranks and interleaved stages, though one process works on the checkpoint.
SPLIT = {
    "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
}  # fmt: skip


@pytest.fixture
def untrained(tiny: Config, tmp_path: Path, workers: Workers) -> Path:
    """What an import leaves: weights of step 0, no optimizer state, a run that prunes nothing."""
    model = {"num_layers": 4, "init_method_std": 0.2}
    workers.run(untrained_job, 1, replace(tiny, model=model, prune={"strategy": "none"}))
    return tmp_path / "run"


def state_of(run: Path) -> checkpoint.TrainState:
    return checkpoint.read_state(checkpoint.resolve(run))


def test_any_model_is_pruned_from_passes_over_data_alone(
    untrained: Path, tmp_path: Path, dataset: Path
) -> None:
    model = checkpoint.read_config(checkpoint.resolve(untrained)).model
    full = state_of(untrained).shape
    goal = full.parameters(model).total * 7 // 10
    small, again, other = (tmp_path / name for name in ("small", "again", "other"))
    draw = ("--strategy", "adapt_pruner", "--to", f"parameters={goal}", "--samples", "6")
    for out, more in ((small, ()), (again, ()), (other, ("--data", f"{dataset}_heldout"))):
        result = compact(untrained, "--out", out, *draw, *more)
        assert result.exit_code == 0, result.output
    found = state_of(small).shape
    assert goal - 4 * 3 * 32 < found.parameters(model).total <= goal  # a block of four neurons
    assert all(n % 4 == 0 for n in found.counts("ffn_hidden_size"))
    assert len(set(found.counts("ffn_hidden_size"))) > 1, "layers differ"
    assert state_of(again).shape == found
    assert state_of(other).shape.parameters(model).total <= goal


def test_counts_are_legal_for_the_layout_of_the_run(untrained: Path, tmp_path: Path) -> None:
    split = Path(f"{untrained}_split")
    model = checkpoint.read_config(checkpoint.resolve(split)).model
    goal = state_of(split).shape.parameters(model).total * 8 // 10
    given = ("--strategy", "adapt_pruner", "--to", f"parameters={goal}", "--samples", "6")
    result = compact(split, "--out", tmp_path / "small", *given)
    assert result.exit_code == 0, result.output
    found = state_of(tmp_path / "small").shape
    assert all(n % 8 == 0 for n in found.counts("ffn_hidden_size"))
    assert all(n % 2 == 0 for n in found.counts("num_query_groups"))
    assert found.parameters(model).total <= goal


def test_a_method_chooses_as_many_as_are_asked_for(
    untrained: Path, tmp_path: Path, tiny: Config, workers: Workers
) -> None:
    given = ("--strategy", "idea", "--to", "24 num_query_groups=1 num_layers=3", "--samples", "3")
    result = compact(untrained, "--out", tmp_path / "small", *given)
    assert result.exit_code == 0, result.output
    shape = state_of(tmp_path / "small").shape
    assert shape.num_layers == 3 and shape.counts("ffn_hidden_size") == (24, 24, 24)
    assert shape.counts("num_query_groups") == (1, 1, 1)
    from megatron_idea.config import to_yaml

    config = replace(
        tiny,
        run_dir=str(tmp_path / "small"),
        model={"num_layers": 4, "init_method_std": 0.2},
        prune={"strategy": "none"},
    )
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    went_on = runner.invoke(cli.app, ["train", str(tmp_path / "run.yaml")])
    assert went_on.exit_code == 0, went_on.output
    assert state_of(tmp_path / "small").step == 24


def test_the_largest_neurons_stay_whatever_the_checkpoint_s_own_scores_say(
    trained: Path, tmp_path: Path, tiny: Config, workers: Workers
) -> None:
    given = ("--strategy", "magnitude", "--to", "28,20", "--samples", "2")
    result = compact(trained, "--out", tmp_path / "small", *given)
    assert result.exit_code == 0, result.output
    path = checkpoint.resolve(tmp_path / "small")
    (content,) = workers.run(content_job, 1, tiny, str(path))
    (before,) = workers.run(content_job, 1, tiny, str(checkpoint.resolve(trained)))
    for layer, width in enumerate((28, 20)):
        fc1, fc2 = (before[f"decoder.layers.{layer}.mlp.linear_fc{i}.weight"][0] for i in (1, 2))
        gate, up = np.abs(fc1).reshape(2, 64, -1).mean(-1)
        norms = np.stack([gate, up, np.abs(fc2).mean(0)]).max(0) * before[f"{layer}.mask"]
        expected = sorted(np.argsort(-norms, kind="stable")[:width].tolist())
        assert content[f"{layer}.ids"].tolist() == expected
        down = before[f"decoder.layers.{layer}.mlp.linear_fc2.weight"][:, :, expected]
        assert content[f"{layer}.sorted"][1].tobytes() == down.tobytes(), "no step was taken"
    assert content["scores"].tobytes() == before["scores"].tobytes(), "the run's own, as they were"
    assert content["step"] == before["step"] == 12


def test_what_a_method_cannot_choose_is_refused(untrained: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"

    def refused(*arguments: Any, says: str) -> None:
        result = compact(untrained, "--out", out, *arguments)
        assert result.exit_code == 2 and says in " ".join(result.stderr.split()), result.output
        assert not checkpoint.complete(out)

    adapt = ("--strategy", "adapt_pruner")
    refused("--to", "parameters=30000", says="give --strategy")
    refused(*adapt, says="say with --to how much is to stay")
    refused("--samples", "4", "--to", "24", says="--samples is for --strategy")
    refused("--data", "x", says="--data is for --strategy")
    refused(*adapt, "--to", "24 parameters=30000", says="give the one or the others")
    refused(*adapt, "--to", "parameters=1,2", says="is one number; it has 2")
    refused(*adapt, "--to", "parameters=30", says="prune.target.parameters (30) must be at least")
    refused(*adapt, "--to", "24", "--samples", "0", says="--samples is 0")
    refused(*adapt, "--to", "num_layers=3", says="an axis of prune.strategy=adapt_pruner")
    refused("--strategy", "idea", "--to", "parameters=30000", says="needs the shape")
    refused("--strategy", "none", "--to", "24", says="chooses nothing")
    refused("--strategy", "alps", "--to", "24", says="legal values: idea")


def test_every_method_prunes_a_model_from_passes_over_data(untrained: Path, tmp_path: Path) -> None:
    model = checkpoint.read_config(checkpoint.resolve(untrained)).model
    full = state_of(untrained).shape
    goal = full.parameters(model).total * 8 // 10
    counts = {"ffn_hidden_size": 24, "num_query_groups": 1, "num_layers": 3}
    for name, method in METHODS.items():
        if name == "pca_stem":  # channels alone, and the smallest legal step of them is all here
            continue
        axes = {axis: count for axis, count in counts.items() if axis in method.axes}
        sizes = [" ".join(f"{axis}={count}" for axis, count in axes.items())]
        sizes += [f"parameters={goal}"] if method.finds_shape else []
        for number, to in enumerate(sizes):
            out = tmp_path / f"{name}_{number}"
            result = compact(
                untrained, "--out", out, "--strategy", name, "--to", to, "--samples", "2"
            )
            assert result.exit_code == 0, (name, to, result.output)
            found = state_of(out).shape
            if "parameters" in to:
                assert found.parameters(model).total <= goal
                continue
            for axis, count in axes.items():
                assert set(found.counts(axis)) == {count}, name
