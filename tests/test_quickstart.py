"""The example that a newcomer runs first, shortened: two tensor-parallel processes over gloo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_idea.records.read import read_events, read_metrics, read_samples

pytestmark = pytest.mark.skipif(
    not list(Path(sys.prefix).glob("megatron_idea*.stamp")),
    reason="this environment was not made by examples/setup.sh, which would install into it",
)

REPOSITORY = Path(__file__).resolve().parent.parent
# 48 steps of 512 tokens; observed for 3.6 steps before anything is removed.
SHORT = (
    "schedule.total_tokens=24576",
    "schedule.prune_warmup_fraction=0.5",
    "training.seq_length=128",
    "evaluation.num_samples=8",
    "evaluation.sample_tokens=4",
)


def quickstart(run_dir: Path) -> subprocess.CompletedProcess[str]:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "RUN_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    return subprocess.run(
        ["bash", "examples/quickstart.sh", str(run_dir), *SHORT],
        cwd=REPOSITORY,
        env=environment | {"MEGATRON_IDEA_VENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,  # the first call may have to make the corpus and the tokenizer
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run folder, and what the call that made it wrote to standard output and error."""
    run_dir = tmp_path_factory.mktemp("quickstart") / "quick"
    first = quickstart(run_dir)
    assert first.returncode == 0, first.stderr
    return run_dir, first.stdout, first.stderr


def test_the_quickstart_ends_with_a_pruned_model_and_can_be_called_again(
    finished: tuple[Path, str, str],
) -> None:
    run_dir, shown_first, errors = finished
    records = read_metrics(run_dir)
    assert len(records) == 48
    assert records[0].stored["ffn_hidden_size"] == [1024] * 4
    assert records[-1].stored["ffn_hidden_size"] == records[-1].live["ffn_hidden_size"] == [384] * 4
    assert records[-1].loss < records[0].loss - 0.5

    (losses,) = [line for line in shown_first.splitlines() if line.startswith("held-out loss")]
    evaluated = [e["val_loss"] for e in read_events(run_dir) if e["kind"] == "evaluated"]
    shown = [float(number) for number in re.findall(r"\d+\.\d+", losses)]
    assert shown == pytest.approx(evaluated, abs=6e-5)
    assert len(shown) == 4  # at the start and at the end of each phase
    prompts = [sample["prompt"] for sample in read_samples(run_dir)]
    assert prompts == ["def ", "import "] * 4
    for name in ("enlarged", "pruned", "neurons", "parameters"):
        assert name in shown_first
    picture = run_dir / "report" / "run.png"
    assert str(picture) in shown_first
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list((run_dir / "tensorboard").iterdir())
    assert "Traceback" not in errors and "Warning" not in errors

    second = quickstart(run_dir)
    assert second.returncode == 0, second.stderr
    assert "setup:" not in second.stdout + second.stderr  # nothing was installed again
    assert "step_00000048: this run is finished" in second.stderr
    assert len(read_metrics(run_dir)) == 48
    table = re.search(r"^ +start .*?(?=^training tokens/s)", shown_first, re.M | re.S)
    assert table and table[0] in second.stdout


# In place of Jupyter, whose 32 packages would be installed for this alone: the cells in order, in
# one namespace. A cell that fails ends it, and the traceback names the cell.
RUN_CELLS = """
import json, sys
for number, cell in enumerate(json.load(open(sys.argv[1]))["cells"]):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"<cell {number}>", "exec"), globals())
"""


def test_the_notebook_runs_on_what_the_quickstart_leaves(finished: tuple[Path, str, str]) -> None:
    run_dir = finished[0]
    ran = subprocess.run(
        [sys.executable, "-c", RUN_CELLS, "tour.ipynb"],
        cwd=REPOSITORY / "docs",  # where Jupyter runs it
        env=os.environ | {"RUN_DIR": str(run_dir), "MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert "48 steps, 24,576 tokens" in ran.stdout
    assert "2,033,024 to 1,049,984 parameters" in ran.stdout
    assert "Qwen3ForCausalLM of 1,049,984 parameters" in ran.stdout
