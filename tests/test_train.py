"""A whole run: what it leaves behind, how it is interrupted, what a bad gradient does to it."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_idea import checkpoint
from megatron_idea.config import Config, replace
from megatron_idea.course import removed_at
from megatron_idea.records.log import RecordError
from megatron_idea.records.read import read_events, read_metrics, read_samples
from megatron_idea.schedule import learning_rate, phase
from megatron_idea.testing import Workers

TP2 = {"tensor_model_parallel_size": 2}
FIELDS = {
    "step", "tokens", "phase", "loss", "lr", "removed", "live", "stored", "grad_norm",
    "tokens_per_s", "step_s", "memory_bytes", "skipped", "flops",
}  # fmt: skip
MEASURED = {"tokens_per_s", "step_s", "memory_bytes"}


def train_once(rendezvous: str, config: Config, signal_at: int = 0) -> tuple[int, int]:
    """``train``; with ``signal_at``, this process is told to end in the middle of that step.

    Returns: the step it came to, and its consumed tokens.
    """
    from megatron_idea import train as module

    step = module.step

    def interrupted(run: Any, state: Any) -> Any:
        if state.step + 1 == signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, state)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    module.step = interrupted
    try:
        state = module.train(config, rendezvous)
    finally:
        module.step = step
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(number, handler)
    return state.step, state.consumed_tokens


def computed(config: Config) -> list[dict[str, Any]]:
    """The records without what the clock and the machine put in."""
    records = read_metrics(Path(config.run_dir))
    return [{k: v for k, v in r.as_dict().items() if k not in MEASURED} for r in records]


def kinds(config: Config) -> list[str]:
    return [event["kind"] for event in read_events(Path(config.run_dir))]


@pytest.fixture(scope="module")
def finished() -> dict[str, Config]:
    return {}


@pytest.fixture
def run(
    finished: dict[str, Config],
    tiny: Config,
    workers: Workers,
    tmp_path_factory: pytest.TempPathFactory,
) -> Config:
    """A run over two tensor-parallel ranks that has come to its end; made once."""
    if not finished:
        folder = tmp_path_factory.mktemp("whole")
        config = replace(
            tiny,
            run_dir=str(folder / "run"),
            data={"cache_dir": str(folder)},
            parallel=TP2,
            evaluation={"sample_prompts": ["def ", ""], "sample_tokens": 4},
        )
        assert workers.run(train_once, 2, config) == [(24, 24 * 128)] * 2
        finished["run"] = config
    return finished["run"]


def test_a_run_records_every_step_with_all_fields(run: Config) -> None:
    records = read_metrics(Path(run.run_dir))
    assert [r.step for r in records] == list(range(1, 25))
    for record in records:
        assert set(record.as_dict()) == FIELDS
        tokens = record.tokens
        assert tokens == record.step * 128
        assert record.lr == learning_rate(run.schedule, tokens)
        assert record.removed == removed_at(run, tokens)
        assert record.phase == phase(run.schedule, tokens)
        assert len(record.live["ffn_hidden_size"]) == len(record.stored["ffn_hidden_size"]) == 2
        assert record.skipped == 0 and record.memory_bytes > 0
        assert np.isfinite([record.loss, record.grad_norm]).all()
        assert record.tokens_per_s == pytest.approx(128 / record.step_s)
    assert records[-1].loss < records[0].loss - 0.5


def test_widths_go_from_the_enlarged_to_exactly_the_target(run: Config) -> None:
    records = read_metrics(Path(run.run_dir))
    for before, after in itertools.pairwise(records):
        for late, early in ((after.live, before.live), (after.stored, before.stored)):
            pairs = zip(late["ffn_hidden_size"], early["ffn_hidden_size"], strict=True)
            assert all(a <= b for a, b in pairs)
    for record in records:
        assert all(w % 8 == 0 for w in record.stored["ffn_hidden_size"])  # TP 2 x alignment 4
        pairs = zip(record.live["ffn_hidden_size"], record.stored["ffn_hidden_size"], strict=True)
        assert all(live <= width for live, width in pairs)
    assert records[5].live["ffn_hidden_size"] == [64, 64]
    for record in records[15:]:  # the prune phase ends with step 16
        assert record.live["ffn_hidden_size"] == record.stored["ffn_hidden_size"] == [24, 24]


def test_a_run_tells_what_happened(run: Config) -> None:
    events = read_events(Path(run.run_dir))
    assert (events[0]["kind"], events[-1]["kind"]) == ("started", "finished")
    assert events[-1]["tokens"] == 24 * 128
    evaluated = [e for e in events if e["kind"] == "evaluated"]
    assert [(e["step"], e["why"]) for e in evaluated] == [
        (0, "start"), (6, "phase_end"), (16, "phase_end"), (24, "phase_end"),
    ]  # fmt: skip
    assert all(e["val_loss"] > 0 and e["tokens"] == e["step"] * 128 for e in evaluated)
    assert [e["step"] for e in events if e["kind"] == "saved"] == [6, 16, 24]
    compacted = [e for e in events if e["kind"] == "compacted"]
    assert len(compacted) >= 2
    assert compacted[0]["before"] == {"ffn_hidden_size": [64, 64]}
    assert compacted[-1]["after"] == {"ffn_hidden_size": [24, 24]}
    for before, after in itertools.pairwise(compacted):
        assert before["after"] == after["before"]
    for event in compacted:
        assert event["seconds"] > 0 and event["peak_bytes"] > 0 and len(event["digest"]) == 64
    assert (Path(run.run_dir) / "config.yaml").is_file()


def test_the_model_writes_at_each_evaluation(run: Config) -> None:
    samples = read_samples(Path(run.run_dir))
    events = read_events(Path(run.run_dir))
    evaluated = [(e["step"], e["tokens"]) for e in events if e["kind"] == "evaluated"]
    assert [(s["step"], s["tokens"], s["prompt"]) for s in samples] == [
        (*place, prompt) for place in evaluated for prompt in ("def ", "")
    ]
    assert len({s["text"] for s in samples}) > 4, "training does not change what it writes"


def test_a_finished_run_is_left_as_it_is(run: Config, workers: Workers) -> None:
    metrics = (Path(run.run_dir) / "metrics.jsonl").read_bytes()
    files = sorted((Path(run.run_dir) / "checkpoints").rglob("*"))
    times = [path.stat().st_mtime_ns for path in files]
    assert workers.run(train_once, 2, run) == [(24, 24 * 128)] * 2
    assert (Path(run.run_dir) / "metrics.jsonl").read_bytes() == metrics
    assert sorted((Path(run.run_dir) / "checkpoints").rglob("*")) == files
    assert [path.stat().st_mtime_ns for path in files] == times
    assert kinds(run)[-3:] == ["finished", "resumed", "finished"]


def count_threads(rendezvous: str, config: Config) -> tuple[int, int]:
    """Before and after a run in this process."""
    before = psutil.Process().num_threads()
    train_once(rendezvous, config)
    return before, psutil.Process().num_threads()


def test_a_run_leaves_no_threads_behind(run: Config, workers: Workers) -> None:
    for before, after in workers.run(count_threads, 2, run):
        assert after - before < 10, "each process group has several; a run has about twenty groups"


def test_an_interrupted_run_saves_and_goes_on_as_if_nothing_had_been(
    run: Config, workers: Workers, tmp_path: Path
) -> None:
    config = replace(run, run_dir=str(tmp_path / "run"))
    # Between two compactions, and outside of the places where a run saves by itself.
    assert workers.run(train_once, 2, config, 12) == [(12, 12 * 128)] * 2
    assert kinds(config)[-2:] == ["saved", "signal"]
    event = read_events(tmp_path / "run")[-1]
    assert (event["step"], event["name"]) == (12, "SIGTERM")
    assert workers.run(train_once, 2, config) == [(24, 24 * 128)] * 2
    assert computed(config) == computed(run)
    assert read_samples(tmp_path / "run") == read_samples(Path(run.run_dir))
    assert kinds(config)[-1] == "finished"


def spoil_one_step(rendezvous: str, config: Config, spoiled: int) -> list[dict[str, Any]]:
    """Train with a gradient of one rank that is not a number in step ``spoiled``.

    Returns: what was held before and after it: weights, moments, Adam's step, scores.
    """
    from megatron_idea import train as module
    from megatron_idea.engine.distributed import start_distributed, stop_distributed
    from megatron_idea.engine.shards import MOMENTS, shard_of

    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    forward_backward = module.forward_backward

    def with_nan(trainable: Any, data: Any, samples: int) -> Any:
        losses = forward_backward(trainable, data, samples)
        if state.step + 1 == spoiled and groups.world.rank() == groups.world.size() - 1:
            for parameter in trainable.parameters:
                parameter.main_grad.fill_(float("nan"))
        return losses

    def held(run: Any) -> dict[str, Any]:
        result = {}
        for index, parameter in enumerate(run.trainable.parameters):
            result[f"weight{index}"] = parameter.detach().float().clone().numpy()
            part = shard_of(run.trainable.optimizer, parameter)
            if part is not None:
                result[f"main{index}"] = part.main.detach().clone().numpy()
                for name in MOMENTS:
                    result[f"{name}{index}"] = part.state[name].clone().numpy()
                result[f"adam{index}"] = part.state["step"].clone().numpy()
        scores = run.pruner.scores
        for kind, tables in (("average", scores.average), ("pending", scores.pending)):
            for measure, sums in tables.items():
                result |= {f"{kind} {measure} {at}": v.numpy().copy() for at, v in sums.items()}
        result["pending_steps"] = np.array(scores.pending_steps)
        return result | {axis: alive.numpy().copy() for axis, alive in run.pruner.alive.items()}

    module.forward_backward = with_nan
    try:
        run, state = module.build(config, groups)
        seen = []
        while state.step < spoiled + 2:
            record, _ = module.step(run, state)
            if state.step >= spoiled - 1:
                seen.append(held(run) | {"record": record})
        run.log.close()
        return seen
    finally:
        module.forward_backward = forward_backward
        stop_distributed()


@pytest.mark.parametrize(
    ("world_size", "sections"),
    [
        (1, {}),
        (2, {"parallel": TP2, "training": {"precision": "bf16"}}),
        (2, {"prune": {"mask_interval_steps": 3}}),
    ],
    ids=["tp1", "tp2_bf16", "dp2"],
)
def test_a_step_whose_gradient_is_not_finite_changes_nothing(
    tiny_halved: Config, workers: Workers, world_size: int, sections: dict[str, Any]
) -> None:
    config = replace(tiny_halved, **sections)
    for before, after, later, last in workers.run(spoil_one_step, world_size, config, 8):
        record = after.pop("record")
        assert record.skipped == 1 and not np.isfinite(record.grad_norm)
        assert (record.step, record.tokens) == (8, 8 * 128)
        assert np.isfinite(record.loss)
        assert before["pending_steps"] == (1 if "prune" in sections else 0)
        for name, value in after.items():
            np.testing.assert_array_equal(value, before[name], err_msg=name)
        assert later["record"].skipped == last["record"].skipped == 1
        assert np.isfinite(last["record"].grad_norm)
        for name in after:
            if name.startswith("adam"):
                assert last[name] == before[name] + 2


VARIANTS: dict[str, dict[str, Any]] = {
    "restarted": {"schedule": {"kind": "restarted"}},
    "one_shot": {"schedule": {"removal": "one_shot"}},
    "l2": {"prune": {"row_reduce": "l2"}},
    "max": {"prune": {"row_reduce": "max"}},
    "sum": {"prune": {"row_reduce": "sum", "matrix_reduce": "sum"}},
    "matrix_mean": {"prune": {"matrix_reduce": "mean"}},
    "ema_on_new": {"prune": {"ema_on": "new", "ema": 0.3}},
    "interval": {"prune": {"mask_interval_steps": 3}},
    "squared": {"prune": {"element": "squared"}},
    "signed": {"prune": {"element": "signed"}},
    "fisher": {"prune": {"element": "fisher"}},
    "global": {"prune": {"scope": "global"}},
    "ordered": {"prune": {"placement": "ordered"}},
    "zeros_only": {"prune": {"compact": False}},
    "none": {"prune": {"strategy": "none"}},
    "mup": {"optimizer": {"lr_scaling": "mup_simple"}},
}


def train_all(rendezvous: str, configs: list[Config]) -> None:
    for number, config in enumerate(configs):
        train_once(f"{rendezvous}.{number}", config)


def test_every_variant_trains_to_its_exact_width(
    tiny: Config, workers: Workers, tmp_path: Path
) -> None:
    short = replace(
        tiny,
        schedule={
            "total_tokens": 12 * 128, "enlarged_fraction": 1 / 6, "prune_fraction": 0.5,
            "prune_warmup_fraction": 1 / 6, "lr_warmup_fraction": 1 / 12,
        },
        prune={"compaction_block": 32},
    )  # fmt: skip
    configs = {
        name: replace(replace(short, run_dir=str(tmp_path / name)), **sections)
        for name, sections in VARIANTS.items()
    }
    workers.run(train_all, 1, list(configs.values()))
    for name, config in configs.items():
        records = read_metrics(Path(config.run_dir))
        live, width = records[-1].live["ffn_hidden_size"], records[-1].stored["ffn_hidden_size"]
        assert len(records) == 12, name
        assert all(r.lr == learning_rate(config.schedule, r.tokens) for r in records), name
        assert np.isfinite([r.loss for r in records]).all(), name
        assert records[-1].loss < records[0].loss, name
        target = 64 if name == "none" else 24
        if name == "global":
            assert sum(live) == 2 * target, name
            assert all(0 <= w - n < 4 for w, n in zip(width, live, strict=True)), name
        else:
            assert live == [target] * 2, name
            assert width == ([64] * 2 if name == "zeros_only" else live), name
    removed = [
        r.live["ffn_hidden_size"][0] for r in read_metrics(Path(configs["one_shot"].run_dir))
    ]
    assert set(removed) == {64, 24}
    interval = [
        r.live["ffn_hidden_size"][0] for r in read_metrics(Path(configs["interval"].run_dir))
    ]
    changed = [n for n, (a, b) in enumerate(itertools.pairwise(interval), start=2) if a != b]
    assert all(step % 3 == 0 or step == 8 for step in changed)  # step 8 ends the prune phase


def broken_job(rendezvous: str, config: Config) -> None:
    """A run whose second compaction ends the process after the first tensor was dropped."""
    from megatron_idea import train as module
    from megatron_idea.engine import trainable

    rebuild, calls = trainable.assemble, itertools.count(1)

    def assemble(*arguments: Any, **settings: Any) -> Any:
        if not settings["gradients"] and next(calls) == 2:
            raise MemoryError("while rebuilding")
        return rebuild(*arguments, **settings)

    trainable.assemble = assemble
    try:
        module.train(config, rendezvous)
    finally:
        trainable.assemble = rebuild


@pytest.mark.parametrize("parallel", [{}, TP2], ids=["one", "tp2"])
def test_a_run_that_died_in_a_compaction_goes_on_from_right_before_it(
    parallel: dict[str, Any], tiny: Config, workers: Workers, tmp_path: Path
) -> None:
    world_size = 2 if parallel else 1
    config = replace(tiny, parallel=parallel, checkpoint={"before_compaction": True})
    undisturbed = replace(config, run_dir=str(tmp_path / "undisturbed"))
    workers.run(train_once, world_size, undisturbed)
    with pytest.raises(RuntimeError, match="while rebuilding"):
        workers.run(broken_job, world_size, config)
    died_at = read_metrics(Path(config.run_dir))[-1].step
    saved = checkpoint.latest(config.run_dir)
    assert saved is not None and checkpoint.read_state(saved).plan_due
    assert checkpoint.read_state(saved).step == died_at > 6
    workers.run(train_once, world_size, config)
    assert computed(config) == computed(undisturbed)
    plans = [
        [(e["step"], e["digest"]) for e in read_events(Path(c.run_dir)) if e["kind"] == "compacted"]
        for c in (config, undisturbed)
    ]
    assert plans[0] == plans[1] and len(plans[0]) > 2


def full_job(rendezvous: str, config: Config) -> str:
    from megatron_idea.train import train

    try:
        train(config, rendezvous)
    except RecordError as error:
        return str(error)
    return "trained"


def test_a_full_disk_ends_a_run_on_every_rank_with_what_was_saved_last(
    tiny_halved: Config, workers: Workers
) -> None:
    run_dir = Path(tiny_halved.run_dir)
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    said = workers.run(full_job, 2, tiny_halved)
    expected = f"cannot write the records of run folder {run_dir}: No space left on device"
    assert said[0] == f"{expected}; nothing was saved yet"
    assert said[1] == f"rank 0: {said[0]}"
