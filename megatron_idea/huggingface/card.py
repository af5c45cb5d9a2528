"""The model card of an export: what the model is, how it was made, what was measured of it.

Figures are the run's own, of the exported step. Names and words may come from strangers' files: the
front matter goes through a YAML writer, and what stands in the text is made plain.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_idea import __version__, checkpoint, files
from megatron_idea.checkpoint.state import TrainState
from megatron_idea.config import METHODS, Config, PruneConfig
from megatron_idea.course import removed_at
from megatron_idea.records.read import read_events
from megatron_idea.schedule import learning_rate, lr_curves, phase
from megatron_idea.shape import AXES, Shape

_MOST_README_BYTES = 1 << 20
_MOST_WORD = 200


@dataclass(frozen=True)
class Origin:
    """The model that a run began with; every word is empty where it is not known."""

    base_model: str = ""
    """Its name on the Hub, or its folder's."""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    cut: str = ""
    """What ``compact`` chose and cut out on disk: by what, and to which sizes."""

    @staticmethod
    def of_folder(folder: Path) -> Origin:
        """Read what a Hugging Face folder says of itself; never an error."""
        said = _front_matter(folder)
        words = {key: _word(said.get(key)) for key in ("license", "license_name", "license_link")}
        if not words["license_link"].startswith("https://"):
            words["license_link"] = ""  # a file of that folder
        return Origin(_word(_name_of(folder.resolve())), **words)

    @staticmethod
    def of_run(run_dir: Path) -> Origin:
        """Read what ``save`` left in a run folder; of a run that was not imported, nothing."""
        try:
            said = files.read_json(run_dir / checkpoint.ORIGIN)
        except files.UnsafeFileError:
            return Origin()
        return Origin(**{key: _word(said.get(key)) for key in asdict(Origin())})

    def save(self, run_dir: Path) -> None:
        """Write it into a run folder, where ``branch`` and ``compact`` take it along."""
        (run_dir / checkpoint.ORIGIN).write_text(json.dumps(asdict(self), indent=2) + "\n")


def _name_of(folder: Path) -> str:
    """Return a model's name on the Hub, where the folder lies in its cache; else the folder's."""
    of_cache = folder.parent.parent.name
    if folder.parent.name == "snapshots" and of_cache.startswith("models--"):
        return of_cache.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def _front_matter(folder: Path) -> dict[str, Any]:
    """Read the YAML at the head of a folder's README.md; empty where there is none to be read."""
    try:
        text = files.read_bytes(files.inside(folder, "README.md"), _MOST_README_BYTES)
        found = re.match(rb"---\r?\n(.*?)\r?\n---\s", text, re.DOTALL)
        if found is None:
            return {}
        files.check_yaml_text(found[1], "README.md")
        said = yaml.safe_load(found[1])
    except (files.UnsafeFileError, yaml.YAMLError, UnicodeError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _word(value: Any) -> str:
    """Return a short, printable text, or an empty one in place of anything else."""
    is_word = isinstance(value, str) and value.isprintable() and len(value) <= _MOST_WORD
    return value.strip() if is_word else ""


@dataclass(frozen=True)
class HeldOut:
    """A held-out loss that a run has measured of the exported weights."""

    loss: float
    """Nats per token."""
    data: str
    """Names of the datasets, without their folders."""
    tokens: int | None
    """Scored; None where an older version did not write it down."""

    @staticmethod
    def of_run(run_dir: Path, config: Config, state: TrainState) -> HeldOut | None:
        """Find what a run has measured at the step of ``state``; None if nothing."""
        found = [
            event
            for event in read_events(run_dir, broken=[])
            if event["kind"] == "evaluated"
            and (event.get("step"), event.get("tokens")) == (state.step, state.consumed_tokens)
            and files.is_number(event.get("val_loss"))
            # Before and after a compaction: of weights that the checkpoint may not have.
            and not str(event.get("why", "")).startswith("compaction")
        ]
        if not found or not config.data.validation:
            return None
        names = [_line(Path(entry.prefix).name) for entry in config.data.validation]
        return HeldOut(found[-1]["val_loss"], ", ".join(names), found[-1].get("scored_tokens"))


@dataclass(frozen=True)
class Facts:
    """What a card is about, besides the run's configuration and state."""

    about: str
    layout: str
    dtype: str
    full: Shape
    """When training began."""
    live: Shape
    shape: Shape
    """In the folder."""
    parameters: int
    """In the folder."""
    digest: str
    """SHA-256 of ``pruning.json``."""
    origin: Origin
    held_out: HeldOut | None
    has_chat_template: bool


def what_it_is(config: Config, state: TrainState, full: Shape, live: Shape, origin: Origin) -> str:
    """Say in a sentence whether, when and how a checkpoint was pruned."""
    tokens, schedule = state.consumed_tokens, config.schedule
    ways = []
    if removed_at(config, tokens) > 0:
        curves = ("one learning-rate curve", "two learning-rate curves, one after the other")
        ways.append(f"while it trained, under {curves[len(lr_curves(schedule)) - 1]}")
    if origin.cut:
        ways.append(f"on disk, by {origin.cut}")
    if not ways and live != full and tokens:  # by the run that this one has branched from
        ways.append("while it trained")
    if ways:
        return f"A GPT that was pruned {', and '.join(ways)}."
    yet = " yet" if config.goals and tokens < schedule.total_tokens else ""
    return f"A GPT from which nothing has been removed{yet}."


def model_card(config: Config, state: TrainState, facts: Facts) -> str:
    """Return the text of ``README.md``."""
    name = _line(Path(config.run_dir).name)
    head = yaml.safe_dump(
        _head(config, state, facts, name), sort_keys=False, allow_unicode=True, width=1000
    )
    lines = [
        "---",
        head.rstrip("\n"),
        "---",
        "",
        f"# {plain(name)}",
        "",
        f"{facts.about} Exported by megatron-idea {__version__}, layout `{facts.layout}`, "
        f"{facts.dtype}.",
        "",
        *_sizes(config, facts),
        "",
        "What the folder has beyond what lives is zeros, which change no logit.",
        "",
        *_made(config, state, facts),
        "",
        "`pruning.json` lists the units that are left, by their numbers in the enlarged model; "
        "those of layers in the order of the layers that are left.",
        "",
    ]
    if facts.held_out is not None:
        lines += _measured(config, state, facts.held_out)
    if facts.has_chat_template:
        lines += ["The chat template is the tokenizer's; training did not use it.", ""]
    if facts.layout == "compact":
        lines += [
            "The layers differ in size, as `block_configs` in `config.json` say. "
            "`transformers` has no model class for that.",
            "",
        ]
    return "\n".join(lines + _to_fill_in(facts.origin))


def _head(config: Config, state: TrainState, facts: Facts, name: str) -> dict[str, Any]:
    words = ("license", "license_name", "license_link", "base_model")
    origin = {key: value for key in words if (value := getattr(facts.origin, key))}
    head = origin | {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megatron-idea", *(["pruned"] if facts.live != facts.full else [])],
    }
    if facts.held_out is None:
        return head
    found = facts.held_out
    where = {"step": state.step, "consumed_tokens": state.consumed_tokens}
    if found.tokens is not None:
        where["scored_tokens"] = found.tokens
    metrics = [{"type": "loss", "name": "held-out loss, nats per token", "value": found.loss}]
    if found.loss < 700:  # e to the power of more is no number
        perplexity = round(math.exp(found.loss), 4)
        metrics.append({"type": "perplexity", "name": "perplexity per token", "value": perplexity})
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"type": "indexed-dataset", "name": _line(found.data), "args": where},
        "metrics": metrics,
    }
    return head | {"model-index": [{"name": name, "results": [result]}]}


def _sizes(config: Config, facts: Facts) -> list[str]:
    model, shapes = config.model, (facts.full, facts.live, facts.shape)
    lines = ["| | when training began | now | in this folder |", "|---|---|---|---|"]
    for axis in AXES:
        counts = (of.counts(axis) for of in shapes)
        lines.append(f"| {axis} | {' | '.join(map(_brief, counts))} |")
    lines.append(
        f"| parameters | {facts.full.parameters(model).total:,} "
        f"| {facts.live.parameters(model).total:,} | {facts.parameters:,} |"
    )
    return lines


def _made(config: Config, state: TrainState, facts: Facts) -> list[str]:
    schedule, prune, model = config.schedule, config.prune, config.model
    tokens, total = state.consumed_tokens, schedule.total_tokens
    # With a number of parameters the goals' targets are only a forecast.
    goals = {axis: goal.target for axis, goal in config.goals.items()}
    if config.parameter_goal is not None:
        goals = {"parameters": config.parameter_goal}
    target = ", ".join(f"{name} {count:,}" for name, count in goals.items())
    heads_per_group = model.num_attention_heads // model.num_query_groups
    lines = [
        "| | |",
        "|---|---|",
        f"| head size, query heads for each KV group | {model.kv_channels}, {heads_per_group} |",
        f"| vocabulary | {model.vocab_size:,} |",
        f"| sequence length in training | {config.training.seq_length:,} |",
        f"| trained tokens | {tokens:,} of {total:,} ({phase(schedule, max(tokens, 1))} phase), "
        f"step {state.step:,} |",
        f"| schedule | {schedule.kind}, {schedule.lr_decay_style}, lr {schedule.lr:g} to "
        f"{learning_rate(schedule, total):g}, phases "
        f"{schedule.enlarged_fraction:g} / {schedule.prune_fraction:g} / "
        f"{schedule.recover_fraction:g}, removal {config.removal} |",
        f"| pruning | {_pruning(prune, target)} |",
        f"| who is left | SHA-256 of `pruning.json`: {facts.digest} |",
    ]
    if config.distill.teaches:
        taught = config.distill
        which = f", SHA-256 of its manifest {plain(state.teacher)}" if state.teacher else ""
        lines.append(
            f"| distillation | teacher {plain(taught.teacher)}{which}, {taught.direction} KL at "
            f"temperature {taught.temperature:g}, alpha {taught.alpha:g} to {taught.alpha_end:g} |"
        )
    if facts.origin.base_model:
        lines.append(f"| began with | {plain(facts.origin.base_model)} |")
    return lines


def _measured(config: Config, state: TrainState, found: HeldOut) -> list[str]:
    scored = "" if found.tokens is None else f" over {found.tokens:,} tokens"
    return [
        f"Held-out loss {found.loss:.4f} nats per token{scored} of {plain(found.data)}, in "
        f"sequences of {config.training.seq_length:,}, measured by the run itself at step "
        f"{state.step:,}, after {state.consumed_tokens:,} trained tokens, in its own precision "
        f"({config.training.precision}).",
        "",
    ]


def _to_fill_in(origin: Origin) -> list[str]:
    asked = []
    if not origin.license:
        asked.append("`license` is not known")
    if origin.base_model and "/" not in origin.base_model:
        asked.append("`base_model` is the name of a folder: give its name on the Hub")
    if not asked:
        return []
    return [f"To fill in above before this is published: {'; '.join(asked)}.", ""]


def _pruning(prune: PruneConfig, target: str) -> str:
    """Say what was pruned by what, without keys that the method has no use for."""
    if prune.strategy == "none":
        return "none"
    said = {
        "element": f"element {prune.element}",
        "row_reduce": f"rows {prune.row_reduce}",
        "matrix_reduce": f"matrices {prune.matrix_reduce}",
    }
    fixed = METHODS[prune.strategy].fixed
    parts = [f"strategy {prune.strategy}", f"target {target or 'none'}"]
    parts += [text for name, text in said.items() if name not in fixed]
    return ", ".join([*parts, f"ema {prune.ema:g} on {prune.ema_on}", f"scope {prune.scope}"])


def plain(text: str) -> str:
    """Return a name so that Markdown shows it: one short line, without markup, HTML or cells."""
    return re.sub(r"([\\`*<>\[\]|#&~])", r"\\\1", _line(text))


def _line(text: str) -> str:
    """Return a text as one short line of what can be printed."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:_MOST_WORD]


def _brief(counts: Sequence[int]) -> str:
    return ", ".join(f"{count:,}" for count in (counts if len(set(counts)) > 1 else counts[:1]))
