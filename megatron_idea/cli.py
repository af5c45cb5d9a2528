"""The commands. Each imports what it needs when it runs, so that ``--help`` is instant.

What the user got wrong is one red line and exit status 2; anything else keeps its traceback.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from megatron_idea.config import Config

USER_ERROR = 2
LET_RANK_0_SPEAK_S = 3.0


class _Commands(typer.core.TyperGroup):
    """Turns the user's mistakes into one line."""

    def invoke(self, ctx: Any) -> Any:
        quiet()
        try:
            return super().invoke(ctx)
        except ValueError as error:
            if not _is_users(error):
                raise
            if _rank() == 0:  # the same on every rank: said once
                line = " ".join(str(error).split())  # YAML's own messages have several
                message = Text.assemble(("error: ", "bold"), line, style="red")
                Console(stderr=True).print(message, soft_wrap=True)
            else:
                # A launcher ends all workers when the first has failed: rank 0 must have spoken.
                time.sleep(LET_RANK_0_SPEAK_S)
            ctx.exit(USER_ERROR)


def _is_users(error: ValueError) -> bool:
    """Whether our own code raised it: we raise ValueError for what the user gave, only."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = traceback.tb_frame.f_globals.get("__name__", "") if traceback is not None else ""
    # Kernels check what our own code hands them: there a ValueError is a bug and wants its trace.
    return module.startswith("megatron_idea.") and not module.startswith("megatron_idea.kernels")


app = typer.Typer(
    name="megatron-idea",
    help="Train an enlarged GPT on megatron-core, prune it while it trains, ship the small one.",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    # Plain tracebacks: in the log of a cluster job boxes and local variables only hide the line.
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="For example schedule.total_tokens=4e6."),
]
Processes = Annotated[
    int | None,
    typer.Option("--nproc", min=1, help="Processes; default: TP x PP of the configuration."),
]


@app.command()
def corpus(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="JSONL file to write.")],
) -> None:
    """Write a small corpus of text that every Python installation has; needs no network."""
    from megatron_idea.data.corpus import build_corpus

    summary = build_corpus(out)
    _say(f"{summary.documents:,} documents, {_megabytes(summary.bytes)}: {summary.path}")


@app.command()
def tokenize(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUTS...", help="Text, JSONL or Parquet; or folders.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="PREFIX", help="Writes PREFIX_train and PREFIX_heldout .bin and .idx."
        ),
    ],
    tokenizer: Annotated[
        str, typer.Option(metavar="PATH|byte", help="A tokenizer.json, or the byte-level fallback.")
    ],
    train_tokenizer: Annotated[
        int | None,
        typer.Option(
            metavar="VOCAB_SIZE",
            help="Train the tokenizer on the inputs first, unless the file is there already.",
        ),
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share of documents kept for evaluation.")] = 0.05,
    text_key: Annotated[str, typer.Option(help="Field that holds the text of a record.")] = "text",
    skip_bad_documents: Annotated[
        bool, typer.Option("--skip-bad-documents", help="Leave unreadable documents out.")
    ] = False,
) -> None:
    """Turn text into the indexed token files that training reads."""
    from megatron_idea.data.indexed import tokenize as tokenize_documents
    from megatron_idea.data.tokenizer import load_tokenizer

    if train_tokenizer is not None:
        _train_tokenizer(inputs, train_tokenizer, tokenizer, text_key)
    loaded = load_tokenizer(tokenizer)
    with Console(stderr=True).status("tokenizing") as status:
        summary = tokenize_documents(
            inputs,
            out,
            loaded,
            held_out=held_out,
            text_key=text_key,
            skip_bad_documents=skip_bad_documents,
            progress=lambda done: status.update(f"tokenizing: {_megabytes(done)}"),
        )
    _say(
        f"{summary.documents:,} documents: {summary.train_tokens:,} tokens to train on, "
        f"{summary.held_out_tokens:,} held out"
    )
    if summary.skipped_documents:
        _say(f"{summary.skipped_documents:,} documents left out: empty or unreadable")


def _train_tokenizer(inputs: list[Path], vocab_size: int, path: str, text_key: str) -> None:
    from megatron_idea.config import ConfigError
    from megatron_idea.data.tokenizer import train_tokenizer

    if path == "byte":
        raise ConfigError(
            "--train-tokenizer writes the file that --tokenizer names, and 'byte' is none; "
            "give a path such as --tokenizer data/tokenizer.json"
        )
    if Path(path).exists():
        _say(f"using {path}, which exists; delete it to train another")
        return
    trained = train_tokenizer(inputs, vocab_size, Path(path), text_key=text_key)
    _say(f"tokenizer of {trained.vocab_size:,} entries: {path}")


@app.command()
def train(config: ConfigPath, overrides: Overrides = None, nproc: Processes = None) -> None:
    """Run a configuration to its end, or on from its latest checkpoint.

    Starts the processes itself on one machine; under torchrun it is one of torchrun's.
    """
    from megatron_idea.config import load, validate

    loaded = load(config, overrides or [])
    if not _is_worker():
        nproc = nproc or _model_parallel_size(loaded)
        validate(loaded, nproc)
        if nproc > 1:
            _launch(nproc, ["train", str(config), *(overrides or [])])
    elif nproc is not None:
        raise typer.BadParameter(
            "the launcher has set the number of processes", param_hint="--nproc"
        )
    from megatron_idea.train import train as run

    run(loaded)
    if _rank() == 0:
        _report(Path(loaded.run_dir))


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    nproc: Processes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a run will do and cost: sizes, phases, curves, widths, FLOPs."""
    from megatron_idea.config import load
    from megatron_idea.estimate import make_plan, render_plan

    loaded = load(config, overrides or [])
    made = make_plan(loaded, nproc or _model_parallel_size(loaded))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(made), indent=2))
    else:
        Console().print(render_plan(made))


@app.command()
def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT_OR_RUN", help="A run takes its latest checkpoint.")
    ],
    overrides: Overrides = None,
) -> None:
    """Measure the held-out loss of a checkpoint."""
    from megatron_idea.evaluate import evaluate_checkpoint

    for name, value in evaluate_checkpoint(path, overrides or []).items():
        _say(f"{name:<14}{value:,}" if isinstance(value, int) else f"{name:<14}{value:.4f}")


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]) -> None:
    """Draw a run, finished or not, and print its closing table."""
    _report(run)


@app.command()
def doctor() -> None:
    """Show which accelerations are active here, and how to get those that are not."""
    from megatron_idea.doctor import collect, render

    rows = collect()
    Console().print(render(rows))
    if any(row.is_fatal for row in rows):
        raise typer.Exit(1)


def _report(run_dir: Path) -> None:
    from megatron_idea import report as reports

    paths = reports.report(run_dir)
    Console().print(reports.closing_table(run_dir))
    _say(f"\nrun folder: {run_dir}\npicture:    {paths.picture}")


def _model_parallel_size(config: Config) -> int:
    parallel = config.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size


def _is_worker() -> bool:
    """Whether a launcher (torchrun) started this process as one of a job's."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _launch(nproc: int, arguments: list[str]) -> None:
    """Run this command in ``nproc`` processes, as torchrun does, and end with their status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # As torchrun would, without its warning: ranks that share cores must not each take them all.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The working directory is not searched for modules: a folder there must not hide a package.
    os.environ["PYTHONSAFEPATH"] = "1"
    # A rank says itself what went wrong; torchrun's account of it would only push that away.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        max_restarts=0,  # its default is 3: a mistake of the user would be made four times
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        monitor_interval=0.1,
    )
    status = 0
    try:
        elastic_launch(launch, sys.executable)("-m", "megatron_idea", *arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        status = code if code > 0 else 128 - code
    except SignalException as stopped:  # passed on to the workers, who have saved by now
        status = 128 + stopped.sigval
    raise typer.Exit(status)


def quiet() -> None:
    """Keep megatron-core's and torch's notes to developers out of a run's log."""
    import warnings

    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", module=r"torch\.distributed", category=FutureWarning)


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _megabytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB"


def main() -> None:
    """Entry point of ``megatron-idea`` and ``python -m megatron_idea``."""
    app()
