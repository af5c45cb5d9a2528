"""A configuration is read exactly or refused with a message that says how to mend it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_idea.config import (
    BlendEntry,
    Config,
    ConfigError,
    from_dict,
    load,
    replace,
    to_yaml,
    validate,
)

EXAMPLES = sorted((Path(__file__).parent.parent / "examples" / "configs").glob("*.yaml"))


def test_layers_override_each_other_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {hidden_size: 64, num_layers: 2}\nschedule: {lr: 0.01}\n")
    config = load(path, ["model.num_layers=6", "prune.ema=0.3"])
    assert config.model.num_layers == 6  # override
    assert config.model.hidden_size == 64  # file
    assert config.model.ffn_hidden_size == Config().model.ffn_hidden_size  # default
    assert (config.schedule.lr, config.prune.ema) == (0.01, 0.3)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("")
    assert load(path) == load(None) == Config()


@pytest.mark.parametrize("given", ["4e6", "4_000_000", "4000000", "4.0e+6"])
def test_whole_numbers_can_be_written_as_people_write_them(given: str) -> None:
    assert load(None, [f"schedule.total_tokens={given}"]).schedule.total_tokens == 4_000_000


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_survive_a_round_trip_through_yaml(path: Path, tmp_path: Path) -> None:
    config = load(path)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml") == config


def test_a_blend_is_read_into_its_entries() -> None:
    config = from_dict({"data": {"train": [{"prefix": "a", "weight": 2}, {"prefix": "b"}]}})
    assert config.data.train == [BlendEntry("a", 2.0), BlendEntry("b", 1.0)]


def test_a_config_cannot_be_changed_by_accident() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().run_dir = "elsewhere"  # type: ignore[misc]


def test_replace_checks_the_new_values() -> None:
    assert replace(Config(), prune={"ema": 0.3}, run_dir="x").prune.ema == 0.3
    with pytest.raises(ConfigError, match=r"prune\.ema is 2"):
        replace(Config(), prune={"ema": 2})


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("model.hiden_size=1", "model.hidden_size"),
        ("shedule.lr=1", "schedule"),
        ("prune.target_ffn_size=1", "prune.target_ffn_hidden_size"),
        ("schedule.learning_rate=1", "schedule."),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(
    override: str, suggestion: str
) -> None:
    with pytest.raises(ConfigError, match=r"unknown key .* did you mean '" + suggestion):
        load(None, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers=many", r"model\.num_layers"),
        ("model.num_layers=2.5", r"model\.num_layers"),
        ("schedule.lr=high", r"schedule\.lr"),
        ("model.qk_layernorm=perhaps", r"model\.qk_layernorm"),
        ("model=big", "model is a section"),
        ("model.num_layers", "not of the form key.sub=value"),
    ],
)
def test_a_wrong_type_is_refused_by_its_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers=0", r"model\.num_layers is 0; it must be positive"),
        ("model.num_query_groups=3", "must be a multiple of"),
        ("model.kv_channels=33", "RoPE rotates pairs"),
        ("model.hidden_dropout=1.0", r"must be in \[0, 1\)"),
        ("data.train=[{prefix: a, weight: 0}]", "must be positive"),
        ("training.seq_length=0", r"training\.seq_length is 0"),
        ("training.precision=fp16", "legal values: fp32, bf16"),
        ("training.kernel_implementation=cuda", "legal values: auto, triton, reference"),
        ("parallel.tensor_model_parallel_size=0", "must be at least 1"),
        ("parallel.virtual_pipeline_model_parallel_size=2", "needs pipeline_model_parallel_size"),
        ("parallel.overlap_param_gather=true", "needs use_distributed_optimizer and"),
        ("optimizer.adam_beta2=1.0", r"must be in \[0, 1\)"),
        ("optimizer.clip_grad=-1", "must not be negative"),
        ("optimizer.lr_scaling=mup", "legal values: none, mup_simple"),
        ("schedule.kind=cyclic", "legal values: integrated, restarted"),
        ("schedule.removal=linear", "legal values: cubic, one_shot"),
        ("schedule.total_tokens=0", "must be positive"),
        ("schedule.min_lr=1.0", "must be between 0 and"),
        ("schedule.prune_warmup_fraction=1.0", "must be below 1"),
        ("schedule.prune_fraction=1.5", r"must be in \[0, 1\]"),
        ("prune.strategy=magnitude", "legal values: idea, none"),
        ("prune.element=cubed", "legal values: abs, squared, signed"),
        ("prune.row_reduce=min", "legal values: mean, sum, l2, max"),
        ("prune.matrix_reduce=min", "legal values: max, mean, sum"),
        ("prune.scope=block", "legal values: layer, global"),
        ("prune.placement=random", "legal values: min, ordered"),
        ("prune.ema_on=both", "legal values: history, new"),
        ("prune.ema=1.0", "scores would stay 0 for ever"),
        ("prune.mask_interval_steps=0", "must be at least 1"),
        ("prune.compaction_block=-8", "must not be negative"),
        ("checkpoint.keep_last=-1", "must not be negative"),
        ("evaluation.num_samples=0", "must be positive"),
    ],
)
def test_an_illegal_value_is_refused_with_what_is_legal(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [override])


def test_phases_that_do_not_add_up_are_refused_with_their_sum() -> None:
    with pytest.raises(ConfigError, match=r"must be 1; they are 0\.5 \+ 0\.3 \+ 0\.35 = 1\.15"):
        load(None, ["schedule.prune_fraction=0.3"])


def test_a_restarted_schedule_needs_room_for_both_warm_ups() -> None:
    with pytest.raises(ConfigError, match="warms up twice"):
        load(None, ["schedule.kind=restarted", "schedule.lr_warmup_fraction=0.5"])


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file at .*nowhere\.yaml"):
        load(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: {hidden_size: [1\n")
    with pytest.raises(ConfigError, match=r"cannot read configuration .*broken\.yaml"):
        load(broken)


def valid(**sections: Any) -> Config:
    return replace(
        Config(),
        parallel={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        training={"micro_batch_size": 2},
        **sections,
    )


def test_a_sound_configuration_is_valid_at_every_fitting_number_of_processes() -> None:
    for world_size in (4, 8, 16):
        validate(valid(), world_size)


@pytest.mark.parametrize("world_size", [1, 2, 6])
def test_processes_must_be_a_multiple_of_the_model_parallel_size(world_size: int) -> None:
    with pytest.raises(
        ConfigError, match=f"{world_size} processes cannot be split .* a multiple of 4"
    ):
        validate(valid(), world_size)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"num_query_groups": 1}}, "num_query_groups .1. must be a multiple of the TP"),
        ({"model": {"vocab_size": 4097}}, "vocab_size .4097. must be a multiple of the TP"),
        ({"model": {"num_layers": 3}}, "num_layers .3. must be a multiple of PP"),
        ({"model": {"ffn_hidden_size": 1000}}, "nearest legal widths: 992, 1008"),
        ({"prune": {"target_ffn_hidden_size": 390}}, "nearest legal widths: 384, 400"),
        ({"prune": {"target_ffn_hidden_size": 7}}, "nearest legal widths: 16$"),
        ({"prune": {"target_ffn_hidden_size": 1024}}, "set prune.strategy=none"),
        ({"prune": {"target_ffn_hidden_size": 2048}}, "must be below model.ffn_hidden_size"),
        ({"prune": {"compaction_block": 24}}, "compaction_block .24. must be a multiple"),
    ],
)
def test_sections_that_do_not_fit_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(valid(**sections), 4)


def test_the_batch_must_split_over_ranks_and_micro_batches() -> None:
    config = replace(Config(), training={"global_batch_size": 12, "micro_batch_size": 4})
    with pytest.raises(ConfigError, match="micro_batch_size x DP = 4 x 2 = 8"):
        validate(config, 2)


def test_sequence_parallelism_needs_sequences_that_split() -> None:
    odd = replace(
        Config(), training={"seq_length": 255}, parallel={"tensor_model_parallel_size": 2}
    )
    with pytest.raises(ConfigError, match="for sequence parallelism"):
        validate(odd, 2)
    validate(replace(odd, parallel={"sequence_parallel": False}), 2)


def test_interleaving_needs_whole_rounds_of_micro_batches() -> None:
    interleaved = replace(
        Config(),
        parallel={
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
        },
        training={"global_batch_size": 3, "micro_batch_size": 1},
    )
    with pytest.raises(ConfigError, match=r"needs a multiple of PP .2. micro-batches"):
        validate(interleaved, 2)


def test_plain_training_ignores_the_target_width() -> None:
    config = replace(Config(), prune={"strategy": "none", "target_ffn_hidden_size": 7})
    validate(config, 1)
    assert config.final_keep_ratio == 1.0
    assert config.target_ffn_hidden_size == config.model.ffn_hidden_size


def test_the_default_block_is_a_legal_sixteenth_of_the_width() -> None:
    assert Config().compaction_block == 64
    assert replace(Config(), parallel={"tensor_model_parallel_size": 4}).compaction_block == 64
    assert replace(Config(), prune={"alignment": 48}).compaction_block == 48
    assert replace(Config(), prune={"alignment": 128}).compaction_block == 128


def test_the_moving_average_reads_its_coefficient_on_either_term() -> None:
    assert replace(Config(), prune={"ema": 0.3}).prune.history == 0.3
    assert replace(Config(), prune={"ema": 0.3, "ema_on": "new"}).prune.history == 0.7
