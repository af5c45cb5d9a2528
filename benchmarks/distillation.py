"""What a teacher inside the run costs.

    python -W ignore benchmarks/distillation.py [--rounds 40]

The step of a pruned student with the enlarged model as its teacher to the step without, in
alternation in this one process, held against the ratio of their FLOPs. What a teacher is worth is a
comparison: examples/suites/distillation.yaml.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from megatron_idea import config as configuration
from megatron_idea.course import target_shape
from megatron_idea.distill.teacher import Teacher
from megatron_idea.engine.core_versions import quiet
from megatron_idea.engine.distributed import joined
from megatron_idea.engine.trainable import assemble
from megatron_idea.schedule import phase_ends
from megatron_idea.shape import Shape

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves a script's folder out

import measure
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    file = measure.result_file("distillation-cost")
    measure.write(file, cost(arguments.rounds), {"taught_to_flops": GOAL})


if __name__ == "__main__":
    main()
