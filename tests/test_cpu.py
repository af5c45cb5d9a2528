"""megatron-core without CUDA: what ``install`` changes, and what it must leave alone."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch
from jobs import backward, on_ranks

from megatron_idea.config import Config
from megatron_idea.shape import Shape
from megatron_idea.testing import assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is installed with CUDA")


@on_ranks(1)
def test_installing_again_is_harmless_and_treats_what_was_loaded_since(
    groups: ProcessGroups, config: Config
) -> None:
    import megatron.core.optimizer as core_optimizer
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    from megatron_idea.engine import cpu

    def patched() -> list[object]:
        init = core_optimizer.DistributedOptimizer.__init__
        return [init, clip_grads.clip_grad_by_total_norm_fp32, CudaRNGStatesTracker.fork]

    before = patched()
    core_optimizer.torch = torch  # as a module has it that was just imported
    assert cpu.install() is True
    assert core_optimizer.torch is not torch
    assert cpu.install() is True
    assert patched() == before, "wrapped twice"


@on_ranks(1)
def test_torch_itself_still_knows_that_there_is_no_cuda(
    groups: ProcessGroups, config: Config
) -> None:
    from megatron_idea.engine.optimizer import update
    from megatron_idea.engine.trainable import assemble

    name = torch.Tensor.type
    trainable = assemble(config.sections, groups, Shape.full(config.model), initialize=True)
    backward(trainable)
    update(trainable.optimizer, 1e-3)
    assert torch.Tensor.type is name
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert not torch.cuda.is_available()
    for ask in (
        torch.cuda.current_device,
        torch.cuda.synchronize,
        lambda: torch.empty(1, device="cuda"),
        lambda: torch.zeros(1).to("cuda"),
    ):
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
            ask()
    ours = [
        module
        for name, module in sys.modules.items()
        if name.startswith("megatron_idea") and hasattr(module, "torch")
    ]
    assert ours
    assert all(module.torch is torch for module in ours)


@on_ranks(1)
def test_megatron_cores_cuda_means_the_cpu(groups: ProcessGroups, config: Config) -> None:
    from megatron.core.optimizer import distrib_optimizer

    view = distrib_optimizer.torch
    assert view is not torch
    assert view.cuda.current_device() == torch.device("cpu")
    for made in (
        view.empty(2, device="cuda"),
        view.zeros(2, device=torch.device("cuda", 0)),
        view.tensor([1.0], device=view.cuda.current_device()),
        view.ones(2),
        torch.ones(2).cuda(),
    ):
        assert made.device.type == "cpu"
    assert view.zeros(2, device="meta").device.type == "meta"
    view.cuda.synchronize()
    view.cuda.current_stream().wait_stream(view.cuda.Stream())
    with view.cuda.stream(view.cuda.Stream()):
        pass
    # What is not replaced is torch's own.
    assert view.Tensor is torch.Tensor
    assert view.cuda.is_available is torch.cuda.is_available


@on_ranks(1)
def test_type_names_are_cudas_inside_only_even_after_an_error(
    groups: ProcessGroups, config: Config
) -> None:
    from megatron_idea.engine.cpu import _cuda_type_names

    with _cuda_type_names():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1).type(torch.float64).dtype == torch.float64
    with pytest.raises(ZeroDivisionError), _cuda_type_names():
        raise ZeroDivisionError
    assert torch.zeros(1).type() == "torch.FloatTensor"


@on_ranks(1)
def test_a_forked_stream_of_random_numbers_leaves_the_outer_one_where_it_was(
    groups: ProcessGroups, config: Config
) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    with tracker.fork():
        first = torch.rand(2)
    with tracker.fork():
        second = torch.rand(2)
    assert_equal(torch.rand(4), expected, "outside")
    assert not torch.equal(first, second), "the stream moves on"
    assert not torch.equal(first, expected[:2])
    tracker.set_states(states)
    with pytest.raises(ZeroDivisionError), tracker.fork():
        assert_equal(torch.rand(2), first, "inside, from the same state")
        raise ZeroDivisionError
    with tracker.fork():
        assert_equal(torch.rand(2), second, "an error inside loses nothing")


@on_ranks(2, tensor_model_parallel_size=2)
def test_tensor_parallel_ranks_draw_different_numbers_inside_and_the_same_outside(
    groups: ProcessGroups, config: Config
) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    def of_both(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = values.new_empty(2 * values.numel())
        torch.distributed.all_gather_into_tensor(both, values, group=groups.tp)
        return both.chunk(2)

    left, right = of_both(torch.rand(4))
    assert_equal(left, right, "outside")
    with get_cuda_rng_tracker().fork():
        left, right = of_both(torch.rand(4))
    assert not torch.equal(left, right)
