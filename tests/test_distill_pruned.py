"""What is silent is what is cut, for a loss that listens to a teacher, too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from jobs import live_run, run_job
from test_all_axes import LAYOUTS, TARGET, pruned

from megatron_idea.config import Config, replace
from megatron_idea.testing import Workers, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

STEPS = 20


def taught_run(groups: ProcessGroups, config: Config) -> dict[str, Any]:
    """Losses of a run that shrinks on all axes, its own enlarged model beside it."""
    from megatron_idea.train import prepare_teacher, step

    run, state = live_run(groups, config)
    run.teacher = None
    compactions: list[dict[str, Any]] = []
    run.log.event = lambda kind, **fields: kind == "compacted" and compactions.append(fields)
    prepare_teacher(run, state)
    records, before = [], None
    for _ in range(STEPS):
        records.append(step(run, state)[0])
        prepare_teacher(run, state)
        if before is None and run.teacher is not None:
            before = [p.clone() for chunk in run.teacher.chunks for p in chunk.parameters()]
    assert before is not None
    after = [p for chunk in run.teacher.chunks for p in chunk.parameters()]
    for one, two in zip(before, after, strict=True):
        assert_equal(two, one, "a teacher's weights")
    measured = {
        name: [getattr(record, name) for record in records]
        for name in ("loss", "kl", "teacher_loss", "acceptance")
    }
    return measured | {"stored": records[-1].stored, "compactions": len(compactions)}


@pytest.mark.parametrize("layout", ["tp1", "pp2"])
def test_silent_units_and_cut_ones_hear_a_teacher_alike(
    workers: Workers, tmp_path: Path, layout: str
) -> None:
    size, parallel = LAYOUTS[layout]
    distill = {"teacher": "self", "average_spacing": 0.03, "average_last": 2, "acceptance": True}
    silent = pruned(
        TARGET, run_dir=str(tmp_path / "silent"), distill=distill, prune={"compact": False}
    )
    cut = replace(silent, run_dir=str(tmp_path / "cut"), parallel=parallel, prune={"compact": True})
    (expected,) = run_job(workers, taught_run, 1, silent)
    found = run_job(workers, taught_run, size, cut)[0]
    begin = next(n for n, kl in enumerate(expected["kl"]) if kl is not None)
    assert begin == 3 and found["compactions"] >= 3 and expected["compactions"] == 0
    # A divergence is a difference of sums of a few nats, however small it is.
    for name in ("loss", "kl", "teacher_loss", "acceptance"):
        assert found[name][begin:] == pytest.approx(expected[name][begin:], rel=1e-6, abs=1e-7)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for axis, count in TARGET.items():
        assert max(found["stored"][axis]) == count
