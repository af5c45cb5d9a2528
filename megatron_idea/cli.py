"""The commands. Each imports what it needs when it runs, so that ``--help`` is instant.

What the user got wrong is one red line and exit status 2; anything else keeps its traceback. A run
that a signal stopped before its last token ends with status 75: start it again and it goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_idea.engine.core_versions import quiet
from megatron_idea.errors import UserError
from megatron_idea.records.readable import megabytes
from megatron_idea.records.terminal import Console, say, say_error, say_progress, show, table

if TYPE_CHECKING:
    from megatron_idea.config import Config

USER_ERROR = 2
LET_RANK_0_SPEAK_S = 3.0


class _Commands(typer.core.TyperGroup):
    """Turns what the user can mend into one line."""

    def invoke(self, ctx: Any) -> Any:
        quiet()
        try:
            return super().invoke(ctx)
        except UserError as error:
            if _rank() == 0:  # the same on every rank: said once
                line = " ".join(str(error).split())  # YAML's own messages have several
                say_error(line)
            else:
                # A launcher ends all workers when the first has failed: rank 0 must have spoken.
                time.sleep(LET_RANK_0_SPEAK_S)
            ctx.exit(USER_ERROR)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = f" for {error.filename}" if error.filename else ""
            say_error(f"{error.strerror}{where}")
            ctx.exit(USER_ERROR)


app = typer.Typer(
    name="megatron-idea",
    cls=_Commands,
    no_args_is_help=True,
    # Plain tracebacks: in the log of a cluster job boxes and local variables only hide the line.
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from megatron_idea import __version__

        typer.echo(f"megatron-idea {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show and end."),
    ] = False,
) -> None:
    """Train an enlarged GPT on megatron-core, prune it while it trains, ship the small one."""


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="For example schedule.total_tokens=4e6."),
]
CheckpointOrRun = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT_OR_RUN", help="A run takes its latest checkpoint.")
]
OtherTokenizer = Annotated[
    str, typer.Option(metavar="PATH|byte", help="In place of the model's own.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def init(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One of the list; default: show it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT.yaml", help="Default: NAME.yaml, here.")
    ] = None,
) -> None:
    """Write a configuration or a suite to start from; without a NAME, list them.

    A suite comes with the configuration that it starts from, beside it. Nothing is overwritten.
    """
    from megatron_idea.examples import examples, write_example

    if name is None:
        rows = [(one.name, "compare" if one.is_suite else "train", one.about) for one in examples()]
        show(table(("name", "for", "about"), rows, left=3))
        return
    for path in write_example(name, out or Path(f"{name}.yaml")):
        say(f"written: {path}")


@app.command()
def corpus(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="JSONL file to write.")],
) -> None:
    """Write a small corpus of text that every Python installation has; needs no network."""
    from megatron_idea.data.corpus import build_corpus

    summary = build_corpus(out)
    say(f"{summary.documents:,} documents, {megabytes(summary.bytes)}: {summary.path}")


@app.command()
def tokenize(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUTS...", help="Text, JSON lines, Parquet; or folders."),
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
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that tokenize; the files are the same.")
    ] = 1,
) -> None:
    """Turn text into the indexed token files that training reads.

    After an interruption, whatever it was, the same call goes on.
    """
    from megatron_idea.data.tokenizer import load_tokenizer
    from megatron_idea.data.tokenizing import tokenize as tokenize_documents

    if train_tokenizer is not None:
        _train_tokenizer(inputs, train_tokenizer, tokenizer, text_key)
    loaded = load_tokenizer(tokenizer)
    with _Tokenizing() as shown:
        summary = tokenize_documents(
            inputs,
            out,
            loaded,
            held_out=held_out,
            text_key=text_key,
            skip_bad_documents=skip_bad_documents,
            workers=workers,
            progress=shown.progress,
            notice=say,
        )
    say(summary.as_text())


class _Tokenizing:
    """Shows how far tokenizing is; SIGINT and SIGTERM end it with a sentence and ``STOPPED``."""

    _LINE_S = 60.0
    """Between lines where the output is no terminal."""

    def __init__(self) -> None:
        self._status = Console(stderr=True).status("tokenizing")
        self._done = 0
        self._earlier: int | None = None
        self._begin = self._said = time.monotonic()

    def __enter__(self) -> _Tokenizing:
        self._sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)
        self._status.start()
        return self

    def progress(self, done: int) -> None:
        """Take the bytes of text done so far; those of the first call are earlier work."""
        now = time.monotonic()
        if self._earlier is None:
            self._earlier, self._begin = done, now
        self._done = done
        rate = (done - self._earlier) / 1e6 / max(now - self._begin, 1e-3)
        line = f"tokenizing: {megabytes(done)}, {rate:.2f} MB/s"
        self._status.update(line)
        if not self._status.console.is_terminal and now - self._said >= self._LINE_S:
            self._said = now
            say(line)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        from megatron_idea.engine.launcher import STOPPED

        self._status.stop()
        signal.signal(signal.SIGTERM, self._sigterm)
        if kind is KeyboardInterrupt:
            say_error(f"stopped after {megabytes(self._done)} of text; the same call goes on there")
            raise typer.Exit(STOPPED)


def _train_tokenizer(inputs: list[Path], vocab_size: int, path: str, text_key: str) -> None:
    from megatron_idea.config import ConfigError
    from megatron_idea.data.tokenizer import train_tokenizer

    if path == "byte":
        raise ConfigError(
            "--train-tokenizer writes the file that --tokenizer names, and 'byte' is none; "
            "give a path such as --tokenizer data/tokenizer.json"
        )
    if Path(path).exists():
        say(f"using {path}, which exists; delete it to train another")
        return
    trained = train_tokenizer(inputs, vocab_size, Path(path), text_key=text_key)
    say(f"tokenizer of {trained.vocab_size:,} entries: {path}")


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", min=1, help="Processes on this node; default: TP x PP / nodes."),
    ] = None,
    nnodes: Annotated[
        int, typer.Option(min=1, help="Nodes of the job; this command runs once on each.")
    ] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="This node, counted from 0.")] = 0,
    master: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address of node 0, with a free port.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the configuration, print all of it, end.")
    ] = False,
) -> None:
    """Run a configuration to its end, or on from its latest checkpoint.

    Starts its processes itself, on one node or on each of several; under torchrun it is one of
    torchrun's. SIGTERM, SIGINT or SIGUSR1: finish the step, save, end with status 75.
    """
    from megatron_idea.config import load, to_yaml
    from megatron_idea.engine.launcher import FEWER_NODES, STOPPED, Job, launch

    loaded = load(config, overrides or [])
    if not _is_worker():
        nproc = nproc or max(1, loaded.parallel.model_parallel_size // nnodes)
        _validate(loaded, nnodes, nproc)
        if dry_run:
            typer.echo(to_yaml(loaded), nl=False)
            return
        job = Job(nproc, nnodes, node_rank, master)
        job.check()
        if nnodes * nproc > 1:
            ended = launch(job, ["train", str(config), *(overrides or [])])
            if ended.reason:
                say_error(ended.reason)
            raise typer.Exit(ended.status)
    elif nproc is not None or nnodes > 1:
        raise typer.BadParameter(
            "the launcher has set the number of processes", param_hint="--nproc"
        )
    else:
        # Until the run listens itself: Python's own handler has no turn while torch waits.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from megatron_idea.course import wants_fewer_nodes
    from megatron_idea.engine.launcher import nodes_from_environment
    from megatron_idea.train import train as run

    state = run(loaded)
    if wants_fewer_nodes(loaded, state.consumed_tokens, nodes_from_environment()):
        raise typer.Exit(FEWER_NODES)
    if state.consumed_tokens < loaded.schedule.total_tokens:
        raise typer.Exit(STOPPED)
    if _rank() == 0:
        _report(Path(loaded.run_dir))


def _validate(config: Config, nnodes: int, nproc: int) -> None:
    """Check the layout that the run goes on in here, and the one that it changes to."""
    from megatron_idea.config import validate
    from megatron_idea.course import layout_at
    from megatron_idea.records.saved import saved_tokens

    validate(layout_at(config, saved_tokens(config.run_dir)), nnodes * nproc)
    if config.nodes_after_prune:
        validate(config.after_prune, min(config.nodes_after_prune, nnodes) * nproc)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Processes; default: TP x PP.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=1, help="What the run takes of so many GPUs: memory, hours."),
    ] = None,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="a100-40, a100, h100, h200, gh200, b200, gb200.")
    ] = "h100",
    mfu: Annotated[
        float,
        typer.Option(
            min=0.01, max=1.0, help="Share of the peak FLOP/s: an assumption, not a measurement."
        ),
    ] = 0.4,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Try layouts of TP x PP x DP; needs --gpus.")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw memory and cost over tokens; needs --gpus."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run will do and cost: sizes, phases, curves, widths, FLOPs.

    With --gpus also memory, messages and GPU-hours, from the code that a run uses. Ends with
    status 2 when that does not fit.
    """
    from megatron_idea.config import ConfigError, load
    from megatron_idea.planning.estimate import forecast, render

    if gpus is None and (suggest or picture):
        raise typer.BadParameter("say how many: --gpus 256", param_hint="--gpus")
    if suggest and picture:
        raise typer.BadParameter("a picture is of one layout", param_hint="--picture")
    if gpus is not None and nproc is not None and gpus != nproc:
        raise typer.BadParameter("one process a GPU: give one of the two", param_hint="--nproc")
    loaded = load(config, overrides or [])
    if gpus is not None and suggest:
        _suggest(loaded, gpus, gpu, mfu, as_json)
        return
    made = forecast(loaded, gpus or nproc or loaded.parallel.model_parallel_size)
    if gpus is None:
        if as_json:
            _print_json(made)
        else:
            show(render(made))
        return
    from megatron_idea.engine.gpus import gpu_named
    from megatron_idea.planning.budget import Assumptions, make_budget, suggest_after_prune
    from megatron_idea.planning.view import draw_budget, render_after_prune, render_budget

    with Console(stderr=True).status("a dry run on the meta device"):
        budget = make_budget(loaded, gpus, gpu_named(gpu), Assumptions(mfu=mfu))
        after = suggest_after_prune(loaded, gpus, gpu_named(gpu), Assumptions(mfu=mfu))
    if as_json:
        _print_json(dataclasses.asdict(made) | {"budget": budget, "after_prune": after})
    else:
        show(render(made))
        show(render_budget(budget))
        if after is not None:
            say("")
            show(render_after_prune(after))
    if picture:
        draw_budget(budget, picture)
    if budget.refusal:
        raise ConfigError(f"{budget.refusal}; --suggest shows layouts that fit")


def _suggest(config: Config, gpus: int, gpu: str, mfu: float, as_json: bool) -> None:
    from megatron_idea.config import ConfigError
    from megatron_idea.engine.gpus import gpu_named
    from megatron_idea.planning.budget import Assumptions, suggest, suggest_after_prune
    from megatron_idea.planning.view import render_after_prune, render_layouts

    kind = gpu_named(gpu)
    with Console(stderr=True).status("dry runs in many layouts"):
        fitting, refused = suggest(config, gpus, kind, Assumptions(mfu=mfu))
        after = None
        with contextlib.suppress(ConfigError):  # the run's own layout is not one of these
            after = suggest_after_prune(config, gpus, kind, Assumptions(mfu=mfu))
    if as_json:
        _print_json({"fitting": fitting, "refused": refused, "after_prune": after})
    else:
        show(render_layouts(fitting, refused, kind))
        if after is not None:
            show(render_after_prune(after))
    if not fitting:
        raise ConfigError(f"no layout of {gpus} GPUs of this kind holds the run")


@app.command()
def evaluate(
    path: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A checkpoint, a run (its latest), or an HF folder."),
    ],
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PREFIX_OR_TEXT", help="Indexed dataset, or text; default: the run's held-out."
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(metavar="NAME,...", help="Tasks of lm-evaluation-harness.")
    ] = "",
    suite: Annotated[
        str, typer.Option(metavar="paper", help="What IDEA Prune reports; needs --data.")
    ] = "",
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question; default: the task's.")
    ] = None,
    task_path: Annotated[
        list[Path] | None, typer.Option(help="Folder of further task files.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Sequences or documents of each; 0: all.")] = 0,
    seq_length: Annotated[int, typer.Option(help="Tokens in a row; 0: as in training.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Rows at once; 0: as in training, or 8.")] = 0,
    tokenizer: OtherTokenizer = "",
    as_json: AsJson = False,
) -> None:
    """Measure a model: held-out loss, perplexity, bits per byte, and tasks of the harness."""
    from megatron_idea.config import ConfigError
    from megatron_idea.evaluation.held_out import Options, evaluate_model
    from megatron_idea.evaluation.tasks import as_text, evaluate_tasks, tasks_of

    names, num_fewshot = tasks_of(suite, tasks, num_fewshot, data or [])
    if not names and (task_path or num_fewshot is not None):
        raise ConfigError("--task-path and --num-fewshot are for tasks: give --tasks NAME,...")
    options = Options(seq_length, batch_size, limit, tokenizer)
    scores, measured = {}, []
    if names:
        scores = evaluate_tasks(
            path, names, data or [], overrides or [], options, num_fewshot, task_path or []
        )
    if data or not names:
        measured = evaluate_model(path, data or [], overrides or [], options)
    if _rank() != 0:
        return
    if as_json:
        rows = [{"data": one.data} | one.as_dict() for one in measured]
        _print_json({"model": str(path), "held_out": rows, "tasks": scores})
        return
    for one in measured:
        if data:
            say(one.data)
        say(one.as_text())
    if scores:
        say(as_text(scores, names))


@app.command()
def compact(
    path: CheckpointOrRun,
    out: Annotated[
        Path, typer.Option(metavar="RUN", help="New run folder, for the compacted checkpoint.")
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="SIZES",
            help="384, or one a layer: 384,256,..., or num_query_groups=4 num_layers=20, or "
            "parameters=1_300_000_000 with --strategy; default: the plan's.",
        ),
    ] = "",
    strategy: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Choose by this method, from passes over data; default: by scores."
        ),
    ] = "",
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PREFIX", help="For --strategy; default: the run's training data."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Sequences measured at a time. Default: 128.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Which ones. Default: 0.")] = None,
) -> None:
    """Remove zeroed or unimportant units from a checkpoint on disk, optimizer state included."""
    from megatron_idea.checkpoint.calibrate import Calibration
    from megatron_idea.checkpoint.compact import compact_checkpoint, read_sizes
    from megatron_idea.config import ConfigError

    given = {"data": tuple(data or ()), "samples": samples, "seed": seed}
    given = {name: value for name, value in given.items() if value not in (None, ())}
    if given and not strategy:
        raise ConfigError(f"--{next(iter(given))} is for --strategy NAME")
    how = Calibration(strategy, **given) if strategy else None
    say(str(compact_checkpoint(path, out, read_sizes(to), how)))


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs; several are compared.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="For a comparison; default: report/ of the first."),
    ] = None,
) -> None:
    """Draw runs, finished or not, as one HTML page and pictures; print the closing table."""
    from megatron_idea import report as reports
    from megatron_idea.config import ConfigError

    if len(runs) == 1:
        if out is not None:
            raise ConfigError("--out is for several runs; one is drawn into its own folder")
        _report(runs[0])
        return
    paths = reports.compare(runs, out)
    show(reports.comparison_table(runs))
    say(f"\npicture: {paths.picture}\npage:    {paths.page}")


@app.command()
def compare(
    suite: Annotated[Path, typer.Argument(metavar="SUITE", help="YAML file of arms and seeds.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Of all runs; default: the file's.")
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="0,1,2", help="Default: the file's.")] = "",
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Processes of a run; default: TP x PP.")
    ] = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Submit each run by examples/launch.sh, and end.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it would cost, end.")
    ] = False,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="For --dry-run; as for plan.")] = "h100",
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="For --dry-run: share of the peak FLOP/s.")
    ] = 0.4,
    fit: Annotated[
        bool, typer.Option("--fit", help="Also fit the scaling law to what came out.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run arms side by side on the same seeds; say which is better, and how sure that is.

    Runs what is missing, prints the table and writes a page. Stopped or killed, the same call goes
    on; SIGTERM, SIGINT or SIGUSR1: runs finish their step and save, and it ends with status 75.
    """
    from megatron_idea.compare.suite import check_ready, read_suite

    if as_json and fit:
        raise typer.BadParameter("the fit is printed as text: leave out --json", param_hint="--fit")
    if dry_run and (fit or slurm):
        raise typer.BadParameter("a dry run runs nothing", param_hint="--dry-run")
    if slurm and fit:
        raise typer.BadParameter("with --slurm the runs are to come", param_hint="--fit")
    if slurm and parallel > 1:
        raise typer.BadParameter("with --slurm the queue decides", param_hint="--parallel")
    read = read_suite(suite, overrides or [], out, seeds.split(",") if seeds else None)
    if dry_run:
        from megatron_idea.compare.forecast import costs, render
        from megatron_idea.engine.gpus import gpu_named

        arms = costs(read, gpu_named(gpu), mfu)
        if as_json:
            _print_json({"suite": str(suite), "gpu": gpu, "mfu": mfu, "arms": arms})
        else:
            show(render(read, arms, gpu_named(gpu), mfu))
        return
    check_ready(read, nproc)
    from megatron_idea.compare import jobs, page, results, tables

    tell = say_progress if as_json else say
    status = 0
    if slurm:
        jobs.submit_missing(read, nproc, tell)
    else:
        status = jobs.run_missing(read, parallel, nproc, tell=tell)
    found = results.collect(read)
    written = page.write(read, found, shlex.join(["megatron-idea", *sys.argv[1:]]))
    if as_json:
        _print_json(results.as_json(found))
    else:
        show(tables.render(found))
        say(f"\npage: {written}")
    if fit and status == 0:
        show(results.fit(found))
    raise typer.Exit(status)


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    once: Annotated[bool, typer.Option("--once", help="One look, for scripts.")] = False,
    every_s: Annotated[
        float, typer.Option("--every", min=0.1, metavar="SECONDS", help="Between two looks.")
    ] = 1.0,
) -> None:
    """Show a run live in the terminal: progress, loss, widths, speed, last events."""
    from megatron_idea.report.watch import watch as show

    show(run, once=once, every_s=every_s)


@app.command()
def doctor() -> None:
    """Show which accelerations are active here, and how to get those that are not."""
    from megatron_idea.planning.doctor import collect, render

    rows = collect()
    show(render(rows))
    if any(row.is_fatal for row in rows):
        raise typer.Exit(1)


@app.command()
def export(
    path: CheckpointOrRun,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder, or file.gguf.")],
    format: Annotated[
        str,
        typer.Option(
            metavar="huggingface|gguf", help="A folder for transformers, or a file for llama.cpp."
        ),
    ] = "huggingface",
    layout: Annotated[
        str,
        typer.Option(help="padded: any server loads it; compact: a width for each layer, few do."),
    ] = "padded",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="bf16|fp32", help="Default: the run's own precision. GGUF: also fp16, q8_0."
        ),
    ] = "",
    tokenizer: OtherTokenizer = "",
    max_shard_gb: Annotated[
        float | None, typer.Option(help="Largest file of weights in a folder; default: 5.")
    ] = None,
    draft_of: Annotated[
        Path | None,
        typer.Option(
            metavar="TEACHER_OUT",
            help="Write the teacher, too; the model cards say how OUT drafts for it.",
        ),
    ] = None,
    optimizer: Annotated[
        bool,
        typer.Option("--optimizer", help="Write AdamW's state, too, for another engine to go on."),
    ] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder of a Llama or Qwen3, or as one GGUF file."""
    from megatron_idea.distill.draft import export_draft
    from megatron_idea.huggingface.export import Form, export_checkpoint

    max_shard_bytes = None if max_shard_gb is None else max_shard_gb * 1e9
    form = Form(format, layout, dtype, tokenizer, max_shard_bytes, optimizer)
    if draft_of is None:
        say(export_checkpoint(path, out, **vars(form)).as_text())
        return
    for done in export_draft(path, out, draft_of, form):
        say(done.as_text())


@app.command("import")
def import_(
    folder: Annotated[
        Path, typer.Argument(metavar="HF_FOLDER", help="A dense Llama, Qwen3 or Mistral.")
    ],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="New run folder.")],
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="YAML", help="Data, schedule and the rest of the run."),
    ] = None,
    enlarge: Annotated[
        str,
        typer.Option(
            metavar="AXIS=FACTOR,...",
            help="Begin with so many times the units, as in ffn_hidden_size=2.667,num_layers=1.25.",
        ),
    ] = "",
) -> None:
    """Start a run from a Hugging Face model, if wanted with a larger one that computes the same."""
    from megatron_idea.huggingface.import_ import import_checkpoint, read_factors

    factors = read_factors(enlarge)
    done = import_checkpoint(folder, run, config, overrides or [], enlarge=factors)
    say(done.as_text())


@app.command()
def generate(
    path: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT_OR_EXPORT", help="A checkpoint, a run, or an export."),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="May be given several times; none: a new document.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many likeliest; 0: from all.")] = 0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    tokenizer: OtherTokenizer = "",
) -> None:
    """Let a model go on from a prompt, in one process; a run's report shows what it wrote."""
    from megatron_idea.evaluation.generate import remember, sample
    from megatron_idea.records.saved import complete

    samples = sample(
        path,
        prompt or [""],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        tokenizer=tokenizer,
    )
    for one in samples:
        say(one.prompt + one.text)
    if complete(path):
        remember(path, samples)


def _report(run_dir: Path) -> None:
    from megatron_idea import report as reports

    paths = reports.report(run_dir)
    show(reports.closing_table(run_dir))
    say(f"\nrun folder: {run_dir}\npicture:    {paths.picture}\npage:       {paths.page}")


def _is_worker() -> bool:
    """Whether a launcher (torchrun) started this process as one of a job's."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=dataclasses.asdict))


def main() -> None:
    """Entry point of ``megatron-idea`` and ``python -m megatron_idea``."""
    app()
