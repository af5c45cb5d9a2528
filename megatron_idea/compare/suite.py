"""What is to be compared: arms, seeds and their runs, read from one YAML file.

    out: runs/laptop            # folder of everything; --out replaces it
    config: ../configs/x.yaml   # a configuration to start from, relative to this file's folder
    base: {model: {...}}        # sections over it
    seeds: [0, 1, 2]
    reference: scratch          # every arm is held against it
    sweep: {schedule.lr: [1e-2, 2e-2]}  # every arm with each value; it is judged at its best
    pairs: [[idea, naive]]      # further ones to hold against each other
    arms:
      scratch: {prune: {strategy: none}, model: {ffn_hidden_size: 48}}
      idea: {}
      one_shot: {from: idea@enlarged, schedule: {removal: one_shot}}
      longer: {equal: flops@idea, prune: {strategy: none}, model: {ffn_hidden_size: 48}}
      taught: {teacher: idea, prune: {strategy: none}, model: {ffn_hidden_size: 48}}

An arm is sections of a configuration and three words more. ``from: ARM@PHASE``, or ``ARM@TOKENS``:
it has that arm's sections under its own and begins at its checkpoint. ``equal: flops@ARM``: its
tokens are as many as take that arm's FLOPs, the teacher's in them; ``flops`` alone means the
reference's. ``teacher: ARM``: it learns from the model that that arm ends with, by the section
``distill``. What does not fit together is refused before anything runs.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_idea import config as configuration
from megatron_idea.config import Config, ConfigError, validate
from megatron_idea.course import (
    TeacherSize,
    flops_between,
    live_at_step,
    num_steps,
    target_shape,
    teacher_flops_between,
)
from megatron_idea.planning.estimate import teacher_size
from megatron_idea.records.read import EVENTS, lines_of
from megatron_idea.records.saved import kept_tokens
from megatron_idea.records.settings import (
    check_may_branch,
    check_own_teacher,
    check_targets,
    differences,
    is_among,
)
from megatron_idea.schedule import PHASES, phase_ends
from megatron_idea.shape import AXES


@dataclass(frozen=True)
class ArmRun:
    """One run of an arm."""

    arm: str
    value: str
    """Of the sweep, as in ``lr=1e-2``; empty without one."""
    seed: int
    config: Config
    """Complete, ``run_dir`` and ``start_from`` included."""
    source: ArmRun | None
    """The run of the same seed and value that it starts from."""
    teacher: ArmRun | None = None
    """The one that it learns from, likewise."""

    @property
    def needs(self) -> list[ArmRun]:
        """List the runs that must have ended before this one begins."""
        return [run for run in (self.source, self.teacher) if run is not None]

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def file(self) -> Path:
        """Its configuration, as ``train`` gets it."""
        return self.run_dir.with_name(f"{self.run_dir.name}.yaml")

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.run_dir.with_name(f"{self.run_dir.name}.log")

    @property
    def key(self) -> str:
        """Its place below the suite's folder: ``idea/seed0``, ``idea/lr=1e-2/seed0``."""
        return "/".join((*filter(None, (self.arm, self.value)), f"seed{self.seed}"))

    @property
    def begins(self) -> int:
        """Consumed tokens at which it leaves its source; 0 without one."""
        if self.source is None:
            return 0
        return _branch_point(self.source.config, self.config.start_from.rpartition("@")[2])

    def __str__(self) -> str:
        return ", ".join((*filter(None, (self.arm, self.value)), f"seed {self.seed}"))


@dataclass(frozen=True)
class Suite:
    """Everything that is to be compared. Made by ``read_suite``."""

    path: Path
    out: Path
    reference: str
    seeds: tuple[int, ...]
    sweep: tuple[str, tuple[str, ...]] | None
    """The key, and its values as they are written."""
    pairs: tuple[tuple[str, str], ...]
    """Arms to hold against each other, left against right."""
    arms: tuple[str, ...]
    runs: tuple[ArmRun, ...]
    """In the order in which they are run: sources before those that start from them."""
    text: str
    """The file as it was read: it may be edited while the runs take their hours."""


@dataclass(frozen=True)
class _Keys:
    """The keys of a suite's file."""

    out: str
    config: str
    base: Config
    seeds: list[int]
    reference: str
    sweep: dict[str, list[str]]
    pairs: list[list[str]]
    arms: dict[str, Any]


@dataclass(frozen=True)
class _Arm:
    """An arm as the file has it."""

    sections: dict[str, Any]
    """Its own."""
    source: str = ""
    at: str = ""
    """Where it leaves its source: a phase, or a number of tokens."""
    equal: str = ""
    """The arm whose FLOPs it gets."""
    teacher: str = ""
    """The arm that it learns from."""

    @property
    def needs(self) -> set[str]:
        return {self.source, self.equal, self.teacher} - {""}


_WORDS = ("from", "equal", "teacher")
"""What an arm has beside sections of a configuration."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*")
_NAMED_ELSEWHERE = {
    "run_dir": "a suite names the folders of its runs: out: FOLDER",
    "start_from": "an arm begins at another one with from: ARM@PHASE",
    "training.seed": "every arm has the suite's: seeds: [0, 1, 2]",
}


def read_suite(
    path: str | Path,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    seeds: Sequence[int | str] | None = None,
) -> Suite:
    """Read a suite and work out its runs.

    Args:
        overrides: ``key.sub=value`` over the base of every arm, under the arms' own sections.
        out: in place of the file's.
        seeds: in place of the file's.
    Raises: ConfigError that says what was given, what is legal and how to mend it.
    """
    path = Path(path)
    given = configuration.read_file(path)
    text = path.read_text("utf-8", errors="replace")
    configuration.reject_unknown(given, _Keys, prefix="")
    given = {key: value for key, value in given.items() if value is not None}
    sweep = _read_sweep(given.get("sweep", {}))
    swept = sweep[0] if sweep else ""
    folder = str(out or _text(given, "out"))
    if not folder:
        raise ConfigError(f"{path} names no folder for its runs; give it out: FOLDER, or --out")
    arms = _read_arms(given.get("arms", {}), _text(given, "reference"), swept)
    base = _read_base(path, given, overrides, swept)
    found = _read_seeds(given.get("seeds", []) if seeds is None else list(seeds))
    made: list[ArmRun] = []
    for seed in found:
        for value in sweep[1] if sweep else ("",):
            under, label = base, ""
            if value:
                under = configuration.merge(base, configuration.read_override(f"{swept}={value}"))
                label = f"{swept.rpartition('.')[2]}={value}"
            made += _make_runs(arms, under, label, seed, Path(folder))
    _check_runs(made)
    reference = _text(given, "reference")
    return Suite(
        path, Path(folder), reference, found, sweep,
        tuple(_read_pairs(given.get("pairs", []), arms, reference)), tuple(arms), tuple(made), text,
    )  # fmt: skip


def flops(run: ArmRun, start: int, end: int) -> int | None:
    """FLOPs of a run from ``start`` to ``end`` consumed tokens, teacher included.

    What lies before the point where it left its source was done by that one. Returns: None where
    a teacher is asked whose size is not known.
    """
    done = _flops(run.config, run.teacher, max(start, run.begins), end)
    if run.source is None or start >= run.begins:
        return done
    before = flops(run.source, start, min(end, run.begins))
    return None if done is None or before is None else before + done


def end_of(config: Config) -> int:
    """Consumed tokens after a run's last step."""
    return num_steps(config) * config.batch_tokens


def check_ready(suite: Suite, processes: int | None = None) -> None:
    """Make sure that every run can start, or go on: its data, its folder, its past, its layout.

    Args:
        processes: of each run; None: TP x PP.
    Raises: ConfigError.
    """
    for run in suite.runs:
        if processes is not None:
            _named(run, lambda config: validate(config, processes))
        _named(run, _check_data)
        _named(run, _check_folder)
        _check_past(run)
        _named(run, lambda _, run=run: _check_point(run))


# ---- the file's keys


def _text(given: Mapping[str, Any], key: str) -> str:
    return str(configuration.read_value(given.get(key, ""), str, key))


def _read_seeds(given: Any) -> tuple[int, ...]:
    seeds = configuration.read_value(given, list[int], "seeds")
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"seeds is {seeds}; it must list at least one whole number, none below 0, none twice: "
            "seeds: [0, 1, 2]"
        )
    return tuple(seeds)


def _read_sweep(given: Any) -> tuple[str, tuple[str, ...]] | None:
    if not given:
        return None
    if not isinstance(given, dict) or len(given) != 1:
        raise ConfigError(
            "sweep must be one key and its values: sweep: {schedule.lr: [1e-3, 2e-3]}"
        )
    ((key, values),) = given.items()
    if isinstance(values, list):
        values = ["null" if value is None else value for value in values]
    values = configuration.read_value(values, list[str], f"sweep.{key}")
    if len(set(values)) < 2 or len(set(values)) < len(values):
        raise ConfigError(
            f"sweep.{key} is {values}; it must list at least two values, none twice; a single one "
            "belongs into base"
        )
    for value in values:
        over = configuration.read_override(f"{key}={value}")
        configuration.reject_unknown(over, Config, prefix="sweep.")
        _check_name(f"a value of sweep.{key}", value)
    _refuse_named_elsewhere(over, "sweep", "")
    return key, tuple(values)


def _read_base(
    path: Path, given: Mapping[str, Any], overrides: Sequence[str], swept: str
) -> dict[str, Any]:
    """What is under the sections of every arm."""
    file, base = _text(given, "config"), given.get("base", {})
    layers: dict[str, Any] = {}
    if file:
        layers = configuration.read_file(path.parent / file)
        configuration.reject_unknown(layers, Config, prefix="")
        if layers.get("start_from"):
            raise ConfigError(f"{file} has start_from; {_NAMED_ELSEWHERE['start_from']}")
    _refuse_named_elsewhere(base, "base", swept)
    layers = configuration.merge(layers, base)
    for text in overrides:
        over = configuration.read_override(text)
        configuration.reject_unknown(over, Config, prefix="")
        _refuse_named_elsewhere(over, f"override {text!r}", swept)
        layers = configuration.merge(layers, over)
    return layers


def _read_arms(given: Any, reference: str, swept: str) -> dict[str, _Arm]:
    """Read the arms, in the order of the file. Raises: ConfigError."""
    if not isinstance(given, dict) or not given:
        raise ConfigError("a suite needs arms: a name and sections of a configuration for each")
    for name in given:
        _check_name("the name of an arm", name)
    _require_arm(reference, given, "reference")
    arms: dict[str, _Arm] = {}
    for name, arm in given.items():
        arm = {} if arm is None else arm
        if not isinstance(arm, dict):
            raise ConfigError(f"arms.{name} must be sections of a configuration; {{}} changes none")
        arms[name] = _read_arm(name, arm, given, reference)
        _refuse_named_elsewhere(arms[name].sections, f"arms.{name}", swept)
    for name, read in arms.items():
        if read.equal and arms[read.equal].equal:
            raise ConfigError(
                f"arms.{name}.equal names {read.equal!r}, whose tokens follow from another arm "
                f"themselves; name that one: equal: flops@{arms[read.equal].equal}"
            )
    return arms


def _read_arm(name: str, given: dict[str, Any], arms: Mapping[str, Any], reference: str) -> _Arm:
    configuration.reject_unknown(given, Config, prefix=f"arms.{name}.", also=_WORDS)
    sections = {key: value for key, value in given.items() if key not in _WORDS}
    words = {key: given[key] for key in _WORDS if given.get(key) is not None}
    teacher = _text(words, "teacher")
    if teacher:
        _require_arm(teacher, arms, f"arms.{name}.teacher")
        _refuse(sections, {"distill.teacher": f"its teacher is {teacher}"}, f"arms.{name}")
    if "from" in words and "equal" in words:
        raise ConfigError(
            f"arms.{name} has both from and equal: one that starts from another arm has its "
            "tokens already; leave one of the two out"
        )
    if "from" in words:
        where = f"arms.{name}.from"
        source, _, at = _text(words, "from").rpartition("@")
        tokens = configuration.whole_number(at)
        if not source or (at not in PHASES and (tokens is None or tokens <= 0)):
            raise ConfigError(
                f"{where} is {words['from']!r}; it must be ARM@PHASE or ARM@TOKENS, as in "
                f"idea@enlarged or idea@2e6 (phases: {', '.join(PHASES)})"
            )
        _require_arm(source, arms, where)
        return _Arm(sections, source, at, teacher=teacher)
    if "equal" in words:
        where = f"arms.{name}.equal"
        what, at_sign, other = _text(words, "equal").partition("@")
        other = other if at_sign else reference
        if what != "flops" or not other:
            raise ConfigError(
                f"{where} is {words['equal']!r}; it must be flops, of the reference, or flops@ARM"
            )
        _require_arm(other, arms, where)
        if other == name:
            raise ConfigError(f"{where} names the arm itself; name another: flops@ARM")
        return _Arm(sections, equal=other, teacher=teacher)
    return _Arm(sections, teacher=teacher)


def _read_pairs(given: Any, arms: Mapping[str, _Arm], reference: str) -> Iterator[tuple[str, str]]:
    """Every arm against the reference, FLOPs made equal, then those of the file; none twice."""
    pairs = [(name, reference) for name in arms if name != reference]
    pairs += [(arm.equal, name) for name, arm in arms.items() if arm.equal]
    for pair in configuration.read_value(given, list[list[str]], "pairs"):
        for name in pair:
            _require_arm(name, arms, "pairs")
        if len(set(pair)) != 2 or len(pair) != 2:
            raise ConfigError(f"pairs has {pair}; a pair is two different arms: [idea, naive]")
        pairs.append((pair[0], pair[1]))
    seen: set[frozenset[str]] = set()
    for pair in pairs:
        if frozenset(pair) not in seen:
            seen.add(frozenset(pair))
            yield pair


def _require_arm(name: str, arms: Mapping[str, Any], where: str) -> None:
    if name not in arms:
        near = difflib.get_close_matches(name, arms, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}?" if name else ";"
        raise ConfigError(f"{where} is {name!r}{hint} arms: {', '.join(map(str, arms))}")


def _check_name(what: str, name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what} is {name!r}, and becomes a folder's: it may have letters, digits and any of "
            "_.+=-, and begins with a letter, a digit or _"
        )


def _refuse_named_elsewhere(sections: dict[str, Any], where: str, swept: str) -> None:
    """Raise ConfigError for a key that the suite itself decides."""
    every_value = {swept: "every value of sweep would replace it"} if swept else {}
    _refuse(sections, _NAMED_ELSEWHERE | every_value, where)


def _refuse(sections: dict[str, Any], keys: Mapping[str, str], where: str) -> None:
    """Raise ConfigError for the first of ``keys`` that is set, with what is said of it."""
    for key, instead in keys.items():
        *parents, last = key.split(".")
        found: Any = sections
        for name in parents:
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(found, dict) and last in found:  # null is a value, too
            raise ConfigError(f"{where} sets {key}, which it cannot; {instead}")


def _in_order(arms: Mapping[str, _Arm]) -> list[str]:
    """Names in the file's order, but for those that need another arm first. Raises: ConfigError."""
    order: list[str] = []
    while len(order) < len(arms):
        ready = [
            name for name, arm in arms.items()
            if name not in order and arm.needs <= {*order}
        ]  # fmt: skip
        if not ready:
            left = ", ".join(name for name in arms if name not in order)
            raise ConfigError(
                f"arms need each other in a circle, by from, equal or teacher: {left}; one of them "
                "must stand alone"
            )
        order.append(ready[0])
    return order


# ---- runs


def _make_runs(
    arms: Mapping[str, _Arm], base: dict[str, Any], value: str, seed: int, out: Path
) -> Iterator[ArmRun]:
    """Complete the configurations of one seed and value. Raises: ConfigError that names the arm."""
    made: dict[str, ArmRun] = {}
    sections: dict[str, dict[str, Any]] = {"": base}
    for name in _in_order(arms):
        arm = arms[name]
        try:
            source = made.get(arm.source)
            teacher = made.get(arm.teacher) or (source.teacher if source else None)
            sections[name] = configuration.merge(sections[arm.source], arm.sections)
            if arm.teacher and teacher is not None:
                over = {"distill": {"teacher": teacher.config.run_dir}}
                sections[name] = configuration.merge(sections[name], over)
            if arm.equal:
                config = configuration.from_dict(sections[name])
                total = _tokens_for(config, teacher, made[arm.equal])
                over = {"schedule": {"total_tokens": total}}
                sections[name] = configuration.merge(sections[name], over)
            run_dir = out.joinpath(*filter(None, (name, value)), f"seed{seed}")
            own = {"run_dir": str(run_dir), "training": {"seed": seed}}
            if source is not None:
                own["start_from"] = f"{source.config.run_dir}@{arm.at}"
            config = configuration.from_dict(configuration.merge(sections[name], own))
            if teacher is not None and config.distill.teacher != teacher.config.run_dir:
                teacher = None  # its source's, and this one has another
            config = _keep_checkpoints(config, [a.at for a in arms.values() if a.source == name])
        except ConfigError as error:
            raise ConfigError(f"arm {', '.join(filter(None, (name, value)))}: {error}") from error
        made[name] = ArmRun(name, value, seed, config, source, teacher)
        yield made[name]


def _keep_checkpoints(config: Config, wanted: Sequence[str]) -> Config:
    """Have a run keep the checkpoints that others begin at, each a phase or a number of tokens.

    Raises: ConfigError when it would have to save after every step for that.
    """
    if not wanted:
        return config
    keep: dict[str, Any] = {"keep_phase_ends": True}
    tokens = [configuration.whole_number(at) or 0 for at in wanted if at not in PHASES]
    if tokens:  # the first checkpoint at or after each multiple is one after its very step
        for key in ("every_tokens", "keep_every_tokens"):
            every = getattr(config.checkpoint, key)
            keep[key] = math.gcd(every, *tokens)
            if keep[key] < config.batch_tokens and keep[key] != every:
                points = " and ".join(f"{one:,}" for one in tokens)
                raise ConfigError(
                    f"others begin after {points} of its tokens, and checkpoint.{key} is "
                    f"{every:,}: both are multiples of no more than {keep[key]:,}, so that every "
                    "step would be saved; let one divide the other"
                )
    return configuration.replace(config, checkpoint=keep)


def _tokens_for(config: Config, teacher: ArmRun | None, like: ArmRun) -> int:
    """Tokens with which a run from the seed takes the FLOPs of ``like``, in whole batches."""
    wanted, batch = flops(like, 0, end_of(like.config)), config.batch_tokens
    # FLOPs are not quite in proportion: compactions come after whole steps.
    for _ in range(3):
        own = _flops(config, teacher, 0, end_of(config))
        if wanted is None or own is None:
            raise ConfigError("equal: flops needs the size of distill.teacher, which is not there")
        tokens = max(1, round(end_of(config) * wanted / own / batch)) * batch
        config = configuration.replace(config, schedule={"total_tokens": tokens})
    return tokens


def _flops(config: Config, teacher: ArmRun | None, start: int, end: int) -> int | None:
    if end <= start:
        return 0
    if teacher is None:
        size = teacher_size(config)
    else:  # it need not be there yet
        size = TeacherSize(teacher.config.model, target_shape(teacher.config))
    taught = teacher_flops_between(config, start, end, size)
    return None if taught is None else flops_between(config, start, end) + taught


def _branch_point(source: Config, at: str) -> int:
    """Consumed tokens of the checkpoint that ``RUN@at`` means: after a whole step."""
    tokens = phase_ends(source.schedule).get(at) or configuration.whole_number(at) or 0
    return -(-tokens // source.batch_tokens) * source.batch_tokens


def _check_runs(runs: Sequence[ArmRun]) -> None:
    """Make sure that every configuration is legal. Raises: ConfigError that names the arm."""
    first = [run for run in runs if run.seed == runs[0].seed]  # seeds change nothing of it
    for run in first:
        _named(run, lambda config: validate(config, config.parallel.model_parallel_size))
        if run.source is not None:
            _named(run, lambda config, run=run: _check_branch(config, run))
    same = [run for run in first if run.arm == first[0].arm]
    for index, run in enumerate(same):
        for other in same[:index]:
            if configuration.replace(run.config, run_dir=other.config.run_dir) == other.config:
                raise ConfigError(f"sweep has one value twice: {other.value} and {run.value}")


def _check_branch(config: Config, run: ArmRun) -> None:
    assert run.source is not None
    source, arm = run.source.config, run.source.arm
    name = f"from: {arm}@{config.start_from.rpartition('@')[2]}"
    last = min(end_of(source), end_of(config) - config.batch_tokens)
    if not 0 < run.begins <= last:
        raise ConfigError(
            f"{name} is after {run.begins:,} tokens; {arm} has {end_of(source):,}, and "
            f"this arm {end_of(config):,}: between 0 and {last:,} there is something left to train"
        )
    if run.begins <= run.source.begins:
        raise ConfigError(
            f"{name} is after {run.begins:,} tokens, and {arm} itself begins at "
            f"{run.source.source}, after {run.source.begins:,}: begin at that one, or later"
        )
    check_may_branch(source, config)
    check_own_teacher(source, config, run.begins, name)
    if source.parameter_goal is None:  # else which shape it has then is known when it has it
        full = {axis: getattr(source.model, axis) for axis in AXES}
        live = full | _live(run.source, run.begins)
        check_targets(config, {axis: [count] for axis, count in live.items()}, name)


def _live(run: ArmRun, tokens: int) -> dict[str, int]:
    """Count the units alive in a run after ``tokens``, by axis, as planned; its source's, too."""
    live = live_at_step(run.config, tokens // run.config.batch_tokens)
    if run.source is not None:
        for axis, count in _live(run.source, run.begins).items():
            live[axis] = min(live.get(axis, count), count)
    return live


def _named(run: ArmRun, check: Callable[[Config], None]) -> None:
    """Check a run's configuration; an error names the run."""
    try:
        check(run.config)
    except ConfigError as error:
        raise ConfigError(f"arm {run}: {error}") from error


# ---- what lies on the disk

_FREE = (
    "run_dir", "logging", "parallel", "parallel_after_prune", "nodes_after_prune", "checkpoint",
    "data.cache_dir", "law", "training.micro_batch_size",
)  # fmt: skip
"""What may differ from a run that has begun."""


def _check_data(config: Config) -> None:
    for section in ("train", "validation"):
        blend = getattr(config.data, section)
        if not blend:
            raise ConfigError(f"data.{section} is empty: name at least one indexed dataset")
        for entry in blend:
            missing = [end for end in (".idx", ".bin") if not Path(entry.prefix + end).is_file()]
            if missing:
                prefix = re.sub("_(train|heldout)$", "", entry.prefix)
                raise ConfigError(
                    f"there is no {entry.prefix}{missing[0]}, which data.{section} names; make it: "
                    f"megatron-idea tokenize TEXT... --out {prefix} "
                    f"--tokenizer {config.data.tokenizer}"
                )


def _check_folder(config: Config) -> None:
    """Make sure that what was begun in the run's folder is this run."""
    file = Path(config.run_dir) / "config.yaml"
    if not file.is_file():
        return
    begun = configuration.load(file)
    differing = [
        f"{key} (was {was!r}, is {now!r})"
        for key, was, now in differences(begun, config)
        if not is_among(key, _FREE)
    ]
    if differing:
        raise ConfigError(
            f"{config.run_dir} was begun with other settings: {', '.join(differing)}; delete that "
            "folder, or give another --out"
        )


def _check_past(run: ArmRun) -> None:
    """Make sure that what a run began at or learns from has not been made anew since it began."""
    began = _began(run)
    if began is None:
        return
    for needed in run.needs:
        there = _began(needed)
        if there is None or there > began:
            which = "is there now" if there else "is still to be made"
            raise ConfigError(
                f"arm {run}: {run.run_dir} came of another {needed} than the one that {which}; "
                "delete that folder, or give another --out"
            )


def _check_point(run: ArmRun) -> None:
    """Make sure that the checkpoint that a run is to begin at is there, or still to come."""
    source = run.source
    if source is None or kept_tokens(run.run_dir):
        return
    kept = kept_tokens(source.run_dir)
    if kept and kept[-1] >= run.begins and run.begins not in kept:
        raise ConfigError(
            f"it begins after {run.begins:,} tokens of {source}, which is past them and has kept "
            f"checkpoints at {', '.join(f'{tokens:,}' for tokens in kept)} alone: delete "
            f"{source.run_dir}, to have it trained again, or give another --out"
        )


def _began(run: ArmRun) -> float | None:
    """Return the time of a run's first event, in seconds since 1970; None if there is none."""
    events = lines_of(run.run_dir, EVENTS, broken=[])
    return next((event["time"] for event in events if "time" in event), None)
