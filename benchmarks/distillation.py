"""What a teacher inside the run costs, and what it is worth to a micro model.

    python -W ignore benchmarks/distillation.py cost [--rounds 40]
    python -W ignore benchmarks/distillation.py arms [--steps 1500] [--seeds 0 1 2]

``cost``: the step of a pruned student with the enlarged model as its teacher to the step without,
in alternation in this one process, held against the ratio of their FLOPs.

``arms``: runs of ``signs.py``'s micro model over the same samples in the same order for a seed:
IDEA Prune with and without its own enlarged model as teacher, and the small model from the start
with and without the finished enlarged model as teacher; over equal tokens, and (``=flops``) over so
many tokens that FLOPs, the teacher's counted, are those of ``idea-taught``. An interrupted call
resumes; a finished run is not run again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_idea import config as configuration
from megatron_idea.config import Config
from megatron_idea.course import flops_between, num_steps, target_shape
from megatron_idea.distill.teacher import Teacher
from megatron_idea.engine.core_versions import quiet
from megatron_idea.engine.distributed import joined
from megatron_idea.engine.trainable import assemble
from megatron_idea.report.run import read_run
from megatron_idea.schedule import distillation_share, phase_ends
from megatron_idea.shape import Shape

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves a script's folder out

import measure
from signs import ENLARGED, arm_config, corpus, finished, plus_minus, same_order, spread
from training import FixedBatch, stepper

GOAL = 1.10
"""The ratio of CPU times to that of FLOPs."""


def cost(rounds: int) -> dict[str, dict[str, float]]:
    """Measure a step in the recover phase of the quickstart, with and without a teacher."""
    config = configuration.load(
        "examples/configs/quickstart.yaml",
        ["parallel.tensor_model_parallel_size=1", "schedule.total_tokens=1e9"],
    )
    taught = configuration.replace(config, distill={"teacher": "self"})
    model, at = config.model, phase_ends(config.schedule)["prune"] + config.batch_tokens
    full, small = Shape.full(model), target_shape(config)
    with joined(config.parallel, config.training.seed) as groups:
        data = FixedBatch(config, groups.device)
        student = assemble(config.sections, groups, small, initialize=True)
        teacher = Teacher(model, full, config.training, config.parallel, taught.distill, groups)
        for chunk in teacher.chunks:
            for parameter in chunk.parameters():
                parameter.normal_(0.0, 0.02)
        plain = configuration.replace(config, prune={"strategy": "none"})
        quiet_taught = configuration.replace(
            plain, distill={"teacher": "another", "alpha": 0.7, "alpha_end": 0.7}
        )
        calls = {
            "taught": stepper(quiet_taught, student, data, at, False, teacher),
            "plain": stepper(plain, student, data, at, False),
        }
        seconds = measure.alternate(calls, rounds)
    seq_length = config.training.seq_length
    of_teacher, of_student = (s.flops_per_token(model, seq_length) for s in (full, small))
    flops = 1 + of_teacher / 3 / of_student
    found = measure.ratio(seconds["taught"], seconds["plain"])
    over = {name: round(found[name] / flops, 4) for name in found if name.startswith(("r", "q"))}
    return {
        "taught_to_plain": found,
        "flops": {"ratio": round(flops, 4)},
        "taught_to_flops": found | over | {"rounds": found["rounds"]},
    }


SAME_FLOPS = "=flops"
ARMS = ["enlarged", "idea", "idea-taught", "scratch", "scratch-taught",
        "idea=flops", "scratch=flops", "scratch-taught=flops"]  # fmt: skip


def run_config(name: str, seed: int, steps: int, data: str, out: Path) -> Config:
    """The run of an arm: ``signs.py``'s, with its teacher."""
    way = name.removesuffix(SAME_FLOPS)
    if name != way:
        mine, goal = (
            all_flops(run_config(n, seed, steps, data, out)) for n in (way, "idea-taught")
        )
        steps = round(steps * goal / mine)
    config = arm_config(way.removesuffix("-taught"), seed, steps, data, out)
    distill: dict[str, Any] = {}
    if way == "idea-taught":
        distill = {"teacher": "self"}
    elif way == "scratch-taught":
        distill = {"teacher": str(out / f"seed{seed}" / "enlarged")}
    return configuration.replace(
        config,
        run_dir=str(out / f"seed{seed}" / name),
        distill=distill,
        evaluation={"every_tokens": 20 * config.batch_tokens},
    )


def all_flops(config: Config) -> int:
    """FLOPs of a run as it is planned, with its teacher's forward passes."""
    total, batch = config.schedule.total_tokens, config.batch_tokens
    schedule, distill = config.schedule, config.distill
    taught = sum(
        batch
        for step in range(1, num_steps(config) + 1)
        if distillation_share(schedule, distill, step * batch) > 0
    )
    teacher = Shape.full(config.model).with_counts("ffn_hidden_size", ENLARGED)
    per_token = teacher.flops_per_token(config.model, config.training.seq_length) // 3
    return flops_between(config, 0, total) + taught * per_token


def arms(steps: int, seeds: list[int], names: list[str], out: Path, json: Path) -> None:
    torch.set_num_threads(1)
    data = corpus(out)
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    flops = {}
    for seed in seeds:
        configs = {name: run_config(name, seed, steps, data, out) for name in names}
        same_order(list(configs.values()), min(map(num_steps, configs.values())))
        flops = {name: all_flops(config) for name, config in configs.items()}
        for name, config in configs.items():
            runs[name][seed] = found = finished(config)
            found["flops"] = flops[name]
            taught = [r for r in read_run(Path(config.run_dir)).records if r.kl is not None]
            if taught:
                last = taught[-100:]
                found["kl"] = round(sum(r.kl or 0 for r in last) / len(last), 4)
            print(f"seed {seed}  {name:<22} {found['loss']:.4f}", flush=True)
    base = runs["idea"]
    rows, shown = {}, []
    for name, of_seed in runs.items():
        each = list(of_seed.values())
        rows[name] = row = {
            "tokens": each[0]["tokens"],
            "flops_to_idea": round(flops[name] / flops["idea"], 3),
            "loss": spread([found["loss"] for found in each]),
            "to_idea": spread([of_seed[seed]["loss"] - base[seed]["loss"] for seed in of_seed]),
        }
        loss, to_idea = plus_minus(row["loss"]), plus_minus(row["to_idea"], signed=True)
        ratio = f"{row['flops_to_idea']:.2f}"
        shown.append((name, f"{row['tokens']:,}", ratio, loss, to_idea))
    measure.show(("arm", "tokens", "FLOPs", "loss, nats per byte", "to idea"), shown)
    measure.keep(json, {"measured": {"steps": steps, "arms": rows, "runs": runs}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("cost", "arms"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"), help="run folders")
    parser.add_argument("--json", type=Path, default=measure.RESULTS / "distillation-cpu.json")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    if arguments.what == "cost":
        measure.write("distillation-cost", cost(arguments.rounds), {"taught_to_flops": GOAL})
        return
    names = list(dict.fromkeys(["idea", "enlarged", *arguments.arms]))
    arms(arguments.steps, arguments.seeds, names, arguments.out, arguments.json)


if __name__ == "__main__":
    main()
