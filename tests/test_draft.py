"""Two model folders of one run: the small one drafts for the large one that taught it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from jobs import RandomBatches, random_tokens, run_job, train_on
from typer.testing import CliRunner

from megatron_idea import checkpoint, cli
from megatron_idea.config import Config, replace
from megatron_idea.records.read import read_metrics
from megatron_idea.testing import Workers, assert_close, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

transformers = pytest.importorskip("transformers", reason="needs megatron-idea[export]")
runner = CliRunner()
ONE = {
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
}  # fmt: skip
PAIR = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


@pytest.fixture()
def real(tiny: Config) -> Config:
    """24 steps with its own teacher; weights large enough that two models differ."""
    return replace(
        tiny,
        model={"init_method_std": 0.1},
        distill={"teacher": "self", "average_spacing": 0.05, "acceptance": True},
        checkpoint={"every_tokens": 4 * 128, "keep_last": 0},
    )


def judged(groups: ProcessGroups, config: Config, path: Path) -> dict[str, Any]:
    """What the engine makes of a checkpoint and its teacher: acceptance, logits of both."""
    from megatron_idea.data.tokenizer import load_tokenizer
    from megatron_idea.distill.source import open_teacher
    from megatron_idea.engine.passes import forward_backward
    from megatron_idea.engine.trainable import assemble
    from megatron_idea.prune.pruner import Pruner

    state = checkpoint.read_state(path, config)
    trainable = assemble(config.sections, groups, state.shape, initialize=False)
    checkpoint.load(trainable, Pruner(config, trainable), path)
    tokenizer = load_tokenizer(config.data.tokenizer)
    teacher, _ = open_teacher(config, groups, tokenizer, state.teacher)
    data = RandomBatches(config, groups)
    with teacher.teaching(trainable.chunks, data, 0, 0.5) as lessons:
        forward_backward(trainable, data, 0)
    tokens = random_tokens(config, 0)[:, :-1]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits = [chunk(tokens, positions, None) for (chunk,) in (trainable.chunks, teacher.chunks)]
    acceptance = sum(float(x) for x in lessons.acceptance) / len(lessons.acceptance)
    return {"acceptance": acceptance, "logits": logits}


def of_folder(path: Path, config: Config) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(random_tokens(config, 0)[:, :-1]).logits


def export(*arguments: Any) -> Any:
    return runner.invoke(cli.app, ["export", *map(str, arguments)])


def is_a_pair(workers: Workers, config: Config, small: Path, large: Path, path: Path) -> None:
    """Both folders are the engine's models, and agree as often as the engine says."""
    alone = replace(config, parallel=ONE, distill={"acceptance": True})
    (found,) = run_job(workers, judged, 1, alone, path)
    logits = [of_folder(folder, config) for folder in (small, large)]
    for ours, theirs, name in zip(found["logits"], logits, ("student", "teacher"), strict=True):
        assert_close(theirs, ours, name, 1e-5)
    q, p = (each.softmax(-1) for each in logits)
    accepted = float(torch.minimum(p, q).sum(-1).mean())
    assert accepted == pytest.approx(found["acceptance"], abs=1e-5) and 0.1 < accepted < 0.999
    assert (small / "tokenizer.json").read_bytes() == (large / "tokenizer.json").read_bytes()
    sizes = {json.loads((x / "config.json").read_text())["vocab_size"] for x in (small, large)}
    assert sizes == {config.model.vocab_size}


def command_in(card: str) -> list[str]:
    (line,) = re.findall(r"^vllm serve .*$", card, re.MULTILINE)
    return shlex.split(line)


@pytest.mark.parametrize("size", [4])
def test_a_run_and_the_enlarged_model_it_was(
    workers: Workers, real: Config, tmp_path: Path, size: int
) -> None:
    config = replace(real, parallel=PAIR if size == 4 else ONE)
    workers.run(train_on, size, config)
    run = tmp_path / "moved"
    shutil.move(config.run_dir, run)
    small, large = tmp_path / "small", tmp_path / "large"
    result = export(run, small, "--draft-of", large)
    assert result.exit_code == 0, result.output
    assert "neurons 24, of 64" in result.stdout and str(large) in result.stdout
    moved = replace(config, run_dir=str(run))
    is_a_pair(workers, moved, small, large, checkpoint.resolve(run))
    last = read_metrics(run)[-1]
    for folder in (small, large):
        card = (folder / "README.md").read_text()
        *serve, how = command_in(card)
        assert serve == ["vllm", "serve", str(large), "--speculative-config"]
        assert json.loads(how) == {
            "method": "draft_model", "model": str(small), "num_speculative_tokens": 4,
        }  # fmt: skip
        assert f"after {last.tokens:,} tokens" in card and f"{last.acceptance:.4f}" in card
    assert "The enlarged model of a run" in card and "768 of 3,072 (enlarged phase), step 6" in card


def test_another_run_that_taught_it_and_an_earlier_checkpoint(
    workers: Workers, real: Config, tmp_path: Path
) -> None:
    model = {"qk_layernorm": False, "share_embeddings_and_output_weights": False}
    teacher = replace(real, model=model, distill={"teacher": "none"})
    workers.run(train_on, 1, teacher)
    config = replace(
        teacher,
        run_dir=str(tmp_path / "small_run"),
        model={"ffn_hidden_size": 24},
        prune={"strategy": "none"},
        distill={"teacher": teacher.run_dir, "acceptance": False},
    )
    workers.run(train_on, 1, config)
    early = checkpoint.complete(config.run_dir)[1]
    small, large = tmp_path / "small", tmp_path / "large"
    result = export(early, small, "--draft-of", large)
    assert result.exit_code == 0, result.output
    is_a_pair(workers, config, small, large, early)
    assert "min(p, q)" not in (small / "README.md").read_text()
    # The folder as the teacher of a third one is not written again, but named.
    third = replace(
        config, run_dir=str(tmp_path / "third"), distill={"teacher": str(large), "acceptance": True}
    )
    workers.run(train_on, 1, third)
    before = {file.name: file.read_bytes() for file in large.iterdir()}
    other = export(third.run_dir, tmp_path / "other", "--draft-of", tmp_path / "another")
    assert other.exit_code == 2 and f"give --draft-of {large}" in other.stderr.replace("\n", " ")
    again = export(third.run_dir, tmp_path / "other", "--draft-of", large)
    assert again.exit_code == 0, again.output
    assert before == {file.name: file.read_bytes() for file in large.iterdir()}
    is_a_pair(workers, third, tmp_path / "other", large, checkpoint.resolve(Path(third.run_dir)))
    assert command_in((tmp_path / "other/README.md").read_text())[2] == str(large)


def test_what_is_no_pair_is_said_and_leaves_nothing(
    workers: Workers, real: Config, tmp_path: Path
) -> None:
    workers.run(train_on, 1, real)
    run, small, large = Path(real.run_dir), tmp_path / "small", tmp_path / "large"

    def refused(message: str, *arguments: Any) -> None:
        result = export(*arguments)
        assert result.exit_code == 2 and message in result.stderr.replace("\n", " "), result.stderr
        assert not small.exists() and not large.exists()

    early = checkpoint.complete(run)[0]
    refused("has learnt from no teacher", early, small, "--draft-of", large)
    refused("are one folder", run, small, "--draft-of", small)
    refused("exists already", run, small, "--draft-of", run)
    refused("exists already", run, run, "--draft-of", large)
    own = run / "teacher" / "self"
    weights = max(own.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    refused("is damaged", run, small, "--draft-of", large)
    (own / "manifest.json").write_text("{}")
    refused("is not the one that this run has learnt from", run, small, "--draft-of", large)
    shutil.rmtree(own)
    refused("cannot be read", run, small, "--draft-of", large)
    assert export(run, small).exit_code == 0


def test_a_bf16_pair_is_written_in_either_precision(
    workers: Workers, real: Config, tmp_path: Path
) -> None:
    from hf import read

    workers.run(train_on, 1, replace(real, training={"precision": "bf16"}))
    for dtype in ("bf16", "fp32"):
        result = export(
            real.run_dir, tmp_path / dtype, "--draft-of", tmp_path / f"{dtype}_large",
            "--dtype", dtype,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    half, full = read(tmp_path / "bf16_large"), read(tmp_path / "fp32_large")
    for name, tensor in full.items():
        assert tensor.dtype is torch.float32
        assert_equal(tensor, half[name].float(), name)
