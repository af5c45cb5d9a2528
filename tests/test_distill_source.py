"""A teacher from elsewhere says what it says there: another run, a checkpoint, a model folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hf import trained
from jobs import RandomBatches, live_run, random_tokens, run_job, small, train_on
from test_all_axes import killed_after
from test_checkpoint import curves
from test_distill import LAYOUTS, same_end

from megatron_idea import checkpoint
from megatron_idea.checkpoint.reader import CheckpointTensors
from megatron_idea.checkpoint.state import CheckpointError
from megatron_idea.config import Config, ConfigError, replace
from megatron_idea.data.tokenizer import train_tokenizer
from megatron_idea.huggingface.export import byte_tokenizer_json, export_checkpoint
from megatron_idea.huggingface.import_ import import_checkpoint
from megatron_idea.records.read import read_events, read_metrics
from megatron_idea.shape import Shape
from megatron_idea.testing import Workers, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

pytest.importorskip("transformers", reason="needs megatron-idea[export]")

PAIR = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
LARGE = {
    "num_layers": 4, "hidden_size": 24, "ffn_hidden_size": 28, "num_attention_heads": 8,
    "num_query_groups": 4, "kv_channels": 6, "init_method_std": 0.2, "layernorm_epsilon": 1e-2,
}  # fmt: skip
TARGET = {"ffn_hidden_size": 12, "num_query_groups": 2, "hidden_size": 16, "num_layers": 3}


def student(teacher: Path | str, **sections: Any) -> Config:
    model = {"vocab_size": 264} | sections.pop("model", {})
    distill = {"teacher": str(teacher)} | sections.pop("distill", {})
    return small(model=model, distill=distill, **sections)


def heard(groups: ProcessGroups, config: Config, known: str = "") -> tuple[list[float], str]:
    """A teacher's cross entropies, as the loss of a student hears them; and its SHA-256."""
    from megatron_idea.data.tokenizer import load_tokenizer
    from megatron_idea.distill.source import open_teacher
    from megatron_idea.engine.passes import forward_backward

    run, _ = live_run(groups, config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    teacher, digest = open_teacher(config, groups, tokenizer, known)
    data = RandomBatches(config, groups)
    with teacher.teaching(run.trainable.chunks, data, 0, 0.5) as lessons:
        forward_backward(run.trainable, data, 0)
    return [float(x) for x in lessons.teacher_cross_entropy], digest


def plainly(logits: torch.Tensor, config: Config) -> list[float]:
    """Cross entropy of each micro-batch from logits of the whole batch."""
    labels = random_tokens(config, 0)[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return [float(part.mean()) for part in losses.split(config.training.micro_batch_size)]


def said(rendezvous: str, path: str, config: Config) -> list[float]:
    """The same by a plain forward pass over the whole batch, in the run's own precision."""
    from megatron_idea.evaluation.generate import open_model

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    with open_model(Path(path)) as (forward, _):
        return plainly(forward(random_tokens(config, 0)[:, :-1]).float(), config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teachers")


RUNS: dict[str, tuple[int, int, dict[str, Any]]] = {
    # In the middle of its prune phase, all that is removed waiting as zeros: a Llama.
    "zeros": (1, 6, {
        "model": {**LARGE, "qk_layernorm": False, "share_embeddings_and_output_weights": False},
        "prune": {"target": TARGET, "channel_alignment": 4, "layer_candidates": 0},
    }),
    # Cut on all axes, layers of different widths, three of them on two stages: a Qwen3.
    "cut": (4, 7, {
        "model": LARGE, "parallel": PAIR,
        "prune": {
            "target": TARGET, "channel_alignment": 4, "layer_candidates": 0, "scope": "global",
            "compact": True, "compaction_block": 4,
        },
    }),
    # Widths that differ, and a Llama: it has a compact layout, too.
    "uneven": (1, 6, {
        "model": {"qk_layernorm": False, "num_query_groups": 4},
        "prune": {"scope": "global"},
    }),
    "bf16": (1, 6, {"training": {"precision": "bf16"}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(workers: Workers, folder: Path) -> dict[str, Path]:
    for name, (size, steps, sections) in RUNS.items():
        trained(workers, folder / name, size, steps, **{k: dict(v) for k, v in sections.items()})
        for layout in ("padded", "compact") if name == "uneven" else ("padded",):
            export_checkpoint(folder / name, folder / f"{name}_{layout}", layout=layout)
    return {path.name: path for path in folder.iterdir()}


CASES = [
    *((teacher, layout) for teacher in ("cut", "cut_padded")
      for layout in ("one", "tp2_sp", "pp2", "tp2_pp2")),
    *((teacher, layout) for teacher in ("zeros", "zeros_padded") for layout in ("one", "tp2_pp2")),
    ("zeros", "vpp2"), ("cut", "dp2"), ("uneven", "tp2"),
    ("uneven_padded", "one"), ("uneven_compact", "one"), ("uneven_compact", "tp2_pp2"),
]  # fmt: skip


@pytest.mark.parametrize(("teacher", "layout"), CASES)
def test_a_teacher_says_what_its_own_run_says(
    workers: Workers, runs: dict[str, Path], teacher: str, layout: str
) -> None:
    size, parallel = LAYOUTS.get(layout, (1, {}))
    of_run = runs[teacher.split("_")[0]]
    path = checkpoint.resolve(of_run) if teacher == "uneven" else runs[teacher]
    config = student(path, parallel=parallel, model={"num_layers": 4})
    (expected,) = workers.run(said, 1, str(of_run), config)
    found = run_job(workers, heard, size, config)
    assert len({digest for _, digest in found}) == 1
    if layout == "dp2":
        assert found[0][0] + found[1][0] == pytest.approx(expected, rel=1e-6)
    else:
        assert found[-1][0] == pytest.approx(expected, rel=1e-6)


def test_the_runs_are_what_they_stand_for(runs: dict[str, Path]) -> None:
    shapes = {name: checkpoint.read_state(checkpoint.resolve(runs[name])).shape for name in RUNS}
    full = Shape.full(small(model={"vocab_size": 264, **LARGE}).model)
    assert shapes["zeros"] == full
    cut = shapes["cut"]
    assert cut.num_layers == 3 and cut.hidden_size < 24
    assert len(set(cut.counts("ffn_hidden_size"))) > 1
    blocks = json.loads((runs["uneven_compact"] / "config.json").read_text())["block_configs"]
    assert len({block["ffn"]["intermediate_size"] for block in blocks}) > 1


def of_folder(folder: Path, config: Config) -> list[float]:
    """What transformers makes of a folder, in fp32."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return plainly(model(random_tokens(config, 0)[:, :-1]).logits, config)


def test_a_bf16_teacher_in_an_fp32_run_has_its_weights(
    workers: Workers, runs: dict[str, Path]
) -> None:
    """It computes in the student's precision, with weights that bf16 has rounded."""
    for path in (runs["bf16"], runs["bf16_padded"]):
        config = student(path)
        ((found, _),) = run_job(workers, heard, 1, config)
        assert found == pytest.approx(of_folder(runs["bf16_padded"], config), rel=1e-6)


def test_an_fp32_teacher_in_a_bf16_run_is_rounded_once(
    workers: Workers, runs: dict[str, Path], tmp_path: Path
) -> None:
    export_checkpoint(runs["uneven"], tmp_path / "rounded", dtype="bf16")
    paths = (runs["uneven"], runs["uneven_padded"], tmp_path / "rounded")
    one, two, three = (
        run_job(workers, heard, 1, student(path, training={"precision": "bf16"}))[0][0]
        for path in paths
    )
    assert one == two == three
    expected = of_folder(runs["uneven_padded"], student("none"))
    assert one == pytest.approx(expected, rel=1e-2) and one != expected


def test_a_tokenizer_is_told_by_its_content(
    workers: Workers, runs: dict[str, Path], tmp_path: Path
) -> None:
    """``byte`` is a file in an export, and every file may have another name."""
    bpe = train_tokenizer([Path(__file__)], 264, tmp_path / "bpe.json")
    export_checkpoint(runs["uneven"], tmp_path / "out", tokenizer=str(tmp_path / "bpe.json"))
    (tmp_path / "byte.json").write_text(byte_tokenizer_json())
    ((expected, _),) = run_job(workers, heard, 1, student(runs["uneven"]))
    for teacher, words in (
        (tmp_path / "out", "bpe.json"),
        (runs["uneven_padded"], "byte.json"),
        (runs["uneven"], "byte.json"),
    ):
        config = student(teacher, data={"tokenizer": str(tmp_path / words)})
        ((found, _),) = run_job(workers, heard, 1, config)
        assert found == pytest.approx(expected, rel=1e-6)
    assert bpe.digest


# ------------------------------------------------------------------------------------- refusals


def refused(workers: Workers, config: Config, message: str, kind: type, size: int = 1) -> None:
    """Every rank says the same sentence, of a type that the command line shows as one."""
    with pytest.raises(RuntimeError, match=message) as caught:
        run_job(workers, heard, size, config)
    said = [line for line in str(caught.value).splitlines() if f".{kind.__name__}: " in line]
    assert len(said) == size


def test_what_cannot_teach_is_said(workers: Workers, runs: dict[str, Path], tmp_path: Path) -> None:
    train_tokenizer([Path(__file__)], 264, tmp_path / "bpe.json")
    bpe = {"tokenizer": str(tmp_path / "bpe.json")}
    bare = tmp_path / "bare"
    shutil.copytree(runs["uneven_padded"], bare)
    (bare / "tokenizer.json").unlink()
    four = {"num_layers": 4, "num_query_groups": 4}
    tp4, pp4 = {"tensor_model_parallel_size": 4}, {"pipeline_model_parallel_size": 4}
    uneven, cut = runs["uneven"], runs["cut"]
    for config, message, size in (
        (student(uneven, model={"vocab_size": 512}), "vocabulary of 264 .* one of 512", 1),
        (student(uneven, data=bpe), "has another tokenizer than data.tokenizer", 1),
        (student(runs["uneven_padded"], data=bpe), "has another tokenizer", 1),
        (student(bare), "has no tokenizer.json", 1),
        (student(tmp_path / "none"), "distill.teacher .*none is neither a checkpoint, nor", 1),
        (
            student(tmp_path),
            "neither a checkpoint, nor a run with a complete one, nor a Hugging",
            1,
        ),
        (student(cut, model=four, parallel=pp4), "has 3 layers, fewer than the 4 stages", 4),
        (student(cut, model=four, parallel=tp4), "num_query_groups 2, which cannot be split", 4),
    ):
        refused(workers, config, message, ConfigError, size)


def damage(file: Path, at: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 1
    file.write_bytes(content)


def test_a_damaged_teacher_is_refused_on_every_rank(
    workers: Workers, runs: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    run = tmp_path / "run"
    shutil.copytree(runs["uneven"], run)
    pair = {"parallel": {"pipeline_model_parallel_size": 2}}

    def is_refused(path: Path, message: str, kind: type) -> None:
        refused(workers, student(path, **pair), message, kind, 2)

    damage(max(run.glob("checkpoints/*/*.distcp"), key=lambda file: file.stat().st_size))
    refused(
        workers,
        student(run, **pair),
        "the teacher cannot be read: .*is damaged",
        CheckpointError,
        2,
    )
    manifest = next(run.glob("checkpoints/*/manifest.json"))
    manifest.unlink()
    is_refused(run, "does not go on without", CheckpointError)
    os.mkfifo(manifest)  # it need never end
    is_refused(run, "manifest.json is not a regular file", CheckpointError)

    folder = tmp_path / "folder"
    shutil.copytree(runs["uneven_padded"], folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")  # of the second stage alone
    save_file(tensors, weights, metadata={"format": "pt"})
    is_refused(folder, "holds NaN or infinity in model.layers.1", ConfigError)
    weights.write_bytes(weights.read_bytes()[:-4])
    is_refused(folder, "cannot read .*model.safetensors", ConfigError)
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch here'\ntR.")
    is_refused(folder, "import reads safetensors", ConfigError)
    assert not Path("here").exists()


def test_a_pickle_in_a_strangers_checkpoint_does_not_run(
    workers: Workers, runs: dict[str, Path], tmp_path: Path
) -> None:
    """Its index is a pickle by megatron-core's format: it is read as data, before any loading."""
    run = tmp_path / "run"
    shutil.copytree(runs["uneven"], run)
    found = checkpoint.resolve(run)
    trace = tmp_path / "trace"
    program = f"cos\nsystem\n(S'touch {trace}'\ntR.".encode()
    (found / ".metadata").write_bytes(program)
    refused(workers, student(run), "is damaged: .metadata", CheckpointError)
    shutil.copy(checkpoint.resolve(runs["uneven"]) / ".metadata", found / ".metadata")
    (found / "common.pt").write_bytes(program)
    refused(workers, student(run), "is damaged: common.pt", CheckpointError)
    assert not trace.exists()


def test_the_teacher_that_is_known_is_found_or_it_ends_the_run(
    workers: Workers, runs: dict[str, Path], tmp_path: Path
) -> None:
    """Another run may have gone on: its checkpoint stays the teacher while it is there."""
    from megatron_idea.distill.source import find_teacher

    run, folder = tmp_path / "run", tmp_path / "folder"
    shutil.copytree(runs["uneven"], run)
    shutil.copytree(runs["uneven_padded"], folder)
    first = checkpoint.resolve(run)
    path, digest = find_teacher(student(run), "")
    assert path == first
    later = first.with_name("step_00000099")
    shutil.copytree(first, later)
    damage(later / "manifest.json", at=0.999)
    assert find_teacher(student(run), "")[0] == later
    assert find_teacher(student(run), digest) == (first, digest)
    shutil.rmtree(first)
    with pytest.raises(CheckpointError, match="is not the one that this run has learnt from"):
        find_teacher(student(run), digest)
    _, digest = find_teacher(student(folder), "")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(CheckpointError, match="its files have changed"):
        find_teacher(student(folder), digest)


# ------------------------------------------------------------------------------------ whole runs


def test_a_small_model_learns_from_another_run_and_goes_on_as_if_it_had_not_stopped(
    workers: Workers, tiny: Config, tmp_path: Path
) -> None:
    """Training small with a teacher: nothing is pruned, and it is asked from the first step on."""
    workers.run(train_on, 1, tiny)
    config = replace(
        tiny,
        run_dir=str(tmp_path / "small"),
        model={"ffn_hidden_size": 24},
        prune={"strategy": "none"},
        distill={"teacher": tiny.run_dir, "alpha_end": 0.0, "acceptance": True},
        checkpoint={"every_tokens": 8 * 128, "keep_last": 0},
    )
    workers.run(train_on, 1, config)
    records = read_metrics(Path(config.run_dir))
    assert len(records) == 24
    for record in records[:-1]:
        assert record.kl is not None and record.teacher_loss is not None
        assert record.acceptance is not None and 0 < record.acceptance < 1
    assert records[-1].kl is None, "alpha has come to 0: nobody is asked"
    again = killed_after(config, 8, tmp_path / "again")
    workers.run(train_on, 1, again)
    assert curves(again.run_dir, 0) == curves(config.run_dir, 0)
    same_end(again, config)
    lost = killed_after(config, 8, tmp_path / "lost")
    Path(tiny.run_dir).rename(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="is neither a checkpoint, nor a run"):
        workers.run(train_on, 1, lost)


def test_an_imported_model_teaches_what_it_becomes(
    workers: Workers, runs: dict[str, Path], tiny: Config, tmp_path: Path
) -> None:
    """With no enlarged phase ``self`` is what was imported, made before the first step."""
    keys = [
        "distill.teacher=self", "schedule.enlarged_fraction=0", "schedule.prune_fraction=0.5",
        "schedule.recover_fraction=0.5", "schedule.total_tokens=1536", "prune.alignment=2",
        "prune.target.ffn_hidden_size=12", "prune.compaction_block=4", "training.seq_length=32",
        "training.micro_batch_size=2", "training.global_batch_size=4", "data.tokenizer=byte",
        f"data.train=[{{prefix: {tiny.data.train[0].prefix}}}]", "evaluation.num_samples=4",
        f"data.validation=[{{prefix: {tiny.data.validation[0].prefix}}}]", "checkpoint.keep_last=0",
        f"data.cache_dir={tmp_path / 'cache'}", "logging.tensorboard=false",
        "logging.progress=false", "schedule.prune_warmup_fraction=0.2",
    ]  # fmt: skip
    export_checkpoint(runs["uneven"], tmp_path / "hf")
    done = import_checkpoint(tmp_path / "hf", tmp_path / "run", overrides=keys)
    config = checkpoint.read_config(done.path)
    workers.run(train_on, 1, config)
    own = tmp_path / "run" / "teacher" / "self"
    ours, theirs = (CheckpointTensors(path) for path in (own, done.path))
    from megatron_idea.huggingface.names import checkpoint_name
    from megatron_idea.prune.axis import whole_shapes

    names = [checkpoint_name(n) for n, _ in whole_shapes(config.model, Shape.full(config.model))]
    weights, imported = ours.read(names), theirs.read(names)
    for name in names:
        assert_equal(weights[name], imported[name], name)
    records = read_metrics(tmp_path / "run")
    assert records[0].kl == 0 and records[0].teacher_loss == records[0].loss
    assert records[-1].kl is not None and records[-1].kl > 0
    (event,) = [e for e in read_events(tmp_path / "run") if e["kind"] == "teacher"]
    assert event["step"] == 0
    again = killed_after(config, 0, tmp_path / "again")  # the teacher is there, its state is not
    workers.run(train_on, 1, again)
    assert curves(again.run_dir, 0) == curves(config.run_dir, 0)
