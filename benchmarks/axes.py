"""Which axis should shrink? One enlarged model to one number of parameters, along several ways.

    python -W ignore benchmarks/axes.py [--steps 800] [--seeds 0 1 2] [--arms NAME ...]

Every arm is a run of the engine that prunes the same micro model over the same samples in the same
order for a seed; the arms end within 1 % of one number of parameters. ``scratch`` trains the shape
that ``ffn`` ends with from the start. Arms called ``=flops`` are over so many tokens that their
FLOPs are those of ``ffn``. An interrupted call resumes; a finished run is not run again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_idea import config as configuration
from megatron_idea.config import Config, PruneTarget
from megatron_idea.course import flops_between, num_steps, target_shape
from megatron_idea.engine.core_versions import quiet

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves a script's folder out

import measure
from signs import arm_config, corpus, finished, plus_minus, same_order, spread

MODEL = {
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 192,
    "num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 8,
}  # fmt: skip
# 52 thousand parameters each, of 99 thousand: about half of what is not embedding.
TARGETS = {
    "ffn": {"ffn_hidden_size": 72},
    "ffn+groups": {"ffn_hidden_size": 93, "num_query_groups": 2},
    "ffn+channels": {"ffn_hidden_size": 118, "hidden_size": 24},
    "ffn+depth": {"ffn_hidden_size": 110, "num_layers": 3},
    "all": {"ffn_hidden_size": 147, "num_query_groups": 3, "hidden_size": 28, "num_layers": 3},
}
SAME_FLOPS = "=flops"
ARMS = ["scratch", *TARGETS, *(name + SAME_FLOPS for name in TARGETS if name != "ffn")]
MOST = 0.01
"""How far the arms' numbers of parameters may be apart."""


def run_config(name: str, seed: int, steps: int, data: str, out: Path) -> Config:
    """The run of an arm: ``signs.py``'s, with this model and these targets."""
    way = name.removesuffix(SAME_FLOPS)
    if name != way:
        mine, ours = (
            flops_between(c, 0, c.schedule.total_tokens)
            for c in (run_config(n, seed, steps, data, out) for n in (way, "ffn"))
        )
        steps = round(steps * ours / mine)
    base = arm_config("scratch" if way == "scratch" else "idea", seed, steps, data, out)
    model = dict(MODEL)
    if way == "scratch":
        model |= TARGETS["ffn"]
    target = PruneTarget(**TARGETS.get(way, TARGETS["ffn"]))
    return configuration.replace(
        base,
        run_dir=str(out / f"seed{seed}" / name),
        model=model,
        prune={"target": target, "alignment": 1, "channel_alignment": 4},
    )


def parameters(config: Config) -> int:
    """Weights of the model that an arm ends with."""
    return target_shape(config).parameters(config.model).total


def show(arms: dict[str, dict[str, Any]]) -> None:
    rows = [
        (
            name,
            f"{row['parameters']:,}",
            f"{row['flops_to_ffn']:.2f}",
            plus_minus(row["loss"]),
            plus_minus(row["to_ffn"], signed=True),
            plus_minus(row.get("rise"), signed=True),
        )
        for name, row in arms.items()
    ]
    measure.show(
        ("arm", "parameters", "FLOPs", "loss, nats per byte", "to ffn", "rise at removal"), rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/axes"), help="run folders")
    parser.add_argument("--data", help="prefix of indexed bytes; default: text of this Python")
    parser.add_argument("--json", type=Path, default=measure.RESULTS / "axes-cpu.json")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    steps, out = arguments.steps, arguments.out
    data = arguments.data or corpus(out)
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in arguments.arms}
    sizes = {}
    for seed in arguments.seeds:
        configs = {name: run_config(name, seed, steps, data, out) for name in arguments.arms}
        same_order(list(configs.values()), min(map(num_steps, configs.values())))
        sizes = {name: parameters(config) for name, config in configs.items()}
        apart = max(sizes.values()) / min(sizes.values()) - 1
        if apart > MOST:
            sys.exit(f"the arms' numbers of parameters are {apart:.1%} apart: {sizes}")
        for name, config in configs.items():
            runs[name][seed] = found = finished(config)
            print(f"seed {seed}  {name:<22} {found['loss']:.4f}", flush=True)
    base = runs["ffn"]
    arms = {}
    for name, of_seed in runs.items():
        arms[name] = {
            "parameters": sizes[name],
            "flops_to_ffn": round(
                of_seed[arguments.seeds[0]]["flops"] / base[arguments.seeds[0]]["flops"], 3
            ),
            "loss": spread([found["loss"] for found in of_seed.values()]),
            "to_ffn": spread([of_seed[seed]["loss"] - base[seed]["loss"] for seed in of_seed]),
        }
        if name != "scratch":
            arms[name]["rise"] = spread([found["rise"] for found in of_seed.values()])
    show(arms)
    measured = {"steps": steps, "batch_tokens": 8 * 128, "arms": arms, "runs": runs}
    measure.keep(arguments.json, {"measured": measured})


if __name__ == "__main__":
    main()
