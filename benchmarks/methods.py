"""Every method on one model: the same data, clock, optimizer, tokens and final parameters.

    python -W ignore benchmarks/methods.py [--steps 600] [--seeds 0 1 2] [--arms NAME ...]

Every arm is a run of the engine that prunes the same micro model over the same samples in the same
order for a seed, and ends within one block of one number of parameters: that of the enlarged model
without half of its layers. ``scratch`` trains the shape that ``idea`` ends with from the start.
Methods that find the shape are told the number alone. An interrupted call resumes; a finished run
is not run again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_idea import config as configuration
from megatron_idea.config import Config, PruneTarget
from megatron_idea.course import num_steps
from megatron_idea.engine.core_versions import quiet
from megatron_idea.report.run import read_run
from megatron_idea.shape import LAYER_AXES, Shape

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves a script's folder out

import measure
from signs import arm_config, corpus, finished, plus_minus, same_order, spread

MODEL = {
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 192, "num_attention_heads": 4,
    "num_query_groups": 4, "kv_channels": 8, "share_embeddings_and_output_weights": False,
}  # fmt: skip
EVALUATE_EVERY = 5
"""Steps between evaluations: how often the rise at removal is looked for."""


@dataclass(frozen=True)
class Arm:
    """A method, the shape that it is to end with, and what it changes besides."""

    target: dict[str, int]
    prune: dict[str, Any]
    schedule: dict[str, Any] = field(default_factory=dict)


NEURONS = {"ffn_hidden_size": 74}
AND_GROUPS = {"ffn_hidden_size": 96, "num_query_groups": 2}
AND_CHANNELS = {"ffn_hidden_size": 108, "num_query_groups": 3, "hidden_size": 28}
LAYERS = {"num_layers": 2}
CHANNELS = {"hidden_size": 18}
GOAL = {"parameters": 62_144}
"""What half of the layers leaves."""
ONE_SHOT = {"removal": "one_shot"}
# As Adapt-Pruner is released: its learning rate over all rounds, a fresh optimizer in each.
RELEASED = {"lr_decay_style": "WSD", "lr_warmup_fraction": 0.05}
ARMS = {
    "scratch": Arm(NEURONS, {"strategy": "none"}),
    "random": Arm(NEURONS, {"strategy": "random"}),
    "magnitude-l1": Arm(NEURONS, {"strategy": "magnitude"}),
    "magnitude-l2": Arm(NEURONS, {"strategy": "magnitude", "row_reduce": "l2"}),
    "taylor": Arm(NEURONS, {"strategy": "taylor"}),
    "idea": Arm(NEURONS, {"strategy": "idea"}),
    "idea-one-shot": Arm(NEURONS, {"strategy": "idea"}, ONE_SHOT),
    "idea-wsd": Arm(NEURONS, {"strategy": "idea"}, RELEASED),
    "idea+groups": Arm(AND_GROUPS, {"strategy": "idea"}),
    "random+groups": Arm(AND_GROUPS, {"strategy": "random"}),
    "llm_pruner": Arm(AND_GROUPS, {"strategy": "llm_pruner"}),
    "llm_pruner-vector": Arm(AND_GROUPS, {"strategy": "llm_pruner", "element": "signed"}),
    "wanda": Arm(AND_GROUPS, {"strategy": "wanda"}),
    "flap_score": Arm(AND_GROUPS, {"strategy": "flap_score"}),
    "adapt_pruner": Arm(GOAL, {"strategy": "adapt_pruner"}),
    "adapt_pruner-uniform": Arm(GOAL, {"strategy": "adapt_pruner", "amplitude": 0.0}),
    "adapt_pruner-released": Arm(
        GOAL, {"strategy": "adapt_pruner", "as_released": True, "moments": "reset"}, RELEASED
    ),
    "minitron": Arm(AND_CHANNELS, {"strategy": "minitron"}),
    "efficient_llm": Arm(GOAL, {"strategy": "efficient_llm"}),
    "efficient_llm-fisher": Arm(GOAL, {"strategy": "efficient_llm", "element": "fisher"}),
    "efficient_llm-obs": Arm(GOAL, {"strategy": "efficient_llm", "update": "obs"}),
    "pca_stem": Arm(CHANNELS, {"strategy": "pca_stem"}, ONE_SHOT),
    "shortgpt": Arm(LAYERS, {"strategy": "shortgpt"}),
    "idea-layers": Arm(LAYERS, {"strategy": "idea"}),
}  # fmt: skip


def run_config(name: str, seed: int, steps: int, data: str, out: Path) -> Config:
    """The run of an arm: ``signs.py``'s, with this model, method and target."""
    arm = ARMS[name]
    base = arm_config("idea", seed, steps, data, out)
    model = MODEL | (arm.target if name == "scratch" else {})
    return configuration.replace(
        base,
        run_dir=str(out / f"seed{seed}" / name),
        model=model,
        schedule=arm.schedule,
        prune={"target": PruneTarget(**arm.target), "alignment": 1, "channel_alignment": 2}
        | arm.prune,
        evaluation={"every_tokens": EVALUATE_EVERY * base.batch_tokens},
    )


def shape_of(config: Config) -> Shape:
    """Return the shape that a finished run has ended with."""
    stored = read_run(Path(config.run_dir)).records[-1].stored
    full = Shape.full(config.model)
    numbers = [n for n, width in enumerate(stored["ffn_hidden_size"]) if width]
    shape = full.with_counts("hidden_size", stored["hidden_size"])
    for axis in LAYER_AXES:
        shape = shape.with_counts(axis, stored[axis])
    return shape.with_layers(numbers)


def block(config: Config) -> int:
    """Count the weights of one unit of the coarsest axis that a run prunes, in every layer."""
    full = Shape.full(config.model)

    def one(axis: str, multiple: int) -> int:
        fewer = full.with_counts(axis, full.counts(axis)[0] - multiple)
        return full.parameters(config.model).total - fewer.parameters(config.model).total

    return max(one(axis, goal.final_multiple) for axis, goal in config.goals.items())


def brief(shape: Shape) -> str:
    """Say a shape in a few characters: neurons and groups by layer, channels."""
    each = []
    for axis in LAYER_AXES:
        counts = shape.counts(axis)
        alike = len(set(counts)) == 1
        each.append(f"{counts[0]} x {len(counts)}" if alike else " ".join(map(str, counts)))
    return " | ".join([*each, str(shape.hidden_size)])


def show(arms: dict[str, dict[str, Any]]) -> None:
    headers = (
        "arm", "parameters", "FLOPs", "loss, nats per byte", "to idea", "rise at removal",
        "neurons | groups | channels, first seed",
    )  # fmt: skip
    rows = [
        (
            name,
            f"{row['parameters'][0]:,}",
            f"{row['flops_to_idea']:.2f}",
            plus_minus(row["loss"]),
            plus_minus(row["to_idea"], signed=True),
            plus_minus(row.get("rise"), signed=True),
            row["shapes"][0],
        )
        for name, row in arms.items()
    ]
    measure.show(headers, rows, width=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="run folders")
    parser.add_argument("--data", help="prefix of indexed bytes; default: text of this Python")
    parser.add_argument("--json", type=Path, default=measure.RESULTS / "methods-cpu.json")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    steps, out = arguments.steps, arguments.out
    data = arguments.data or corpus(out)
    names = list(dict.fromkeys(["idea", *arguments.arms]))  # what the others are held against
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    for seed in arguments.seeds:
        configs = {name: run_config(name, seed, steps, data, out) for name in names}
        same_order(list(configs.values()), num_steps(configs["idea"]))
        for name, config in configs.items():
            runs[name][seed] = found = finished(config)
            shape = shape_of(config)
            found |= {"parameters": shape.parameters(config.model).total, "shape": brief(shape)}
            apart = abs(found["parameters"] - GOAL["parameters"])
            if name != "scratch" and apart > block(config):
                sys.exit(f"{name} ends with {found['parameters']:,} parameters")
            print(f"seed {seed}  {name:<22} {found['loss']:.4f}  {found['shape']}", flush=True)
    base = runs["idea"]
    arms = {}
    for name, of_seed in runs.items():
        each = list(of_seed.values())
        arms[name] = {
            "parameters": [found["parameters"] for found in each],
            "shapes": [found["shape"] for found in each],
            "flops_to_idea": round(
                sum(f["flops"] for f in each) / sum(f["flops"] for f in base.values()), 3
            ),
            "loss": spread([found["loss"] for found in each]),
            "to_idea": spread([of_seed[seed]["loss"] - base[seed]["loss"] for seed in of_seed]),
        }
        if name != "scratch":
            arms[name]["rise"] = spread([found["rise"] for found in each])
    show(arms)
    measured = {"steps": steps, "batch_tokens": 8 * 128, "arms": arms, "runs": runs}
    measure.keep(arguments.json, {"measured": measured})


if __name__ == "__main__":
    main()
