"""The held-out loss of a checkpoint is the one that its run has measured, and its export's."""

from __future__ import annotations

import json
import math
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_idea.config import Config, replace
from megatron_idea.data.documents import DataError
from megatron_idea.data.rolling import RollingBatches, rows_of
from megatron_idea.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_idea.evaluation.held_out import evaluate_model
from megatron_idea.huggingface.export import export_checkpoint
from megatron_idea.records.read import read_events
from megatron_idea.testing import Workers

runner = CliRunner()
ONE_STEP = {
    "total_tokens": 8 * 128, "enlarged_fraction": 0.25, "prune_fraction": 0.5,
    "recover_fraction": 0.25, "prune_warmup_fraction": 0.25,
}  # fmt: skip


# Longer than a row, of several bytes a character, empty, of one token, with a byte order mark.
TEXTS = [
    "import os\n" * 9, "Grüße, 世界", "", "x", "def main(x):\n    return x + 1\n",
    "\ufeffa\r\n",
]  # fmt: skip


def train_and_evaluate(rendezvous: str, config: Config, overrides: list[str]) -> dict[str, Any]:
    """Train over all ranks; then measure the final checkpoint over the same ranks."""
    from megatron_idea.evaluation import held_out
    from megatron_idea.train import train

    train(config, rendezvous)
    start = held_out.joined
    held_out.joined = lambda parallel, seed: start(parallel, seed, f"{rendezvous}.e")
    try:
        return held_out.evaluate_checkpoint(Path(config.run_dir), overrides)
    finally:
        held_out.joined = start


def train_job(rendezvous: str, config: Config) -> None:
    from megatron_idea.train import train

    train(config, rendezvous)


def evaluate_alone(rendezvous: str, path: str, overrides: list[str]) -> dict[str, Any] | str:
    """As a user does: one process, no launcher, nothing in the environment."""
    from megatron_idea.evaluation.held_out import evaluate_checkpoint

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    try:
        return evaluate_checkpoint(Path(path), overrides)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


def measure_job(
    rendezvous: str, path: str, data: list[str], overrides: list[str], options: dict[str, Any]
) -> list[Any] | str:
    """``evaluate_model`` over as many ranks as there are."""
    from megatron_idea.evaluation import held_out

    start = held_out.joined
    if os.environ["WORLD_SIZE"] == "1":
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name)
    else:
        held_out.joined = lambda parallel, seed: start(parallel, seed, rendezvous)
    try:
        return held_out.evaluate_model(Path(path), data, overrides, held_out.Options(**options))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        held_out.joined = start


def command(rendezvous: str, arguments: list[str]) -> tuple[int, str, str]:
    from megatron_idea import cli

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    result = runner.invoke(cli.app, arguments)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def texts(tmp_path: Path) -> str:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(file)


@pytest.fixture(scope="module")
def finished() -> dict[str, Any]:
    return {}


@pytest.fixture
def run(
    finished: dict[str, Any],
    tiny: Config,
    workers: Workers,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Config, dict[str, Any]]:
    """A finished run over two ranks, pruned, and its final checkpoint's measure over both."""
    if not finished:
        folder = tmp_path_factory.mktemp("evaluated")
        config = replace(
            tiny,
            run_dir=str(folder / "run"),
            data={"cache_dir": str(folder)},
            parallel={"tensor_model_parallel_size": 2},
            schedule=ONE_STEP,
        )
        both = workers.run(train_and_evaluate, 2, config, [])
        assert both[0] == both[1]
        finished["run"] = config, both[0]
    return finished["run"]


def measured(config: Config) -> list[float]:
    events = read_events(Path(config.run_dir))
    return [event["val_loss"] for event in events if event["kind"] == "evaluated"]


def test_one_process_measures_what_two_ranks_measured_in_training(
    run: tuple[Config, dict[str, Any]], workers: Workers
) -> None:
    config, over_both = run
    (alone,) = workers.run(evaluate_alone, 1, config.run_dir, [])
    last = measured(config)[-1]
    assert over_both["loss"] == pytest.approx(last, rel=1e-6)
    assert alone["loss"] == pytest.approx(last, rel=1e-6)
    assert alone["tokens"] == over_both["tokens"] == 4 * 32
    assert alone["perplexity"] == pytest.approx(math.exp(alone["loss"]))
    # A byte-level token is a byte, but for the end of a document, which stands for none.
    bits = alone["loss"] / math.log(2)
    assert bits <= alone["bits_per_byte"] < 1.02 * bits
    assert 0.98 * alone["tokens"] < alone["bytes"] <= alone["tokens"]


def test_an_earlier_checkpoint_and_more_samples_can_be_asked_for(
    run: tuple[Config, dict[str, Any]], workers: Workers
) -> None:
    config, _ = run
    earlier = Path(config.run_dir) / "checkpoints" / "step_00000006"
    (result,) = workers.run(evaluate_alone, 1, str(earlier), [])
    assert result["loss"] == pytest.approx(measured(config)[-2], rel=1e-6)
    (more,) = workers.run(evaluate_alone, 1, config.run_dir, ["evaluation.num_samples=9"])
    assert more["tokens"] == 9 * 32
    assert more["loss"] != result["loss"]


def test_the_command_prints_the_measure(
    run: tuple[Config, dict[str, Any]], workers: Workers
) -> None:
    config, over_both = run
    ((code, out, err),) = workers.run(command, 1, ["evaluate", config.run_dir])
    assert (code, err) == (0, "")
    printed = dict(line.split() for line in out.splitlines())
    assert printed.keys() == {"loss", "perplexity", "tokens", "bytes", "bits_per_byte"}
    assert float(printed["loss"]) == pytest.approx(over_both["loss"], abs=6e-5)


def test_what_cannot_be_measured_is_said(
    run: tuple[Config, dict[str, Any]], workers: Workers, tmp_path: Path
) -> None:
    config, _ = run
    (said,) = workers.run(evaluate_alone, 1, str(tmp_path), [])
    assert said.startswith("ConfigError: ") and "neither a checkpoint nor a run" in said
    (said,) = workers.run(evaluate_alone, 1, config.run_dir, ["data.validation=[]"])
    assert said == "ConfigError: data.validation is empty: there is nothing to measure on"
    copy = tmp_path / "step_00000008"
    shutil.copytree(Path(config.run_dir) / "checkpoints" / copy.name, copy)
    tensors = max(copy.glob("*.distcp"), key=lambda path: path.stat().st_size)
    tensors.write_bytes(tensors.read_bytes()[:1000])
    ((code, _, err),) = workers.run(command, 1, ["evaluate", str(copy)])
    assert code == 2
    assert err.startswith("error: ") and str(copy) in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("tokens", "length"), [(1, 4), (4, 4), (5, 4), (11, 4), (12, 4), (7, 1)])
def test_rows_score_every_token_once_with_the_longest_context(tokens: int, length: int) -> None:
    rows = list(rows_of(0, tokens, length))
    scored = [t for row in rows for t in range(row.end - row.scored, row.end)]
    assert scored == list(range(tokens))
    for row in rows:
        assert row.end - row.begin == min(length, row.end)


def test_text_is_measured_alike_over_ranks_and_in_any_batch(
    run: tuple[Config, dict[str, Any]], workers: Workers, texts: str
) -> None:
    config, _ = run
    # Five rows are more than the run's prune warm-up, which is nothing to measuring.
    two = workers.run(measure_job, 2, config.run_dir, [texts], [], {"batch_size": 5})
    assert two[0] == two[1]
    over_data = ["parallel.tensor_model_parallel_size=1"]
    dp = workers.run(measure_job, 2, config.run_dir, [texts], over_data, {"batch_size": 2})
    in_stages = [*over_data, "parallel.pipeline_model_parallel_size=2"]
    pp = workers.run(measure_job, 2, config.run_dir, [texts], in_stages, {"batch_size": 1})
    # Eight rows are more tokens than this run's prune warm-up: no matter to a measurement.
    ((alone,),) = workers.run(measure_job, 1, config.run_dir, [texts], [], {"batch_size": 8})
    for ((one,),) in ([two[0]], [dp[1]], [pp[0]]):
        assert one.loss == pytest.approx(alone.loss, rel=1e-6)
        assert (one.tokens, one.bytes) == (alone.tokens, alone.bytes)
    # With the byte tokenizer every byte is a token, and the end of a document is none of them.
    assert alone.tokens == alone.bytes == sum(len(text.encode()) for text in TEXTS)
    assert alone.bits_per_byte == pytest.approx(alone.loss / math.log(2))


@pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")
def test_a_checkpoint_and_its_export_measure_the_same(
    run: tuple[Config, dict[str, Any]], workers: Workers, texts: str, tmp_path: Path
) -> None:
    config, _ = run
    folder = str(tmp_path / "out")
    export_checkpoint(Path(config.run_dir), Path(folder))
    data = [config.data.validation[0].prefix, texts]
    options: dict[str, Any] = {"limit": 6, "batch_size": 2}
    (ours,) = workers.run(measure_job, 1, config.run_dir, data, [], options)
    (theirs,) = workers.run(measure_job, 1, folder, data, [], options)
    for a, b, name in zip(ours, theirs, data, strict=True):
        assert a.data == b.data == name
        assert a.loss == pytest.approx(b.loss, abs=1e-5)
        assert (a.tokens, a.bytes) == (b.tokens, b.bytes)
    assert theirs[0].tokens == 6 * 32

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    break_weights(broken)
    (said,) = workers.run(measure_job, 1, str(broken), [texts], [], {})
    assert said.startswith(f"DivergedError: the loss on {texts} is nan nats per token")


def break_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})


def rows_read(inputs: list[Path], dp_size: int = 1, seq_length: int = 8) -> list[Any]:
    """(scored tokens, text bytes) of all rows over all ranks."""
    found = []
    for rank in range(dp_size):
        batches = RollingBatches(
            inputs, load_tokenizer("byte"), model_vocab_size=257, seq_length=seq_length,
            micro_batch_size=2, global_batch_size=2 * dp_size, dp_size=dp_size, dp_rank=rank,
        )  # fmt: skip
        for begin in range(0, batches.num_samples, batches.global_batch_size):
            for batch in batches.step(begin):
                scored = batch["labels"][batch["loss_mask"] > 0]
                found.append((scored.tolist(), int(batch["text_bytes"].sum())))
    return found


@pytest.mark.parametrize("dp_size", [1, 2, 3, 7])
def test_ranks_score_every_byte_once_and_no_padding(texts: str, dp_size: int) -> None:
    found = rows_read([Path(texts)], dp_size)
    everything = "".join(TEXTS).encode()
    assert sorted(t for tokens, _ in found for t in tokens) == sorted(everything)
    assert sum(size for _, size in found) == len(everything)


def test_a_text_is_the_same_however_it_is_packed(texts: str, tmp_path: Path) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet

    lines = Path(texts).read_bytes()
    packed = [tmp_path / name for name in ("t.jsonl.gz", "t.jsonl.zst", "t.parquet")]
    packed[0].write_bytes(gzip.compress(lines))
    packed[1].write_bytes(pa.compress(lines, codec="zstd", asbytes=True))
    pyarrow.parquet.write_table(pa.table({"text": TEXTS}), packed[2])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "t.jsonl").write_bytes(lines.replace(b"\n", b"\r\n"))
    (folder / "ignored.csv").write_text("x")
    expected = rows_read([Path(texts)])
    for inputs in (*packed, folder):
        assert rows_read([inputs]) == expected


def test_what_a_measurement_lacks_is_said(
    run: tuple[Config, dict[str, Any]], workers: Workers, texts: str, tmp_path: Path
) -> None:
    config, _ = run
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    for path, data, overrides, options, says in (
        (config.run_dir, ["nowhere"], [], {}, "neither a dataset nowhere.idx nor a file"),
        (config.run_dir, [], [], {"limit": 3}, "set evaluation.num_samples=N"),
        (config.run_dir, [texts], [], {"limit": -1}, "--limit is -1; it must not be negative"),
        (str(tmp_path / "hf"), [], [], {}, "say what to measure"),
        (str(tmp_path / "hf"), [texts], ["a.b=1"], {}, "a.b=1 has no meaning for it"),
    ):
        (said,) = workers.run(measure_job, 1, path, data, overrides, options)
        assert says in said
    ((code, out, err),) = workers.run(
        command, 1, ["evaluate", config.run_dir, "--data", texts, "--json"]
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["held_out"][0]["data"] == texts


def test_data_that_is_not_there_is_said_before_anything_is_read(texts: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither a dataset nowhere\.idx nor a file or folder"):
        evaluate_model(tmp_path / "no_model", [texts, "nowhere"])


def test_a_compaction_does_not_change_the_held_out_loss(
    tiny: Config, workers: Workers, tmp_path: Path
) -> None:
    config = replace(tiny, schedule=ONE_STEP, evaluation={"around_compaction": True})
    workers.run(train_job, 1, config)
    events = [e for e in read_events(Path(config.run_dir)) if e["kind"] != "saved"]
    compactions = [i for i, event in enumerate(events) if event["kind"] == "compacted"]
    assert compactions
    for i in compactions:
        before, after = events[i - 1], events[i + 1]
        assert (before["why"], after["why"]) == ("compaction_before", "compaction_after")
        assert after["val_loss"] == pytest.approx(before["val_loss"], rel=1e-6)


def test_bytes_of_tokens_add_up_to_the_text(tmp_path: Path) -> None:
    bpe = train_tokenizer([Path(__file__)], 300, tmp_path / "bpe.json")
    sizes = bpe.token_bytes()
    assert sizes is not None and sizes[bpe.eod] == 0
    for text in TEXTS:
        assert sum(sizes[i] for i in bpe.encode(text)) == len(text.encode())
