"""A model card says what the run knows: where it began, what it measured, what is still to say."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hf import trained
from jobs import train_on

from megatron_idea import checkpoint
from megatron_idea import config as configuration
from megatron_idea.checkpoint.branch import _branch
from megatron_idea.checkpoint.compact import compact_checkpoint
from megatron_idea.checkpoint.state import TrainState
from megatron_idea.config import Config, replace
from megatron_idea.huggingface.card import (
    Facts,
    HeldOut,
    Origin,
    model_card,
    plain,
    what_it_is,
)
from megatron_idea.huggingface.export import export_checkpoint
from megatron_idea.huggingface.import_ import import_checkpoint
from megatron_idea.shape import Shape
from megatron_idea.testing import Workers

PLAIN = ["prune.strategy=none", "prune.alignment=2"]
hub = pytest.importorskip("huggingface_hub", reason="needs megatron-idea[export]")


@pytest.fixture(scope="module")
def folder(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a run without held-out data, from before its removal is done."""
    where = tmp_path_factory.mktemp("card")
    trained(workers, where / "run", 1, 6, model={"qk_layernorm": False})
    export_checkpoint(where / "run", where / "out")
    return where / "out"


def head(folder: Path) -> dict[str, Any]:
    _, text, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(text)


def test_a_run_that_began_here_leaves_the_license_to_its_owner(folder: Path) -> None:
    assert head(folder) == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["megatron-idea", "pruned"],
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "To fill in above before this is published: `license` is not known." in card
    assert "Held-out" not in card and "began with" not in card and "chat template" not in card
    digest = hashlib.sha256((folder / "pruning.json").read_bytes()).hexdigest()
    assert f"SHA-256 of `pruning.json`: {digest}" in card


README = """---
license: other
license_name: "free: as in \\"speech\\""
license_link: https://example.org/license
---
# Theirs
"""


def in_hub_cache(folder: Path, to: Path) -> Path:
    snapshot = to / "models--some-org--a_model.v2/snapshots/0123abcd"
    shutil.copytree(folder, snapshot)
    return snapshot


def test_name_and_license_of_an_imported_model_reach_every_export_of_its_descendants(
    folder: Path, tmp_path: Path
) -> None:
    source = in_hub_cache(folder, tmp_path)
    (source / "README.md").write_text(README)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    import_checkpoint(source, tmp_path / "imported", None, PLAIN)
    shutil.copytree(folder.parent / "run", tmp_path / "went_on")
    shutil.copy(tmp_path / "imported" / checkpoint.ORIGIN, tmp_path / "went_on")
    compact_checkpoint(tmp_path / "went_on", tmp_path / "small")
    found = checkpoint.resolve(tmp_path / "went_on")
    config = replace(checkpoint.read_config(found), run_dir=str(tmp_path / "branched"))
    _branch(config, found, tmp_path / "branched/checkpoints" / found.name)
    for run in ("imported", "went_on", "small", "branched"):
        export_checkpoint(tmp_path / run, tmp_path / f"{run}_out")
        said = head(tmp_path / f"{run}_out")
        assert list(said)[:4] == ["license", "license_name", "license_link", "base_model"]
        assert said["license"] == "other" and said["license_name"] == 'free: as in "speech"'
        assert said["license_link"] == "https://example.org/license"
        assert said["base_model"] == "some-org/a_model.v2"
        card = (tmp_path / f"{run}_out/README.md").read_text()
        assert "| began with | some-org/a_model.v2 |" in card and "To fill in" not in card
    imported = tmp_path / "imported_out"
    assert (imported / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "The chat template is the tokenizer's" in (imported / "README.md").read_text()
    (tmp_path / "small" / checkpoint.ORIGIN).write_text("[]")
    export_checkpoint(tmp_path / "small", tmp_path / "again")
    assert "base_model" not in head(tmp_path / "again")


BOMB = "a: &a [1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "", "no front matter", "---\nlicense: mit\n", "---\n- mit\n---\n", "---\n{: [\n---\n",
        "---\nlicense: [mit, gpl]\n---\n", '---\nlicense: "a\\nb: c"\n---\n',
        f"---\nlicense: {'m' * 201}\n---\n", "---\nlicense: !!python/name:os.system\n---\n",
        f"---\nlicense: mit\n{BOMB}---\n",
        f"---\nlicense: mit\n---\n{'x' * (1 << 20)}",
    ],
)  # fmt: skip
def test_what_a_strangers_readme_says_is_a_short_word_or_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert Origin.of_folder(tmp_path) == Origin(base_model=tmp_path.name)


def test_a_license_in_a_file_of_that_folder_is_not_linked(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n")
    assert Origin.of_folder(tmp_path) == Origin(tmp_path.name, "other")
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").symlink_to(__file__)
    assert Origin.of_folder(tmp_path).license == ""


def test_a_held_out_figure_is_that_of_the_exported_step(
    workers: Workers, tiny: Config, tmp_path: Path
) -> None:
    workers.run(train_on, 1, tiny)
    run = Path(tiny.run_dir)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    state = checkpoint.read_state(checkpoint.resolve(run))
    (last,) = [e for e in events if e["kind"] == "evaluated" and e["step"] == state.step]
    export_checkpoint(run, tmp_path / "out")
    card = hub.ModelCard.load(tmp_path / "out/README.md")
    found = {one.metric_type: one for one in card.data.eval_results}
    assert found["loss"].metric_value == last["val_loss"]
    name = Path(tiny.data.validation[0].prefix).name
    scored = tiny.evaluation.num_samples * tiny.training.seq_length
    assert last["scored_tokens"] == scored
    assert found["loss"].dataset_name == name and found["loss"].dataset_args == {
        "step": state.step, "consumed_tokens": state.consumed_tokens, "scored_tokens": scored,
    }  # fmt: skip
    assert f"loss {last['val_loss']:.4f} nats per token over {scored:,} tokens of" in card.text
    early = checkpoint.complete(run)[0]
    if checkpoint.read_state(early).step not in {e["step"] for e in events if "val_loss" in e}:
        export_checkpoint(early, tmp_path / "early")
        assert "model-index" not in head(tmp_path / "early")
    # A figure that is none, and one of weights that a compaction may have changed.
    config = checkpoint.read_config(checkpoint.resolve(run))
    for wrong in ({"val_loss": float("nan")}, {"why": "compaction_after"}, {"tokens": 1}):
        (run / "events.jsonl").write_text(json.dumps(last | wrong) + "\n")
        assert HeldOut.of_run(run, config, state) is None
    del last["scored_tokens"]
    (run / "events.jsonl").write_text(json.dumps(last) + "\n")
    assert HeldOut.of_run(run, config, state) == HeldOut(last["val_loss"], name, None)


def test_a_card_says_when_and_how_it_was_pruned(folder: Path, tmp_path: Path) -> None:
    config = configuration.from_dict({})
    full = Shape.full(config.model)
    small = full.with_counts("ffn_hidden_size", 384)
    half = config.schedule.total_tokens // 2

    def said(tokens: int, live: Shape, origin: Origin = Origin(), **sections: Any) -> str:  # noqa: B008
        run = replace(config, **sections)
        state = replace(TrainState.fresh(run), consumed_tokens=tokens)
        return what_it_is(run, state, full, live, origin).removeprefix("A GPT ")

    plain_run = {"prune": {"strategy": "none"}}
    one = "that was pruned while it trained, under one learning-rate curve"
    assert said(half * 2, small) == f"{one}."
    two = said(half * 2, small, schedule={"kind": "restarted"})
    assert two == f"{one.replace('one', 'two')}s, one after the other."
    assert said(1, full) == "from which nothing has been removed yet."
    assert said(half * 2, full, **plain_run) == "from which nothing has been removed."
    assert said(half * 2, small, **plain_run) == "that was pruned while it trained."
    cut = Origin(cut="wanda, to ffn_hidden_size 384")
    assert said(0, small, cut) == "that was pruned on disk, by wanda, to ffn_hidden_size 384."
    assert said(half * 2, small, cut).startswith(f"{one}, and on disk, by wanda, to")
    assert "pruned" not in yaml.safe_load(a_card(config).split("---\n")[1])["tags"]
    # And compact writes it down, for all that comes of it.
    compact_checkpoint(folder.parent / "run", tmp_path / "cut", {"ffn_hidden_size": [16]})
    assert Origin.of_run(tmp_path / "cut").cut == "the scores of its run, to ffn_hidden_size 16"
    export_checkpoint(tmp_path / "cut", tmp_path / "out")
    assert "on disk, by the scores of its run, to" in (tmp_path / "out/README.md").read_text()
    assert "cut" not in head(tmp_path / "out")


def a_card(config: Config, **facts: Any) -> str:
    full = Shape.full(config.model)
    given = {
        "about": "A GPT.", "layout": "padded", "dtype": "fp32", "full": full, "live": full,
        "shape": full, "parameters": 1, "digest": "0" * 64, "origin": Origin(), "held_out": None,
        "has_chat_template": False,
    }  # fmt: skip
    return model_card(config, TrainState.fresh(config), Facts(**given | facts))


def test_a_card_names_the_number_of_parameters_and_no_forecast() -> None:
    target = {"ffn_hidden_size": 64, "parameters": 1_200_000}
    prune = {"strategy": "adapt_pruner", "target": target}
    card = a_card(configuration.from_dict({"prune": prune}))
    assert "| pruning | strategy adapt_pruner, target parameters 1,200,000, ema" in card


def test_names_cannot_add_keys_cells_or_markup() -> None:
    name = 'x"\nlicense: mit\n---\n| a |<b>`'
    config = replace(configuration.from_dict({}), run_dir=f"runs/{name}")
    origin = Origin("a: b # c", "mit|<script>")
    held_out = HeldOut(800.0, name, 7)
    card = a_card(config, origin=origin, held_out=held_out, has_chat_template=True)
    _, front, rest = card.split("---\n", 2)
    said = yaml.safe_load(front)
    assert said["license"] == "mit|<script>" and said["base_model"] == "a: b # c"
    assert [metric["type"] for metric in said["model-index"][0]["results"][0]["metrics"]] == [
        "loss"
    ]
    assert "<b>" not in rest.replace("\\<", "") and "\\| a \\|" in rest
    assert rest.count("\n# ") == 1 and "# x" in rest
    assert "`base_model` is the name of a folder" in rest and "chat template is the" in rest
    assert plain("a\u202eb\tc_d") == "a b c_d" and len(plain("x" * 999)) == 200
