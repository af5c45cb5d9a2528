"""Which of the paper's signs show in runs of minutes? Ways to a small model, over equal tokens.

    python -W ignore benchmarks/signs.py [--steps 3000] [--seeds 0 1 2] [--arms NAME ...]

Every arm is a run of the engine: the same micro model on the same samples in the same order for a
seed, checked before anything is trained. Differences are taken within seeds. In the naive arms
only the learning rate restarts: Adam's moments are kept, which a pipeline of two jobs would drop.
An interrupted call resumes; a finished run is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_idea import config as configuration
from megatron_idea.config import Config
from megatron_idea.course import flops_between, num_steps
from megatron_idea.data.corpus import build_corpus
from megatron_idea.data.indexed import check_dataset, tokenize
from megatron_idea.data.of_run import open_batches
from megatron_idea.data.tokenizer import load_tokenizer
from megatron_idea.engine.core_versions import quiet
from megatron_idea.engine.distributed import joined
from megatron_idea.evaluation.held_out import evaluate_checkpoint
from megatron_idea.report.cost import cost
from megatron_idea.report.run import Run, read_run
from megatron_idea.schedule import removal_window
from megatron_idea.train import train

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves a script's folder out

import measure

TARGET, ENLARGED = 96, 256
FINAL_SAMPLES = 2048
"""Held-out sequences for the loss at the end of a run."""
CURVE_SAMPLES = 64
"""Held-out sequences, some of the former, for the curve through the removal."""
SPIKE_RATIO = 4.0


@dataclass(frozen=True)
class Arm:
    """One way to train; ``lr``, ``schedule`` and ``averaged`` are what it changes in IDEA Prune."""

    width: int
    """FFN width at the start; the arm prunes if it is the enlarged one and ``prunes``."""
    prunes: bool
    enlarged: float = 0.5
    """Share of the tokens before pruning; the prune phase is 0.3 of the rest."""
    schedule: dict[str, Any] = field(default_factory=dict)
    averaged: bool = False
    """The one removal is ranked by all of the prune warm-up: averages over half of it are what the
    moving average gets. Else it is ranked by the last two or three steps, as every gradual one."""
    lr: float = 1e-2
    """Peak learning rate; the last one is a two-hundredth of it."""
    equal_compute: bool = False
    """Over so many tokens that its FLOPs are those of the arm ``idea``."""


NAIVE = {"kind": "restarted"}
ONE_SHOT = {"removal": "one_shot"}
ARMS = {
    "scratch": Arm(TARGET, prunes=False),
    "idea": Arm(ENLARGED, prunes=True),
    "idea-one-shot": Arm(ENLARGED, prunes=True, schedule=ONE_SHOT),
    "idea-one-shot-averaged": Arm(ENLARGED, prunes=True, schedule=ONE_SHOT, averaged=True),
    "naive-one-shot": Arm(ENLARGED, prunes=True, schedule=NAIVE | ONE_SHOT),
    "naive-gradual": Arm(ENLARGED, prunes=True, schedule=NAIVE),
    "idea-early": Arm(ENLARGED, prunes=True, enlarged=0.3),
    "enlarged": Arm(ENLARGED, prunes=False),
    "scratch-equal-compute": Arm(TARGET, prunes=False, equal_compute=True),
    "scratch-half-lr": Arm(TARGET, prunes=False, lr=5e-3),
    "scratch-twice-lr": Arm(TARGET, prunes=False, lr=2e-2),
    "idea-half-lr": Arm(ENLARGED, prunes=True, lr=5e-3),
    "idea-twice-lr": Arm(ENLARGED, prunes=True, lr=2e-2),
    "naive-one-shot-half-lr": Arm(ENLARGED, prunes=True, schedule=NAIVE | ONE_SHOT, lr=5e-3),
    "naive-one-shot-twice-lr": Arm(ENLARGED, prunes=True, schedule=NAIVE | ONE_SHOT, lr=2e-2),
}


@dataclass(frozen=True)
class Sign:
    """A comparison of two arms and what the paper lets expect of it."""

    left: str
    right: str
    expected: str = ""
    """``<`` or ``>``: how the left arm's loss compares; ``spike``: the left one's loss rises at
    least SPIKE_RATIO times as far; empty: nothing, the figure is only reported."""


SIGNS = (
    Sign("naive-one-shot", "scratch", ">"),
    Sign("idea", "naive-one-shot", "<"),
    Sign("idea", "naive-gradual", "<"),
    Sign("idea-one-shot", "idea", "spike"),
    Sign("idea-one-shot-averaged", "idea", "spike"),
    Sign("idea", "scratch", "<"),
    # The same at half and at twice the learning rate.
    Sign("naive-one-shot-half-lr", "scratch-half-lr", ">"),
    Sign("naive-one-shot-twice-lr", "scratch-twice-lr", ">"),
    Sign("idea-half-lr", "naive-one-shot-half-lr", "<"),
    Sign("idea-twice-lr", "naive-one-shot-twice-lr", "<"),
    Sign("idea-half-lr", "scratch-half-lr", "<"),
    Sign("idea-twice-lr", "scratch-twice-lr", "<"),
    Sign("idea-twice-lr", "scratch"),
    Sign("idea-early", "scratch"),
    Sign("idea", "idea-one-shot"),
    Sign("idea", "scratch-equal-compute"),
    Sign("enlarged", "scratch"),
)


# ----------------------------------------------------------------------------------- one run


def arm_config(name: str, seed: int, steps: int, data: str, out: Path) -> Config:
    """The run of an arm: everything but the arm itself is the same for all of them.

    The held-out loss is measured every ``steps`` / 300 steps, right after the step that ends a
    prune warm-up too: there a one-shot removal is at its worst.
    """
    arm = ARMS[name]
    batch = 8 * 128
    every = max(1, steps // 300)
    warmup_steps = 2 * every + -round(steps * arm.enlarged) % every
    prune = 0.3 * (1 - arm.enlarged)
    if arm.equal_compute:
        ours, plain = (
            flops_between(c, 0, c.schedule.total_tokens)
            for c in (arm_config(n, seed, steps, data, out) for n in ("idea", "scratch"))
        )
        steps = round(steps * ours / plain)
    return configuration.from_dict(
        {
            "run_dir": str(out / f"seed{seed}" / name),
            "model": {
                "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": arm.width,
                "num_attention_heads": 2, "num_query_groups": 1, "kv_channels": 16,
                "vocab_size": 264, "qk_layernorm": True,
            },
            "data": {
                "train": [{"prefix": f"{data}_train"}],
                "validation": [{"prefix": f"{data}_heldout"}],
                "cache_dir": str(out / "cache"),
            },
            "training": {"seq_length": 128, "micro_batch_size": 8, "global_batch_size": 8,
                         "seed": seed},
            "schedule": {
                "total_tokens": steps * batch,
                "lr": arm.lr, "min_lr": arm.lr / 200, "lr_warmup_fraction": 0.02,
                "enlarged_fraction": arm.enlarged, "prune_fraction": prune,
                "recover_fraction": 1 - arm.enlarged - prune,
                # Half a step less: the end must not depend on how a product is rounded.
                "prune_warmup_fraction": (warmup_steps - 0.5) / (prune * steps),
                **arm.schedule,
            },
            "prune": {
                "strategy": "idea" if arm.prunes else "none", "target": {"ffn_hidden_size": TARGET},
                "mask_interval_steps": every if arm.averaged else 1,
            },
            "checkpoint": {"before_compaction": False, "keep_last": 1},
            "evaluation": {"every_tokens": every * batch, "num_samples": CURVE_SAMPLES,
                           "around_compaction": False},
            "logging": {"tensorboard": False, "progress": False},
        }
    )  # fmt: skip


def order_digest(config: Config, steps: int) -> str:
    """SHA-256 of the tokens of the first ``steps`` steps, in the order in which they are read."""
    digest = hashlib.sha256()
    tokenizer = load_tokenizer(config.data.tokenizer)
    with joined(config.parallel, config.training.seed) as groups:
        per_step = config.training.global_batch_size
        data = open_batches(config, groups, tokenizer, "train", num_steps(config) * per_step)
        for step in range(steps):
            for batch in data.step(step * per_step):
                digest.update(batch["tokens"].numpy().tobytes())
    return digest.hexdigest()


def same_order(configs: Sequence[Config], steps: int) -> str:
    """The digest of all these runs' first ``steps`` steps; raises ValueError if they differ."""
    longest = max(config.schedule.total_tokens for config in configs)
    available = check_dataset(configs[0].data.train[0].prefix, load_tokenizer("byte")).tokens
    if longest >= available:
        raise ValueError(f"{longest:,} tokens are to be read, each once; there are {available:,}")
    digests = {order_digest(config, steps) for config in configs}
    if len(digests) != 1:
        raise ValueError("arms of one seed do not read the same samples in the same order")
    return digests.pop()


def finished(config: Config) -> dict[str, Any]:
    """Train an arm to its end, if it is not there, and read its figures; leaves on a signal."""
    if train(config).consumed_tokens < config.schedule.total_tokens:
        sys.exit("stopped by a signal; the same call goes on from here")
    return figures(config)


def final_path(config: Config) -> Path:
    """The file that a run has when it is finished and measured."""
    return Path(config.run_dir) / "final.json"


def final_loss(config: Config) -> float:
    """Held-out loss of a finished run in nats per token; kept in the run's folder."""
    path = final_path(config)
    if not path.exists():
        overrides = [f"evaluation.num_samples={FINAL_SAMPLES}"]
        path.write_text(json.dumps(evaluate_checkpoint(Path(config.run_dir), overrides)))
    return json.loads(path.read_text())["loss"]


def rise(run: Run) -> dict[str, Any]:
    """How far the held-out loss rises through the removal, and when it is back.

    ``before``: the last loss measured before the first neuron goes. ``highest``: of all later ones;
    gradual removal is charged with the learning rate's own noise in it. ``back_after_steps`` from
    the removal's first step; None: not within the run.
    """
    removal = removal_window(run.config.schedule)[0]
    losses = [(event["tokens"], event["val_loss"]) for event in run.evaluations()]
    before = [loss for tokens, loss in losses if tokens < removal][-1]
    after = [(tokens, loss) for tokens, loss in losses if tokens >= removal]
    first = after[0][0]
    peak_at, highest = max(after, key=lambda point: point[1])
    back = [tokens for tokens, loss in after if tokens >= peak_at and loss <= before]
    in_steps = run.config.batch_tokens
    return {
        "before": round(before, 4),
        "highest": round(highest, 4),
        "rise": round(highest - before, 4),
        "highest_at_step": peak_at // in_steps,
        "back_after_steps": (back[0] - first) // in_steps if back else None,
    }


def figures(config: Config) -> dict[str, Any]:
    """What a finished run has recorded."""
    run = read_run(Path(config.run_dir))
    time = {kind: run.of_kind(kind)[0]["time"] for kind in ("started", "finished")}
    found = {
        "loss": round(final_loss(config), 5),
        "tokens": run.tokens,
        "flops": cost(run).this_run[-1],
        "neurons": run.records[-1].stored["ffn_hidden_size"],
        "skipped_steps": run.records[-1].skipped,
        "wall_s": round(time["finished"] - time["started"], 1),
    }
    return found | (rise(run) if run.prunes else {})


# ------------------------------------------------------------------------------- all of them


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and the values themselves in order of seeds."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {
        "mean": round(statistics.fmean(values), 4),
        "sd": None if sd is None else round(sd, 4),
        "values": [round(value, 4) for value in values],
    }


def summary(runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Each arm over its seeds; differences and FLOPs against the same seeds of ``scratch``."""
    arms = {}
    for name, of_seed in runs.items():
        if not of_seed:
            continue
        row = {"seeds": sorted(of_seed), "loss": spread([of_seed[s]["loss"] for s in of_seed])}
        shared = [seed for seed in of_seed if seed in runs.get("scratch", {})]
        if shared:
            plain = runs["scratch"]
            row["to_scratch"] = spread([of_seed[s]["loss"] - plain[s]["loss"] for s in shared])
            row["flops_to_scratch"] = round(
                of_seed[shared[0]]["flops"] / plain[shared[0]]["flops"], 3
            )
        if ARMS[name].prunes:
            row["rise"] = spread([of_seed[s]["rise"] for s in of_seed])
        arms[name] = row
    return arms


def verdict(agree: int, against: int, pairs: int) -> str:
    """Seeds must be unanimous: three of them are too few for anything finer."""
    if agree == pairs:
        return "shows"
    return "reversed" if against == pairs else "unclear"


def judge(sign: Sign, runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any] | None:
    """A sign's figure over the seeds that both arms have; None without any."""
    left, right = runs.get(sign.left, {}), runs.get(sign.right, {})
    seeds = [seed for seed in left if seed in right]
    if not seeds:
        return None
    row: dict[str, Any] = {"left": sign.left, "right": sign.right, "expected": sign.expected}
    if sign.expected == "spike":
        pairs = [(left[s]["rise"], right[s]["rise"]) for s in seeds]
        row["rise_left"], row["rise_right"] = (spread(part) for part in zip(*pairs, strict=True))
        means = row["rise_left"]["mean"], row["rise_right"]["mean"]
        row["ratio"] = round(means[0] / means[1], 2) if means[1] > 0 else None
        agree = sum(a > 0 and a >= SPIKE_RATIO * b for a, b in pairs)
        against = sum(a <= b for a, b in pairs)
    else:
        differences = [left[s]["loss"] - right[s]["loss"] for s in seeds]
        row["difference"] = spread(differences)
        agree = sum(d < 0 if sign.expected == "<" else d > 0 for d in differences)
        against = sum(d > 0 if sign.expected == "<" else d < 0 for d in differences)
    row["seeds_that_agree"] = f"{agree} of {len(seeds)}" if sign.expected else None
    row["verdict"] = verdict(agree, against, len(seeds)) if sign.expected else "reported only"
    return row


def plus_minus(values: dict[str, Any] | None, signed: bool = False) -> str:
    if values is None:
        return ""
    mean = f"{values['mean']:{'+' if signed else ''}.4f}"
    return mean if values["sd"] is None else f"{mean} ± {values['sd']:.4f}"


def show(arms: dict[str, dict[str, Any]], signs: Sequence[dict[str, Any]]) -> None:
    console = Console()
    console = Console(width=max(120, console.width))
    print("\nheld-out loss in nats per byte; ± is the standard deviation over seeds")
    table = Table(box=None, pad_edge=False)
    for header in ("arm", "seeds", "loss", "to scratch", "FLOPs", "rise at removal"):
        table.add_column(header, justify="left" if header == "arm" else "right", no_wrap=True)
    for name, row in arms.items():
        table.add_row(
            name,
            str(len(row["seeds"])),
            plus_minus(row["loss"]),
            plus_minus(row.get("to_scratch"), signed=True),
            f"{row['flops_to_scratch']:.2f}" if "flops_to_scratch" in row else "",
            plus_minus(row.get("rise"), signed=True),
        )
    console.print(table)
    print()
    table = Table(box=None, pad_edge=False)
    for header in ("left", "right", "expected", "figure", "seeds", "verdict"):
        table.add_column(header, no_wrap=True)
    for row in signs:
        expected = row["expected"] or "-"
        figure = plus_minus(row.get("difference"), signed=True)
        if expected == "spike":
            expected = f"rise, ratio >= {SPIKE_RATIO:g}"
            figure = f"ratio {row['ratio']}"
        agree = row["seeds_that_agree"] or "-"
        table.add_row(row["left"], row["right"], expected, figure, agree, row["verdict"])
    console.print(table)


def corpus(out: Path) -> str:
    """Prefix of the text that this Python brings along, as bytes; made when it is not there."""
    prefix = out / "corpus"
    if not Path(f"{prefix}_heldout.idx").exists():
        text = build_corpus(out / "corpus.jsonl")
        tokenize([text.path], prefix, load_tokenizer("byte"))
    return str(prefix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/signs"), help="run folders")
    parser.add_argument("--no-train", action="store_true", help="figures of finished runs, only")
    parser.add_argument("--data", help="prefix of indexed bytes; default: text of this Python")
    parser.add_argument("--json", type=Path, default=measure.RESULTS / "signs-cpu.json")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    steps, out = arguments.steps, arguments.out
    data = arguments.data or corpus(out)
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in arguments.arms}
    orders = {}
    for seed in arguments.seeds:
        configs = {name: arm_config(name, seed, steps, data, out) for name in arguments.arms}
        orders[seed] = same_order(list(configs.values()), steps)
        for name, config in configs.items():
            if arguments.no_train and not final_path(config).exists():
                continue
            runs[name][seed] = found = figures(config) if arguments.no_train else finished(config)
            print(f"seed {seed}  {name:<22} {found['loss']:.4f}", flush=True)
    arms = summary(runs)
    signs = [row for sign in SIGNS if (row := judge(sign, runs))]
    show(arms, signs)
    byte = load_tokenizer("byte")
    measured = {
        "steps": steps,
        "batch_tokens": 8 * 128,
        "train_tokens_available": check_dataset(f"{data}_train", byte).tokens,
        "final_samples": FINAL_SAMPLES,
        "curve_samples": CURVE_SAMPLES,
        "data_order_sha256": orders,
        "arms": arms,
        "signs": signs,
        "runs": runs,
    }
    measure.keep(arguments.json, {"measured": measured})


if __name__ == "__main__":
    main()
