"""The commands. Each imports what it needs when it runs, so that ``--help`` is instant.

What the user got wrong is one red line and exit status 2; anything else keeps its traceback. A run
that a signal stopped before its last token ends with status 75: start it again and it goes on.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.measure import Measurement
from rich.text import Text

from megatron_idea.records.terminal import Console

if TYPE_CHECKING:
    from megatron_idea.config import Config
    from megatron_idea.planning.budget import Budget

USER_ERROR = 2
LET_RANK_0_SPEAK_S = 3.0
UNBROKEN = 100_000
"""Columns of a line that nobody breaks."""


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
                _say_error(line)
            else:
                # A launcher ends all workers when the first has failed: rank 0 must have spoken.
                time.sleep(LET_RANK_0_SPEAK_S)
            ctx.exit(USER_ERROR)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = f" for {error.filename}" if error.filename else ""
            _say_error(f"{error.strerror}{where}")
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
    if summary.passed_over:
        _say(f"passed over in folders: {_some(summary.passed_over)}")


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
    from megatron_idea.config import load, to_yaml, validate
    from megatron_idea.engine.launcher import STOPPED, Job, launch

    loaded = load(config, overrides or [])
    if not _is_worker():
        nproc = nproc or max(1, _model_parallel_size(loaded) // nnodes)
        validate(loaded, nnodes * nproc)
        if dry_run:
            typer.echo(to_yaml(loaded), nl=False)
            return
        _check_nodes(nnodes, node_rank, master)
        if nnodes * nproc > 1:
            job = Job(nproc, nnodes, node_rank, master)
            ended = launch(job, ["train", str(config), *(overrides or [])])
            if ended.reason:
                _say_error(ended.reason)
            raise typer.Exit(ended.status)
    elif nproc is not None or nnodes > 1:
        raise typer.BadParameter(
            "the launcher has set the number of processes", param_hint="--nproc"
        )
    else:
        # Until the run listens itself: Python's own handler has no turn while torch waits.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from megatron_idea.train import train as run

    state = run(loaded)
    if state.consumed_tokens < loaded.schedule.total_tokens:
        raise typer.Exit(STOPPED)
    if _rank() == 0:
        _report(Path(loaded.run_dir))


def _check_nodes(nnodes: int, node_rank: int, master: str) -> None:
    from megatron_idea.config import ConfigError

    if node_rank >= nnodes:
        raise ConfigError(f"--node-rank is {node_rank}; with --nnodes {nnodes} it is below that")
    host, _, port = master.rpartition(":")
    if nnodes == 1 and not master:
        return
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(
            f"--master is {master!r}; several nodes need HOST:PORT of node 0, the same everywhere"
        )
    try:
        socket.getaddrinfo(host.strip("[]"), port)
    except OSError as error:
        raise ConfigError(
            f"--master names host {host!r}, which has no address here ({error.strerror}); give its "
            "address, or add the name to /etc/hosts"
        ) from error


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    nproc: Processes = None,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a run will do and cost: sizes, phases, curves, widths, FLOPs.

    With --gpus also memory, messages and GPU-hours, from the code that a run uses. Ends with
    status 2 when that does not fit.
    """
    from megatron_idea.config import ConfigError, load
    from megatron_idea.planning.estimate import make_plan, render_plan

    if gpus is None and (suggest or picture):
        raise typer.BadParameter("say how many: --gpus 256", param_hint="--gpus")
    if gpus is not None and nproc is not None and gpus != nproc:
        raise typer.BadParameter("one process a GPU: give one of the two", param_hint="--nproc")
    loaded = load(config, overrides or [])
    if gpus is not None and suggest:
        _suggest(loaded, gpus, gpu, mfu, as_json)
        return
    made = make_plan(loaded, gpus or nproc or _model_parallel_size(loaded))
    budget = _budget(loaded, gpus, gpu, mfu) if gpus else None
    if as_json:
        both = dataclasses.asdict(made)
        if budget is not None:
            both["budget"] = dataclasses.asdict(budget)
        typer.echo(json.dumps(both, indent=2))
    else:
        _show(render_plan(made))
    if budget is None:
        return
    from megatron_idea.planning.view import draw_budget, render_budget

    if not as_json:
        _show(render_budget(budget))
    if picture:
        draw_budget(budget, picture)
    if budget.refusal:
        raise ConfigError(f"{budget.refusal}; --suggest shows layouts that fit")


def _budget(config: Config, gpus: int, gpu: str, mfu: float) -> Budget:
    from megatron_idea.config import validate
    from megatron_idea.engine.gpus import gpu_named
    from megatron_idea.planning.budget import Assumptions, make_budget

    validate(config, gpus)
    with Console(stderr=True).status("building the model on paper"):
        return make_budget(config, gpus, gpu_named(gpu), Assumptions(mfu=mfu))


def _suggest(config: Config, gpus: int, gpu: str, mfu: float, as_json: bool) -> None:
    from megatron_idea.config import ConfigError
    from megatron_idea.engine.gpus import gpu_named
    from megatron_idea.planning.budget import Assumptions, suggest
    from megatron_idea.planning.view import render_layouts

    kind = gpu_named(gpu)
    with Console(stderr=True).status("building the model on paper in many layouts"):
        fitting, refused = suggest(config, gpus, kind, Assumptions(mfu=mfu))
    if as_json:
        both = {"fitting": fitting, "refused": refused}
        rows = {name: [dataclasses.asdict(x) for x in layouts] for name, layouts in both.items()}
        typer.echo(json.dumps(rows, indent=2))
    else:
        _show(render_layouts(fitting, refused, kind))
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
    tokenizer: Annotated[
        str, typer.Option(metavar="PATH|byte", help="In place of the model's own.")
    ] = "",
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keeps what is done; go on from it if it is there."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model: held-out loss, perplexity, bits per byte, and tasks of the harness."""
    from megatron_idea.config import ConfigError
    from megatron_idea.evaluation.held_out import Options, evaluate_model
    from megatron_idea.evaluation.tasks import evaluate_tasks, tasks_of

    names, num_fewshot = tasks_of(suite, tasks, num_fewshot, data or [])
    if not names and (task_path or num_fewshot is not None):
        raise ConfigError("--task-path and --num-fewshot are for tasks: give --tasks NAME,...")
    if resume and names and not data:
        raise ConfigError("--resume keeps held-out loss, not tasks: give --data, or leave it out")
    options = Options(seq_length, batch_size, limit, tokenizer, resume)
    scores = {}
    if names:
        scores = evaluate_tasks(
            path, names, data or [], overrides or [], options, num_fewshot, task_path or []
        )
    measured = []
    if data or not names:
        measured = evaluate_model(path, data or [], overrides or [], options)
    if _rank() != 0:
        return
    if as_json:
        rows = [{"data": one.data} | one.as_dict() for one in measured]
        typer.echo(json.dumps({"model": str(path), "held_out": rows, "tasks": scores}, indent=2))
        return
    for one in measured:
        if data:
            _say(one.data)
        for name, value in one.as_dict().items():
            _say(f"{name:<14}{value:,}" if isinstance(value, int) else f"{name:<14}{value:.4f}")
    # A tag stands for several tasks and has no figure of its own.
    for name in names if set(names) <= set(scores) else scores:
        for metric, value in scores[name].items():
            _say(f"{name:<14}{metric:<18}{value:.4f}")


@app.command()
def compact(
    path: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT_OR_RUN", help="A run takes its latest checkpoint.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="RUN", help="New run folder, for the compacted checkpoint.")
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="WIDTHS", help="384, or one a layer: 384,256,...; default: the plan's."
        ),
    ] = "",
) -> None:
    """Remove masked or unimportant neurons from a checkpoint on disk, optimizer state included."""
    from megatron_idea.checkpoint.compact import compact_checkpoint
    from megatron_idea.config import ConfigError

    try:
        widths = [int(width) for width in to.split(",")] if to else []
    except ValueError as error:
        raise ConfigError(f"--to is {to!r}; give whole numbers, as in 384 or 384,256") from error
    _say(str(compact_checkpoint(path, out, widths)))


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
    from megatron_idea.config import ConfigError

    if len(runs) == 1:
        if out is not None:
            raise ConfigError("--out is for several runs; one is drawn into its own folder")
        _report(runs[0])
    else:
        _compare(runs, out)


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
    _show(render(rows))
    if any(row.is_fatal for row in rows):
        raise typer.Exit(1)


@app.command()
def export(
    path: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT_OR_RUN", help="A run takes its latest checkpoint.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    layout: Annotated[
        str,
        typer.Option(help="padded: any server loads it; compact: a width for each layer, few do."),
    ] = "padded",
    dtype: Annotated[
        str, typer.Option(metavar="bf16|fp32", help="Default: the run's own precision.")
    ] = "",
    tokenizer: Annotated[
        str, typer.Option(metavar="PATH|byte", help="In place of the run's, if it has moved.")
    ] = "",
    max_shard_gb: Annotated[float, typer.Option(help="Largest file of weights.")] = 5.0,
) -> None:
    """Write a checkpoint as a Hugging Face folder: LlamaForCausalLM or Qwen3ForCausalLM."""
    from megatron_idea.config import ConfigError
    from megatron_idea.huggingface.export import export_checkpoint

    if not math.isfinite(max_shard_gb):
        raise ConfigError(f"--max-shard-gb is {max_shard_gb}; it must be a finite number")
    done = export_checkpoint(
        path,
        out,
        layout=layout,
        dtype=dtype,
        tokenizer=tokenizer,
        max_shard_bytes=round(max_shard_gb * 1e9),
    )
    (kind,) = json.loads((done.path / "config.json").read_text())["architectures"]
    _say(
        f"{kind} of {done.parameters:,} parameters, {_megabytes(done.bytes)}: {done.path}\n"
        f"FFN widths {_widths(done.widths)}, of which live {_widths(done.live)}"
    )


@app.command("import")
def import_(
    folder: Annotated[
        Path, typer.Argument(metavar="HF_FOLDER", help="A dense Llama or Qwen3, in safetensors.")
    ],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="New run folder.")],
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="YAML", help="Data, schedule and the rest of the run."),
    ] = None,
    enlarge_ffn: Annotated[
        float,
        typer.Option(metavar="FACTOR", help="Widen every FFN so many times; the model stays."),
    ] = 1.0,
) -> None:
    """Start a run from a Hugging Face model, if wanted with wider FFNs that compute the same."""
    from megatron_idea.huggingface.import_ import import_checkpoint

    done = import_checkpoint(folder, run, config, overrides or [], enlarge_ffn=enlarge_ffn)
    before = _widths(done.widths_before)
    _say(f"FFN widths {_widths(done.widths)} ({before} in {folder}): {done.path}")
    _say(f"megatron-idea train {done.config_path}")
    for note in done.notes:
        _say(f"note: {note}")


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
    tokenizer: Annotated[
        str, typer.Option(metavar="PATH|byte", help="In place of the model's own.")
    ] = "",
) -> None:
    """Let a model go on from a prompt, in one process; a run's report shows what it wrote."""
    from megatron_idea.checkpoint.folder import complete
    from megatron_idea.evaluation.generate import remember, sample

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
        _say(one.prompt + one.text)
    if complete(path):
        remember(path, samples)


def _report(run_dir: Path) -> None:
    from megatron_idea import report as reports

    paths = reports.report(run_dir)
    _show(reports.closing_table(run_dir))
    _say(f"\nrun folder: {run_dir}\npicture:    {paths.picture}\npage:       {paths.page}")


def _compare(run_dirs: list[Path], out: Path | None) -> None:
    from megatron_idea import report as reports

    paths = reports.compare(run_dirs, out)
    _show(reports.comparison_table(run_dirs))
    _say(f"\npicture: {paths.picture}\npage:    {paths.page}")


def _model_parallel_size(config: Config) -> int:
    parallel = config.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size


def _is_worker() -> bool:
    """Whether a launcher (torchrun) started this process as one of a job's."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say_error(text: str) -> None:
    line = Text.assemble(("error: ", "bold"), text, style="red")
    Console(stderr=True).print(line, soft_wrap=True)


def quiet() -> None:
    """Keep megatron-core's and torch's notes to developers out of a run's log."""
    import warnings

    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", module=r"torch\.distributed", category=FutureWarning)
    for module in _TELLS_DEVELOPERS:
        logging.getLogger(f"megatron.core.{module}").addFilter(_is_for_users)


# Since 0.18 these log at each rebuild or save what callers of megatron-core should do otherwise.
_TELLS_DEVELOPERS = (
    "models.gpt.gpt_model",
    "distributed.distributed_data_parallel",
    "dist_checkpointing.strategies.common",
    "dist_checkpointing.strategies.torch",
)


def _is_for_users(record: logging.LogRecord) -> bool:
    text = record.getMessage().lower()
    return "deprecated" not in text and "full_param_layout" not in text


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _show(rendered: RenderableType) -> None:
    """Print tables and sentences. In a terminal tables fit its width as far as no word is cut.

    Sentences are left to the terminal to wrap. What is not a terminal gets unbroken lines.
    """
    console = Console()
    roomy = console.options.update(width=UNBROKEN)
    # rich measures a table without its edges' padding, and then takes that off once more.
    needed = Measurement.get(console, roomy, rendered).minimum + 2
    console.width = max(console.width, needed) if console.is_terminal else UNBROKEN
    console.print(rendered, soft_wrap=True)


def _some(paths: list[Path], most: int = 5) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(paths) - most:,} more" if len(paths) > most else ""
    return ", ".join(map(str, paths[:most])) + more


def _widths(widths: list[int]) -> str:
    """One number when all layers are equal."""
    return ", ".join(map(str, widths if len(set(widths)) > 1 else widths[:1]))


def _megabytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB"


def main() -> None:
    """Entry point of ``megatron-idea`` and ``python -m megatron_idea``."""
    app()
