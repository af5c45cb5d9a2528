"""Start and stop the processes of a run; one ProcessGroups value says who talks to whom."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import megatron.core.distributed
import megatron.core.models.gpt
import megatron.core.optimizer
import megatron.core.pipeline_parallel  # noqa: F401  (loaded here so that cpu.install sees all)
import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_idea.config import ConfigError, ParallelConfig
from megatron_idea.engine import cpu


@dataclass(frozen=True)
class ProcessGroups:
    """The process groups of this rank. Sizes multiply: world = TP x PP x DP."""

    collection: ProcessGroupCollection = field(repr=False)
    """The same groups in the form that megatron-core's parts take."""
    device: torch.device

    @property
    def world(self) -> dist.ProcessGroup:
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.collection.pp

    @property
    def dp(self) -> dist.ProcessGroup:
        """Ranks that read different samples of a batch."""
        return self.collection.dp

    @property
    def shards(self) -> dist.ProcessGroup:
        """Ranks over which gradients are reduced and the optimizer's state is split: DP x CP."""
        return self.collection.dp_cp

    @property
    def layout(self) -> str:
        """Say the sizes: TP 2 x PP 1 x DP 4."""
        return f"TP {self.tp.size()} x PP {self.pp.size()} x DP {self.dp.size()}"

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the run folder's logs."""
        return dist.get_rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp.rank() == self.pp.size() - 1


def device() -> torch.device:
    """The device of this process: its current GPU, or the CPU without CUDA."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def on_device(tensor: Tensor, target: torch.device) -> Tensor:
    """``tensor`` on ``target``; the host does not wait for the copy of one that is on the CPU."""
    if target.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(target, non_blocking=True)


def world_size_from_environment() -> int:
    """Processes of this job: what torchrun set, else 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_interface() -> None:
    """Tell gloo the network interface to use, where it would fail to find one by itself.

    It asks for the address of this machine's own name. Processes of one machine need none, and a
    name that is not known, or means 127.0.0.1 only, is of no use to other nodes.

    Raises: ConfigError that names the host when there is no way to the first node.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    world_size = world_size_from_environment()
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == world_size:
        target = "127.0.0.1"
    elif "MASTER_ADDR" in os.environ and not _has_an_address(socket.gethostname()):
        target = os.environ["MASTER_ADDR"]
    else:
        return
    name = _interface_towards(target)
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name
    elif target != "127.0.0.1":
        raise ConfigError(
            f"host {socket.gethostname()} has no address under its own name, and no way to the "
            f"first node, {target}, was found; add the name to /etc/hosts, or name the network "
            "interface in GLOO_SOCKET_IFNAME"
        )


def _has_an_address(host: str) -> bool:
    """Whether ``host`` resolves to an address that other machines can reach."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    addresses = [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found]
    return any(not address.is_loopback for address in addresses)


def _interface_towards(host: str) -> str | None:
    """The interface whose address this machine would send from; nothing is sent."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            mine = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == mine for one in addresses):
            return name
    return None


def let_threads_finish() -> None:
    """Keep threads on their core while they wake others: on Linux, ``SCHED_BATCH``.

    gloo passes a message through several threads. A woken one that takes the core of a thread which
    still holds their lock polls until it is let go: between two processes on two cores an
    all-reduce of 2 KB took 1.1 ms, and takes 0.3 ms. Threads that begin later do as this one.
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def start_distributed(
    parallel: ParallelConfig,
    seed: int,
    rendezvous: str | None = None,
    choose: Callable[[], ParallelConfig] | None = None,
) -> ProcessGroups:
    """Join the job: torch.distributed, model-parallel groups, random-number streams.

    ``rendezvous`` is an ``init_method`` (tests use ``file://``) for the RANK and WORLD_SIZE of the
    environment; without it torchrun's variables are used, and without those the job is one process.
    Backend: NCCL with CUDA (gloo beside it for CPU tensors), gloo without.
    """
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    cpu.install()
    if not dist.is_initialized():
        choose_interface()
        if not has_cuda:
            let_threads_finish()
        backend = "cpu:gloo,cuda:nccl" if has_cuda else "gloo"
        timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
        # NCCL then connects at once: a broken link shows here, not in the first step.
        bound = device() if has_cuda else None
        if rendezvous is None and "RANK" not in os.environ:
            dist.init_process_group(
                backend,
                store=dist.HashStore(),
                rank=0,
                world_size=1,
                timeout=timeout,
                device_id=bound,
            )
        else:
            dist.init_process_group(
                backend,
                init_method=rendezvous or "env://",
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                timeout=timeout,
                device_id=bound,
            )
    if choose is not None:
        parallel = choose()
    vpp = parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        create_gloo_process_groups=False,  # the optimizer is told not to use any
        distributed_timeout_minutes=max(1, round(parallel.distributed_timeout_minutes)),
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ProcessGroups(ProcessGroupCollection.use_mpu_process_groups(), device())


def regroup(groups: ProcessGroups, parallel: ParallelConfig, seed: int) -> ProcessGroups:
    """Group the same processes anew; collective, and nothing of the old groups can be used.

    Random-number streams begin again from the seed.
    """
    forget_rotary_cache()
    old = {id(group): group for group in vars(groups.collection).values()}
    parallel_state.destroy_model_parallel()
    dist.barrier()
    for group in old.values():
        for one in group if isinstance(group, list) else [group]:
            if isinstance(one, dist.ProcessGroup) and one is not dist.group.WORLD:
                dist.destroy_process_group(one)
    return start_distributed(parallel, seed)


def stop_distributed() -> None:
    """Leave the job; the process may start another."""
    forget_rotary_cache()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def abandon_distributed() -> None:
    """Leave a job in which something has failed.

    With NCCL without a word: it ends a communicator when all ranks end it, and the others may be
    waiting for this one. When this process is gone the launcher ends them.
    """
    if not torch.cuda.is_available():
        stop_distributed()


@contextlib.contextmanager
def joined(
    parallel: ParallelConfig,
    seed: int,
    rendezvous: str | None = None,
    choose: Callable[[], ParallelConfig] | None = None,
) -> Iterator[ProcessGroups]:
    """Be part of the job while the block runs; arguments as ``start_distributed``'s.

    Args:
        choose: names the layout in place of ``parallel`` once all processes have met; collectives
            are possible in it.
    """
    try:
        yield start_distributed(parallel, seed, rendezvous, choose)
    except BaseException:
        abandon_distributed()
        raise
    stop_distributed()


def forget_rotary_cache() -> None:
    """Let go of rotary modules: megatron-core's ``lru_cache`` on their class pins each for ever.

    Through hooks and process groups a pinned module keeps a whole model and gloo's threads alive.
    """
    RotaryEmbedding.forward.cache_clear()


def forget_dummy_gradients() -> None:
    """Let go of what Transformer Engine hands autograd where a gradient went to its buffer already.

    It keeps one tensor for each shape of weight that it has seen, as large as the weight.
    """
    base = sys.modules.get("transformer_engine.pytorch.module.base")
    getattr(base, "_dummy_wgrads", {}).clear()


def any_rank(flag: bool, groups: ProcessGroups) -> bool:
    """Whether ``flag`` is set on at least one rank; a collective over all ranks."""
    if groups.world.size() == 1:
        return flag
    word = torch.tensor([int(flag)], device=groups.device)
    dist.all_reduce(word, op=dist.ReduceOp.MAX)
    return bool(word.item())


def agree_or_raise(error: Exception | None, groups: ProcessGroups) -> None:
    """Raise on all ranks when one has an error, so that none waits for a rank that is gone.

    The others raise what the first failed rank says: rank 0 is the one that people hear.
    """
    if not any_rank(error is not None, groups):
        return
    said: list[tuple[type[Exception], str] | None] = [None] * groups.world.size()
    dist.all_gather_object(said, None if error is None else (type(error), str(error)))
    if error is not None:
        raise error
    rank, (kind, text) = next((r, word) for r, word in enumerate(said) if word is not None)
    if kind.__module__.startswith("megatron_idea."):
        raise kind(f"rank {rank}: {text}")
    raise RuntimeError(f"rank {rank} failed: {text}")


def together(action: Callable[[], Any], groups: ProcessGroups) -> Any:
    """Run ``action`` (no collectives inside) on every rank; raise on all if it failed on one."""
    error: Exception | None = None
    result = None
    try:
        result = action()
    except Exception as caught:  # carried to agree_or_raise, which raises it
        error = caught
    agree_or_raise(error, groups)
    return result


def assert_same_on_all_ranks(content: bytes, what: str, groups: ProcessGroups) -> str:
    """Compare a SHA-256 of ``content`` over all ranks; returns the hex digest.

    Raises: RuntimeError on every rank when any two differ.
    """
    digest = hashlib.sha256(content).digest()
    if groups.world.size() > 1:
        mine = on_device(torch.frombuffer(bytearray(digest), dtype=torch.uint8), groups.device)
        everyones = torch.empty(
            groups.world.size() * mine.numel(), dtype=torch.uint8, device=mine.device
        )
        dist.all_gather_into_tensor(everyones, mine)
        if not bool((everyones.view(-1, mine.numel()) == mine).all()):
            raise RuntimeError(f"{what} differs between ranks; stopping before anything is changed")
    return digest.hex()


def memory_bytes() -> int:
    """Memory in use by this process: allocated on its GPU, or resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


class PeakMemory:
    """Highest memory in use by this process since this was made: on its GPU, or resident without.

    Where the kernel cannot tell (no Linux) it is what is in use when asked.
    """

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # forget the old high-water mark

    @property
    def bytes(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
        return memory_bytes()
