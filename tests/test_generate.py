"""Generation: a checkpoint and its export write the same text; the settings mean what they say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hf import SOON, trained
from jobs import live_run, mask_of, run_job, small
from typer.testing import CliRunner

from megatron_idea import checkpoint
from megatron_idea import config as configuration
from megatron_idea.config import Config, ConfigError
from megatron_idea.data.tokenizer import load_tokenizer
from megatron_idea.evaluation.generate import (
    LIVE_TEMPERATURE,
    Sample,
    Writer,
    _continue,
    _live_logits,
    draw,
    sample,
    sample_live,
)
from megatron_idea.huggingface.export import export_checkpoint
from megatron_idea.testing import Workers

pytest.importorskip("transformers", reason="needs megatron-idea[export]")


def sample_job(
    rendezvous: str, path: str, prompts: list[str], settings: dict[str, Any]
) -> list[Sample]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    return sample(Path(path), prompts, **settings)


def command_job(rendezvous: str, arguments: list[str]) -> tuple[int, str]:
    from megatron_idea import cli

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    result = CliRunner().invoke(cli.app, arguments)
    return result.exit_code, result.stdout


@pytest.fixture(scope="module")
def run(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two ranks in the middle of its prune phase; its window is 8 tokens."""
    folder = tmp_path_factory.mktemp("generated")
    trained(workers, folder / "run", 2, 6, parallel={"tensor_model_parallel_size": 2})
    export_checkpoint(folder / "run", folder / "export")
    return folder / "run"


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"temperature": 1.5, "top_k": 50, "seed": 3}, {"seed": 4}],
    ids=["greedy", "top_k", "plain"],
)
def test_a_checkpoint_and_its_export_write_the_same(
    settings: dict[str, Any], run: Path, workers: Workers
) -> None:
    """Past the window, too, where the export's cache is of no use."""
    prompts = ["def", "", "a longer prompt than the window"]
    settings = settings | {"max_new_tokens": 16}
    (ours,) = workers.run(sample_job, 1, str(run), prompts, settings)
    theirs = sample(run.with_name("export"), prompts, **settings)
    assert [one.ids for one in ours] == [one.ids for one in theirs]
    assert [one.text for one in ours] == [one.text for one in theirs]
    assert all(1 <= len(one.ids) <= 16 for one in ours)
    (alone,) = workers.run(sample_job, 1, str(run), prompts[2:], settings)
    assert alone == ours[2:], "a prompt's text depends on the others"


def live_job(
    groups: Any, config: Config, steps: int, writes: bool
) -> tuple[list[float], list[Sample]]:
    """Train some steps on random tokens; the losses, and what the model wrote at the end."""
    from megatron_idea.train import step

    run, state = live_run(groups, config)
    tokenizer = load_tokenizer("byte")
    losses, samples = [], []
    for done in range(1, steps + 1):
        losses.append(step(run, state)[0].loss)
        if writes and done % 4 == 0:
            samples = sample_live(run.trainable.chunks, config, groups, tokenizer)
    checkpoint.save(config, run.trainable, run.pruner, state)
    return losses, samples


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ],
    ids=["tp2", "pp2 vp2"],
)
def test_a_model_in_training_writes_what_its_checkpoint_does(
    parallel: dict[str, Any], workers: Workers, tmp_path: Path
) -> None:
    """In the middle of pruning, over several ranks, past the window; training does not notice."""
    prompts = ["def", "", "a longer prompt than the window"]
    config = small(
        run_dir=str(tmp_path / "run"),
        model={"num_layers": 4, "vocab_size": 264, "init_method_std": 0.3},
        prune={"target": {"ffn_hidden_size": 12}},
        schedule=SOON,
        parallel=parallel,
        evaluation={"sample_prompts": prompts, "sample_tokens": 12},
    )
    told = run_job(workers, live_job, 2, config, 8, True)
    elsewhere = configuration.replace(config, run_dir=str(tmp_path / "quiet"))
    quiet = run_job(workers, live_job, 2, elsewhere, 8, False)
    assert told[0][0] == quiet[0][0], "writing has changed the training"
    assert told[0][1] == told[1][1], "ranks have written different texts"
    settings = {"max_new_tokens": 12, "temperature": LIVE_TEMPERATURE}
    (written,) = workers.run(sample_job, 1, str(tmp_path / "run"), prompts, settings)
    assert told[0][1] == written


def masked_and_plain_job(groups: Any, config: Config, steps: int) -> dict[str, Any]:
    """Train, save, and read the weights alone into a model that knows of no masks."""
    from megatron_idea.engine.trainable import assemble
    from megatron_idea.prune.plan import live_by_axis
    from megatron_idea.train import step

    run, state = live_run(groups, config)
    for _ in range(steps):
        step(run, state)
    path = checkpoint.save(config, run.trainable, run.pruner, state)
    fresh = assemble(config.sections, groups, state.shape, initialize=False)
    checkpoint.load_weights(fresh.chunks, path, groups)
    with torch.no_grad():
        logits = [
            _live_logits(of.chunks, config, groups)(list(range(8))).numpy()
            for of in (run.trainable, fresh)
        ]
    return {
        "live": live_by_axis(run.pruner.alive)["ffn_hidden_size"],
        "widths": list(state.shape.counts("ffn_hidden_size")),
        "masks": [
            sum(int((~mask_of(mlp)).sum()) for _, mlp in of.mlps) for of in (run.trainable, fresh)
        ],
        "logits": logits,
    }


def test_between_two_compactions_zeros_are_enough(workers: Workers, tmp_path: Path) -> None:
    """Whoever reads a checkpoint's weights alone has the model that the run trains under masks."""
    config = small(
        run_dir=str(tmp_path / "run"),
        model={"vocab_size": 264, "init_method_std": 0.3},
        schedule=SOON,
        parallel={"tensor_model_parallel_size": 2},
    )
    found = run_job(workers, masked_and_plain_job, 2, config, 6)
    for rank in found:
        assert all(12 < n < w < 24 for n, w in zip(rank["live"], rank["widths"], strict=True))
        masked, plain = rank["logits"]
        assert masked.tobytes() == plain.tobytes()
        assert rank["masks"][1] == 0
    assert sum(rank["masks"][0] for rank in found) == sum(found[0]["widths"]) - sum(
        found[0]["live"]
    )
    export_checkpoint(tmp_path / "run", tmp_path / "export")
    prompts, settings = ["def", ""], {"max_new_tokens": 8, "temperature": 0}
    (ours,) = workers.run(sample_job, 1, str(tmp_path / "run"), prompts, settings)
    theirs = sample(tmp_path / "export", prompts, **settings)
    assert [one.ids for one in ours] == [one.ids for one in theirs]


def test_draws_follow_the_settings() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0, -9.0])
    generator = torch.Generator().manual_seed(0)
    assert draw(logits, 0, 0, generator) == 1
    assert draw(logits, 5.0, 1, generator) == 1
    drawn = torch.tensor([draw(logits, 0.5, 3, generator) for _ in range(4000)])
    counts = drawn.bincount(minlength=5) / 4000
    wanted = torch.softmax(logits[[1, 3, 2]] / 0.5, 0)
    assert counts[[0, 4]].tolist() == [0, 0]
    assert torch.allclose(counts[[1, 3, 2]], wanted.float(), atol=0.02)


def test_a_text_ends_with_its_document() -> None:
    """Rows of the vocabulary beyond the tokenizer's are never drawn."""
    tokenizer = load_tokenizer("byte")
    told = [*b"ok", tokenizer.eod]

    def logits(ids: list[int]) -> torch.Tensor:
        row = torch.zeros(264)
        row[told[len(ids) - 1]] = 9.0
        row[260] = 99.0
        return row

    written = _continue(Writer(logits, tokenizer, 8), "", 9, 0.0, 0, 0)
    assert (written.text, written.ids) == ("ok", told)


def test_the_command_prints_prompt_and_text(run: Path, workers: Workers) -> None:
    arguments = ["generate", str(run), "--prompt", "def", "--max-new-tokens", "4",
                 "--temperature", "0"]  # fmt: skip
    ((code, out),) = workers.run(command_job, 1, arguments)
    (expected,) = workers.run(
        sample_job, 1, str(run), ["def"], {"max_new_tokens": 4, "temperature": 0}
    )
    assert code == 0
    assert out == f"def{expected[0].text}\n"
    (remembered,) = map(json.loads, (run / "samples.jsonl").read_text().splitlines())
    assert remembered["step"] == checkpoint.read_state(checkpoint.resolve(run)).step
    assert remembered["prompt"] + remembered["text"] == out.removesuffix("\n")


def test_what_cannot_be_sampled_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run"):
        sample(tmp_path, ["x"])
    with pytest.raises(ConfigError, match="--temperature is -1; it must not be negative"):
        sample(run, ["x"], temperature=-1)
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(ConfigError, match=r"has no model\.safetensors"):
        sample(tmp_path, ["x"])
