"""A configuration is read exactly or refused with a message that says how to mend it."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_idea.config import (
    METHODS,
    BlendEntry,
    Config,
    ConfigError,
    ParallelConfig,
    PruneTarget,
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
        ("prune.target_ffn_size=1", "prune.target.ffn_hidden_size'"),
        ("prune.target_ffn_hidden_size=1", "prune.target.ffn_hidden_size'"),
        ("lr=1", "schedule.lr'"),
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
        ("schedule.removal=sudden", "legal values: cubic, linear, rounds, one_shot"),
        ("schedule.rounds=0", r"schedule\.rounds is 0; it must be at least 1"),
        ("schedule.lr_decay_style=wsd", "legal values: cosine, WSD, linear, constant"),
        ("schedule.lr_wsd_decay_fraction=1.5", r"must be in \[0, 1\]"),
        ("schedule.total_tokens=0", "must be positive"),
        ("schedule.min_lr=1.0", "must be between 0 and"),
        ("schedule.prune_warmup_fraction=1.0", "must be below 1"),
        ("schedule.prune_fraction=1.5", r"must be in \[0, 1\]"),
        ("prune.strategy=alps", "minitron, shortgpt, pca_stem, adapt_pruner, efficient_llm, none"),
        ("prune.element=cubed", "legal values: abs, squared, signed, fisher"),
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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["random", "element=signed"], "prune.element means nothing to prune.strategy=random"),
        (["magnitude", "element=signed"], "leave it out, or at its default, abs"),
        (["taylor", "row_reduce=sum"], "prune.row_reduce means nothing to prune.strategy=taylor"),
        (["llm_pruner", "matrix_reduce=sum"], "prune.matrix_reduce means nothing"),
        (["llm_pruner", "element=squared"], "abs, fisher .* or signed .*, not squared"),
        (["wanda", "aggregation=sequence_norm"], "prune.aggregation means nothing"),
        (["efficient_llm", "matrix_reduce=sum"], "prune.matrix_reduce means nothing"),
        (["efficient_llm", "update_tokens=64"], "means nothing to prune.update=none"),
        (["idea", "update=obs"], r"part of EfficientLLM: set prune\.strategy=efficient_llm"),
        (["efficient_llm", "update=ridge"], "legal values: none, obs"),
        (["efficient_llm", "update_form=row"], "legal values: block, exact"),
        (["efficient_llm", "update_damping=0"], "prune.update_damping is 0.0; it must be positive"),
        (["minitron", "aggregation=l2"], "legal values: sequence_mean, sequence_norm"),
    ],
)
def test_what_a_method_would_ignore_is_refused(overrides: list[str], message: str) -> None:
    strategy, setting = overrides
    with pytest.raises(ConfigError, match=message):
        load(None, [f"prune.strategy={strategy}", f"prune.{setting}"])


def test_what_a_method_listens_to_is_taken() -> None:
    for strategy, setting in (
        ("magnitude", "row_reduce=l2"),
        ("llm_pruner", "element=signed"),
        ("minitron", "aggregation=sequence_norm"),
        ("none", "row_reduce=l2"),
    ):
        load(None, [f"prune.strategy={strategy}", f"prune.{setting}"])


@pytest.mark.parametrize(
    ("strategy", "axis"), [("wanda", "hidden_size"), ("flap_score", "num_layers")]
)
def test_an_axis_that_a_method_has_no_score_for_is_refused(strategy: str, axis: str) -> None:
    config = load(None, [f"prune.strategy={strategy}", f"prune.target.{axis}=2"])
    with pytest.raises(ConfigError, match="legal values: ffn_hidden_size, num_query_groups"):
        validate(config, 1)


def test_phases_that_do_not_add_up_are_refused_with_their_sum() -> None:
    with pytest.raises(ConfigError, match=r"must be 1; they are 0\.5 \+ 0\.3 \+ 0\.35 = 1\.15"):
        load(None, ["schedule.prune_fraction=0.3"])


def test_a_restarted_schedule_needs_room_for_both_warm_ups() -> None:
    with pytest.raises(ConfigError, match="warms up twice"):
        load(None, ["schedule.kind=restarted", "schedule.lr_warmup_fraction=0.5"])


WSD = ("schedule.lr_decay_style=WSD", "schedule.lr_warmup_fraction=0.05")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.lr_wsd_decay_fraction=0"], "it is lr_decay_style=constant"),
        (
            ["schedule.lr_wsd_decay_fraction=0.96"],
            r"lr_warmup_fraction .0\.05. \+ lr_wsd_decay_fraction .0\.96. must be at most 1, the "
            "share of all tokens that the curve has",
        ),
        (
            ["schedule.lr_wsd_decay_fraction=0.91", "schedule.kind=restarted"],
            r"\+ 0\.5 x lr_wsd_decay_fraction .0\.91. must be at most 0\.5, .* shorter curve has",
        ),
    ],
)
def test_wsd_needs_room_for_warm_up_and_decay(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [*WSD, *overrides])


def test_wsd_may_decay_right_after_its_warm_up() -> None:
    load(None, [*WSD, "schedule.lr_wsd_decay_fraction=0.95"])
    load(None, [*WSD, "schedule.lr_wsd_decay_fraction=0.9", "schedule.kind=restarted"])
    # Another style has no such decay.
    load(None, ["schedule.lr_wsd_decay_fraction=0"])


def test_a_removal_that_is_left_out_is_the_methods_own() -> None:
    assert Config().schedule.removal is None
    for strategy, method in METHODS.items():
        assert replace(Config(), prune={"strategy": strategy}).removal == method.removal
    assert replace(Config(), prune={"strategy": "none"}).removal == "cubic"
    assert replace(Config(), schedule={"removal": "linear"}).removal == "linear"
    assert load(None, ["schedule.removal=null"]) == Config()


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
        ({"model": {"ffn_hidden_size": 1000}}, "nearest legal values: 992, 1008"),
        ({"prune": {"target": {"ffn_hidden_size": 390}}}, "nearest legal values: 384, 400"),
        ({"prune": {"target": {"ffn_hidden_size": 7}}}, "nearest legal values: 16$"),
        ({"prune": {"target": {"ffn_hidden_size": 1024}}}, "set prune.strategy=none"),
        ({"prune": {"target": {"ffn_hidden_size": 2048}}}, "must be below model.ffn_hidden_size"),
        ({"prune": {"compaction_block": 24}}, "compaction_block .24. must be a multiple"),
    ],
)
def test_sections_that_do_not_fit_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(valid(**sections), 4)


@pytest.mark.parametrize(
    ("width", "more", "add"),
    [
        (192, "", "prune.target.ffn_hidden_size, below model.ffn_hidden_size (192)"),
        (4096, "prune: {ema: 0.3}", "prune.target.ffn_hidden_size, below model.ffn_hidden_size"),
        (1024, "prune: {strategy: shortgpt}", "prune.target.num_layers, below model.num_layers"),
    ],
)
def test_a_file_that_does_not_say_what_to_prune_is_told_what_to_add(
    tmp_path: Path, width: int, more: str, add: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{ffn_hidden_size: {width}}}\ndata: {{train: [{{prefix: a}}]}}\n{more}\n"
    )
    with pytest.raises(ConfigError, match=f"^nothing says what to prune: add {re.escape(add)}"):
        validate(load(path), 1)
    validate(load(path, ["prune.strategy=none"]), 1)


def test_a_width_that_is_asked_for_is_no_default(tmp_path: Path) -> None:
    wide = ["model.ffn_hidden_size=4096"]
    validate(load(None, [*wide, "prune.target.ffn_hidden_size=384"]), 1)
    (tmp_path / "run.yaml").write_text(to_yaml(load(None)))
    validate(load(tmp_path / "run.yaml", wide), 1)


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
    config = replace(Config(), prune={"strategy": "none", "target": {"ffn_hidden_size": 7}})
    validate(config, 1)
    assert not config.goals


GOAL = "prune.target.parameters=800_000"  # of 2,294,912
ADAPT, EFFICIENT = "prune.strategy=adapt_pruner", "prune.strategy=efficient_llm"


def test_a_number_of_parameters_is_a_target_of_its_own() -> None:
    config = load(None, [ADAPT, GOAL])
    assert config.prune.target == PruneTarget(parameters=800_000), "the default width is not in it"
    assert config.prune.target.counts == {}
    assert config.parameter_goal == 800_000
    assert load(None, [EFFICIENT, GOAL]).parameter_goal == 800_000
    assert load(None, ["prune.strategy=none", GOAL]).parameter_goal is None
    assert Config().parameter_goal is None
    validate(config, 1)


def test_with_parameters_the_axes_that_are_given_shrink_and_keep_at_least_so_much() -> None:
    def least(*overrides: str) -> dict[str, int]:
        config = load(None, ["prune.target.parameters=1_200_000", *overrides])
        validate(config, config.parallel.model_parallel_size)
        return {axis: goal.least for axis, goal in config.goals.items()}

    smallest = {"ffn_hidden_size": 8, "num_query_groups": 1}
    assert least(ADAPT) == smallest
    assert least(EFFICIENT) == smallest | {"hidden_size": 64}
    served = "prune.serve_tensor_model_parallel_size=2"
    assert least(ADAPT, served) == {"ffn_hidden_size": 256, "num_query_groups": 2}
    two = "parallel.tensor_model_parallel_size=2"
    assert least(ADAPT, two) == {"ffn_hidden_size": 16, "num_query_groups": 2}
    assert least(EFFICIENT, "prune.target.ffn_hidden_size=64") == {"ffn_hidden_size": 64}


def test_a_shape_is_the_least_that_may_be_left_of_it() -> None:
    shape = ["prune.target.ffn_hidden_size=256", "prune.target.num_query_groups=1"]
    for method in ("prune.strategy=idea", ADAPT, EFFICIENT):
        config = load(None, [method, *shape])
        validate(config, 1)
        assert {axis: (goal.target, goal.least) for axis, goal in config.goals.items()} == {
            "ffn_hidden_size": (256, 256),
            "num_query_groups": (1, 1),
        }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([GOAL], "adapt_pruner and efficient_llm; prune.strategy=idea needs the shape"),
        ([GOAL, "prune.strategy=random"], "prune.strategy=random needs the shape"),
        ([ADAPT, "prune.target.parameters=0"], "prune.target.parameters is 0; it must be positive"),
        ([ADAPT, GOAL, "prune.scope=global"], "leave prune.order empty and prune.scope at layer"),
        ([EFFICIENT, "prune.order=[ffn_hidden_size]"], "leave prune.order empty"),
        # Embedding 524,288, attention 4 x 24,576, FFN 4 x 3,072, norms 1,152.
        ([ADAPT, "prune.target.parameters=636031"], "636,031. must be at least 636,032, what is "),
        ([ADAPT, "prune.target.parameters=636031"], "left with ffn_hidden_size 8, num_query_grou"),
        ([ADAPT, "prune.target.parameters=2294912"], "below 2,294,912, what the enlarged mo"),
        ([ADAPT, GOAL, "prune.target.ffn_hidden_size=1024"], "must be below model.ffn_hidden_size"),
        ([ADAPT, GOAL, "prune.target.ffn_hidden_size=70"], "nearest legal values: 64, 72"),
        ([ADAPT, GOAL, "prune.target.hidden_size=64"], "legal values: ffn_hidden_size, num_query_"),
        ([EFFICIENT, GOAL, "prune.target.num_layers=2"], "legal values: ffn_hidden_size, num_quer"),
        ([EFFICIENT, "prune.target.num_layers=2"], "an axis of prune.strategy=efficient_llm"),
    ],
)  # fmt: skip
def test_what_a_method_that_finds_the_shape_cannot_follow_is_refused(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(load(None, overrides), 1)


def test_the_bounds_of_the_parameters_are_legal_up_to_the_enlarged_model() -> None:
    for goal in (636_032, 2_294_911):
        validate(load(None, [ADAPT, f"prune.target.parameters={goal}"]), 1)


def test_the_default_block_is_a_legal_sixteenth_of_the_width() -> None:
    assert Config().goals["ffn_hidden_size"].block == 64
    four = replace(Config(), parallel={"tensor_model_parallel_size": 4})
    assert four.goals["ffn_hidden_size"].block == 64
    assert replace(Config(), prune={"alignment": 48}).goals["ffn_hidden_size"].block == 48
    assert replace(Config(), prune={"alignment": 128}).goals["ffn_hidden_size"].block == 128


def test_the_moving_average_reads_its_coefficient_on_either_term() -> None:
    assert replace(Config(), prune={"ema": 0.3}).prune.history == 0.3
    assert replace(Config(), prune={"ema": 0.3, "ema_on": "new"}).prune.history == 0.7


TEXT_KEYS = (
    "run_dir", "start_from", "data.tokenizer", "data.cache_dir", "logging.wandb",
    "logging.mlflow", "data.train[].prefix", "evaluation.sample_prompts[]", "distill.teacher",
    "law.name",
)  # fmt: skip
TYPED = (
    "12345_1", "0012", "1e3", "12:30:45", "on", "1.10", "null", "~", "0x1F", "2026-11-25", ".inf",
    "a #b", " padded ", "key: value", "${HOME}", "${", "${oc.env:HOME}", "???", "{", "'quoted'",
    "*alias", "&anchor", "!tag", "%", "a=b", "-", "Größe 大", "two\nlines\n", "\x00\x85\u2028",
)  # fmt: skip


def text_of(config: Config, key: str) -> str:
    if key.startswith("data.train"):
        return config.data.train[0].prefix
    if key.startswith("evaluation"):
        return config.evaluation.sample_prompts[0]
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)


def as_yaml(key: str, value: str) -> str:
    """A file that sets one text; ``value`` is written as it stands."""
    names = key.replace("[]", ".[]").split(".")
    marks = ["-" if name == "[]" else f"{name}:" for name in names]
    lines = [f"{' ' * depth}{mark}" for depth, mark in enumerate(marks)]
    return "\n".join(lines) + f" {value}\n"


def test_every_key_that_is_a_text_is_in_the_list() -> None:
    def texts(values: Any, name: str) -> set[str]:
        if isinstance(values, dict):
            return {t for k, v in values.items() for t in texts(v, f"{name}.{k}" if name else k)}
        if isinstance(values, list):
            return texts(values[0], f"{name}[]")
        return {name} if isinstance(values, str) else set()

    lists = {"data.train": "{}", "data.validation": "{}", "evaluation.sample_prompts": "''"}
    lists["prune.order"] = "ffn_hidden_size"
    full = load(None, [f"{key}=[{value}]" for key, value in lists.items()])
    choices = {
        "training.precision", "training.kernel_implementation", "optimizer.lr_scaling",
        "schedule.kind", "schedule.lr_decay_style", "prune.strategy", "prune.element",
        "prune.row_reduce", "prune.matrix_reduce", "prune.aggregation", "prune.ema_on",
        "prune.scope", "prune.placement", "prune.norm_rescale", "prune.update",
        "prune.update_form", "prune.order[]", "prune.moments", "distill.alpha_shape",
        "distill.direction", "distill.keep_hidden", "checkpoint.on_damage", "guard.on_spike",
    }  # fmt: skip
    found = texts(dataclasses.asdict(full), "")
    assert found - choices == {*TEXT_KEYS, "data.validation[].prefix"}


@pytest.mark.parametrize("value", TYPED)
def test_a_text_is_what_was_typed_and_survives_being_saved(value: str, tmp_path: Path) -> None:
    overrides = [f"{key}={value}" for key in TEXT_KEYS if "[]" not in key]
    quoted = json.dumps(value)
    overrides += [f"data.train=[{{prefix: {quoted}}}]", f"evaluation.sample_prompts=[{quoted}]"]
    config = load(None, overrides)
    assert {text_of(config, key) for key in TEXT_KEYS} == {value}
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8")
    assert load(saved) == config


@pytest.mark.parametrize("key", TEXT_KEYS)
@pytest.mark.parametrize(
    "value", ["12345_1", "0012", "1e3", "12:30:45", "on", "1.10", "???", "0o7"]
)
def test_a_text_in_a_file_needs_no_quotes(key: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(as_yaml(key, value))
    assert text_of(load(path), key) == value


@pytest.mark.parametrize("value", ["12345_1", "0012", "1e3", "12:30:45", "on", "1.10"])
def test_a_text_in_a_list_on_the_command_line_needs_no_quotes(value: str) -> None:
    config = load(
        None, [f"data.train=[{{prefix: {value}}}]", f"evaluation.sample_prompts=[{value}, 'a #b']"]
    )
    assert config.data.train[0].prefix == value
    assert config.evaluation.sample_prompts == [value, "a #b"]


def test_nothing_in_a_file_is_a_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "told")
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: ${oc.env:SECRET}\nmodel: {num_layers: '${model.hidden_size}'}\n")
    with pytest.raises(ConfigError, match=r"num_layers is '\$\{model.hidden_size\}'; it must be a"):
        load(path)
    path.write_text("run_dir: ${oc.env:SECRET}\ndata: {tokenizer: '${run_dir}'}\n")
    config = load(path)
    assert (config.run_dir, config.data.tokenizer) == ("${oc.env:SECRET}", "${run_dir}")


@pytest.mark.parametrize(
    ("given", "number"),
    [("010", 10), ("1_000", 1000), ("+5", 5), (" 7 ", 7), ("1e1", 10), ("2.0", 2), ("0008", 8)],
)
def test_numbers_are_decimal_in_overrides_and_files(
    given: str, number: int, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"training: {{seed: {given}}}\nguard: {{spike_increase: {given}}}\n")
    overrides = [f"training.seed={given}", f"guard.spike_increase={given}"]
    for config in (load(path), load(None, overrides)):
        assert config.training.seed == number
        assert config.guard.spike_increase == number


@pytest.mark.parametrize(
    "given", ["12:30", "0x10", "0o17", "0b1", "", "null", "1e400", "٣", "1e9999999999"]
)
def test_what_is_no_decimal_number_is_refused(given: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"training: {{seed: {given}}}\n", encoding="utf-8")
    for arguments in ((path, []), (None, [f"training.seed={given}"])):
        with pytest.raises(ConfigError, match=r"training\.seed is .*; it must be a whole number"):
            load(*arguments)


def test_large_whole_numbers_are_exact() -> None:
    for given in ("9007199254740993", "9.007199254740993e15"):
        assert load(None, [f"training.seed={given}"]).training.seed == 9007199254740993


def test_switches_are_read_as_people_write_them() -> None:
    for given, expected in (("true", True), ("ON", True), ("no", False), ("False", False)):
        config = load(None, [f"logging.progress={given}"])
        assert config.logging.progress is expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.sample_prompts=hello", r"is 'hello'; it must be a list: \[a, b\]"),
        ("evaluation.sample_prompts=[[a]]", r"sample_prompts\[0\] is \['a'\]; it must be a text"),
        ("data.train=[{prefix: a, wieght: 1}]", r"did you mean 'data\.train\[0\]\.weight'"),
        ("data.train=[a]", r"data\.train\[0\] is 'a'; it must be a mapping"),
        ("run_dir.x=1", r"run_dir is \{'x': '1'\}; it must be a text"),
        ("data.train=[{", "cannot read configuration override"),
    ],
)
def test_a_list_or_a_section_in_the_wrong_place_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [override])


def test_a_section_can_be_overridden_at_once() -> None:
    config = load(None, ["prune={ema: 0.3, scope: global}", "prune.ema=0.4"])
    assert (config.prune.ema, config.prune.scope) == (0.4, "global")


@pytest.mark.parametrize(
    "content",
    [
        "run_dir: a\nrun_dir: b\n",  # which of them?
        "run_dir:\n",  # nothing, where a text is wanted
        "- a\n",
        "run_dir: !!python/object/apply:os.system [true]\n",
        "run_dir: !!timestamp 2026-11-25\n",
        "a: &a [x]\n"
        + "".join(f"{n}: &{n} [*{m}, *{m}, *{m}, *{m}]\n" for m, n in pairwise("abcdefghijklmnop"))
        + "model: *p\n",
        "model: &m {<<: [*m, *m]}\n",
        "model: " + "[" * 1000,
        "run_dir: \x07\n",
        "#" * ((1 << 20) + 1),
    ],
    ids=lambda content: content[:20],
)  # fmt: skip
def test_a_hostile_or_ambiguous_file_is_refused_in_a_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("given", "cuda", "reduces", "gathers"),
    [
        ({}, True, True, True),
        ({}, False, False, False),
        ({"use_distributed_optimizer": False}, True, True, False),
        ({"overlap_grad_reduce": False}, True, False, False),
        ({"overlap_param_gather": False}, True, True, False),
        ({"overlap_grad_reduce": True}, False, True, False),
    ],
)
def test_communication_overlaps_where_there_is_cuda_unless_told_otherwise(
    given: dict[str, bool], cuda: bool, reduces: bool, gathers: bool
) -> None:
    parallel = ParallelConfig(**given)
    resolved = parallel.resolved(cuda)
    assert (resolved.overlap_grad_reduce, resolved.overlap_param_gather) == (reduces, gathers)
    assert from_dict({"parallel": given}).parallel == parallel  # what is stored stays undecided


def test_what_is_undecided_is_saved_and_given_as_null(tmp_path: Path) -> None:
    undecided = load(None, ["parallel.overlap_grad_reduce=null"])
    assert undecided.parallel.overlap_grad_reduce is None
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(undecided), encoding="utf-8")
    assert load(saved) == undecided
    assert load(saved, ["parallel.overlap_grad_reduce=on"]).parallel.overlap_grad_reduce is True
