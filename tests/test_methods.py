"""Every method, from training to the logits of stock transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf import ours, theirs, trained
from test_export import LARGE, TARGETS

from megatron_idea.config import METHODS, PruneTarget
from megatron_idea.huggingface.export import export_checkpoint
from megatron_idea.shape import Shape
from megatron_idea.testing import Workers, assert_close

pytest.importorskip("transformers", reason="needs megatron-idea[export]")

GOAL = 24_000
"""Of the 35 thousand weights that the enlarged model has."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in METHODS} | {
    "adapt_pruner as released": ("adapt_pruner", {"as_released": True, "moments": "reset"}),
    "efficient_llm with obs": ("efficient_llm", {"update": "obs"}),
    "efficient_llm to a shape": ("efficient_llm", {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_of_every_method_ends_as_a_stock_model(
    name: str, workers: Workers, tmp_path: Path
) -> None:
    strategy, settings = VARIANTS[name]
    method = METHODS[strategy]
    finds = method.finds_shape and name != "efficient_llm to a shape"
    target = {axis: TARGETS[axis] for axis in method.axes}
    config, _ = trained(
        workers, tmp_path / "run", 1, 12,
        model=LARGE | {"qk_layernorm": False, "share_embeddings_and_output_weights": False},
        prune={
            "strategy": strategy, "compact": True, "channel_alignment": 4, "layer_candidates": 0,
            "target": PruneTarget(**({"parameters": GOAL} if finds else target)), **settings,
        },
    )  # fmt: skip
    result = export_checkpoint(tmp_path / "run", tmp_path / "out")
    full, left = Shape.full(config.model), result.live.parameters(config.model).total
    assert left < full.parameters(config.model).total
    if finds:
        coarsest = full.with_counts("hidden_size", full.hidden_size - 4)
        block = full.parameters(config.model).total - coarsest.parameters(config.model).total
        assert GOAL - block <= left <= GOAL
    else:
        for axis in target:
            assert set(result.live.counts(axis)) == {target[axis]}
    assert_close(theirs(tmp_path / "out")[0], ours(workers, tmp_path / "run"), "logits", 1e-5)
