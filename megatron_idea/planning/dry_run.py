"""Be a rank of a job of any size, without the job: no memory, no messages.

Inside ``dry_run`` every new tensor is on torch's meta device and the process groups are fake ones
of the full world size: model, optimizer, schedule and compaction run by the code that a run uses.
What they would send is counted on the way, and by ``LiveBytes`` what they would keep in memory.

Layers are megatron-core's local ones, as on a CPU, also where Transformer Engine is installed: its
kernels do not know the meta device. Attention counts as a fused kernel that keeps query, key,
value, output and one fp32 number a row.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_idea.config import Config
from megatron_idea.engine import cpu
from megatron_idea.engine.distributed import ProcessGroups, stop_distributed
from megatron_idea.engine.trainable import modules_left_alone

META = torch.device("meta")


class _Functions(TorchFunctionMode):
    """Answers as the device of a run would, where the meta device says something else."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            # On the meta device it would take the plain formula, which keeps all the scores.
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(
                *args, kwargs["dropout_p"], kwargs["is_causal"], scale=kwargs.get("scale")
            )[0]
        result = func(*args, **kwargs)
        if isinstance(result, str) and result.startswith(("torch.meta.", "torch.cuda.meta.")):
            # Tensor.type(), by which the optimizer sorts; without CUDA cpu.py adds that word.
            prefix = "torch.cuda." if torch.cuda.is_available() else "torch."
            return prefix + result.rpartition(".")[2]
        return result


@functools.cache
def _takes_device(op: Any) -> bool:
    return any(argument.name == "device" for argument in op._schema.arguments)


@functools.cache
def _group_position(op: Any) -> int:
    return [argument.name for argument in op._schema.arguments].index("process_group")


class _Operations(TorchDispatchMode):
    """Puts every new tensor on the meta device; collectives return at once and are counted.

    ``sent``: bytes that this rank sends, by (ranks of the group, whether after the micro-batches).
    A ring is assumed: of n ranks, an all-reduce of b bytes sends 2 b (n - 1) / n from each, a
    gather or reduce-scatter half of that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[tuple[tuple[int, ...], bool]] = Counter()
        self.finishing = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self._count(func, args)
            work = FakeWork().boxed()
            return (args[0], work) if len(func._schema.returns) == 2 else work
        if func is torch.ops.aten.lift_fresh.default:  # torch.tensor(...) makes its own on the CPU
            return args[0].to(META)
        # A number next to a tensor, which may be a real one on the CPU, stays where it is.
        if _takes_device(func) and func is not torch.ops.aten.scalar_tensor.default:
            kwargs = {**kwargs, "device": META}
        return func(*args, **kwargs)

    def _count(self, op: Any, args: Any) -> None:
        name = op._schema.name.removeprefix("c10d::")
        if name in ("recv_", "barrier"):  # its sender counts a message
            return
        group = dist.ProcessGroup.unbox(args[_group_position(op)])
        size = max(sum(_bytes(x) for x in _tensors(arg)) for arg in args[:2])
        share = (group.size() - 1) / group.size()
        if name == "alltoall_base_":
            splits, size = args[4], _bytes(args[1])
            share = 1 - splits[group.rank()] / sum(splits) if size else 0.0
        times = 1.0 if name == "send" else 2 * share if name.startswith("allreduce") else share
        ranks = tuple(dist.get_process_group_ranks(group))
        self.sent[ranks, self.finishing] += round(times * size)


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _tensors(item)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of living tensors, and the most there were at once; of real or meta tensors.

    Every storage that an operation returns counts until it is freed or resized. What an operation
    uses inside itself, and what an allocator loses to rounding, is not seen. ``existing`` tensors
    count from the start.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in existing:
            self._note(tensor.untyped_storage())

    def __enter__(self) -> LiveBytes:
        original = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> Any:
            result = original(storage, size)
            if storage._cdata in self._sizes:
                self._set(storage._cdata, size)
            return result

        self._resizing = mock.patch.object(torch.UntypedStorage, "resize_", resize)
        self._resizing.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._resizing.stop()
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        if storage._cdata not in self._sizes:
            self._set(storage._cdata, storage.nbytes())
            weakref.finalize(storage, self._forget, storage._cdata)

    def _set(self, key: int, size: int) -> None:
        self.live += size - self._sizes.get(key, 0)
        self.peak = max(self.peak, self.live)
        self._sizes[key] = size

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


@dataclass(frozen=True)
class DryRun:
    """A rank of a job that there is not. Made by ``dry_run``."""

    groups: ProcessGroups
    operations: _Operations


def _echo(gathered: list[Any], own: Any, group: Any = None) -> None:
    """Stand for ``all_gather_object`` where all ranks say the same."""
    gathered[:] = [own] * len(gathered)


def _one_by_one(messages: Sequence[dist.P2POp]) -> list[Any]:
    """Stand for ``batch_isend_irecv``, which asks for a backend of the meta device."""
    return [m.op(m.tensor, m.peer, m.group, m.tag) for m in messages]


@contextlib.contextmanager
def dry_run(config: Config, world_size: int, pipeline_rank: int = 0) -> Iterator[DryRun]:
    """Be the first rank of pipeline stage ``pipeline_rank`` in a job of ``world_size``.

    No process group and no random-number state outlives it, also after an error.
    """
    assert not dist.is_initialized(), "this process is in a job"
    parallel = config.parallel
    rank = pipeline_rank * (world_size // parallel.pipeline_model_parallel_size)
    vpp = parallel.virtual_pipeline_model_parallel_size
    cpu.install()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"(megatron\.core|torch\.distributed)")
        for seen_in_megatron_core in ("TypedStorage is deprecated", "The .grad attribute of a T"):
            warnings.filterwarnings("ignore", seen_in_megatron_core)
        stack.enter_context(modules_left_alone())
        stack.enter_context(torch.random.fork_rng())
        stack.callback(stop_distributed)
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        groups = ProcessGroups(ProcessGroupCollection.use_mpu_process_groups(), META)
        # No Transformer Engine, no fused weight gradients, see above.
        stack.enter_context(mock.patch("megatron_idea.engine.model.find_spec", lambda _: None))
        stack.enter_context(mock.patch("torch.distributed.all_gather_object", _echo))
        stack.enter_context(mock.patch("torch.distributed.batch_isend_irecv", _one_by_one))
        operations = stack.enter_context(_Operations())
        stack.enter_context(_Functions())
        yield DryRun(groups, operations)
