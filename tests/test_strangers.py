"""Files that somebody else wrote: what is not data is refused in one line, and nothing runs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from records import neurons, record
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_idea import checkpoint, files
from megatron_idea import config as configuration
from megatron_idea.checkpoint import storage
from megatron_idea.checkpoint.index import (
    ForeignError,
    Piece,
    check_common,
    check_pieces,
    read_index,
)
from megatron_idea.checkpoint.state import FORMAT, CheckpointError
from megatron_idea.config import Config, ConfigError, ModelConfig, replace
from megatron_idea.data.batches import Batches
from megatron_idea.data.documents import DataError
from megatron_idea.data.indexed import check_dataset
from megatron_idea.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_idea.data.tokenizing import tokenize
from megatron_idea.huggingface import names as huggingface
from megatron_idea.huggingface.export import export_checkpoint
from megatron_idea.huggingface.import_ import _Folder
from megatron_idea.huggingface.names import checkpoint_name
from megatron_idea.prune.axis import whole_shapes
from megatron_idea.prune.plan import misfit, table_size
from megatron_idea.records.terminal import CONTROL, Console
from megatron_idea.report import tables
from megatron_idea.report.page import page
from megatron_idea.report.run import read_run
from megatron_idea.report.watch import View
from megatron_idea.shape import AXES, Shape
from megatron_idea.testing import Workers

OURS = (ConfigError, DataError, CheckpointError, storage.DamagedError)
BYTE = load_tokenizer("byte")

# --------------------------------------------------------------------------- did anything run?

DEEDS = {
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect",
    "marshal.loads", "pickle.find_class", "ctypes.dlopen", "os.remove", "os.rename",
}  # fmt: skip
_watching: list[list[str]] = []


def _note(event: str, _arguments: Any) -> None:
    if _watching and event in DEEDS:
        code = sys._getframe(1).f_code.co_filename  # an import reads byte code, too
        if event != "marshal.loads" or not code.startswith("<frozen importlib"):
            _watching[-1].append(event)


sys.addaudithook(_note)  # for good: Python has no way to take one off


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    deeds: list[str] = []
    _watching.append(deeds)
    try:
        yield
    finally:
        _watching.pop()
    assert deeds == []


def refused(action: Callable[[], Any], *kinds: type[Exception]) -> str:
    """What is said; nothing runs, and it is one of our errors, of one line."""
    with nothing_runs(), pytest.raises(kinds or OURS) as caught:
        action()
    return one_line(caught.value)


def one_line(error: Exception) -> str:
    """As the command says it: YAML's own messages have several."""
    line = " ".join(str(error).split()).translate(CONTROL)
    assert line and line.isprintable() and len(line) < 5000, line
    return line


# ---------------------------------------------------------------------------------- a checkpoint


def entry(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> TensorStorageMetadata:
    size = torch.Size(shape)
    chunks = [ChunkStorageMetadata(torch.Size([0] * len(shape)), size)]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def metadata_of(tensors: dict[str, torch.Tensor]) -> tuple[Metadata, bytes]:
    """An index of tensors, and the file that it names."""
    content = BytesIO()
    slices = {}
    for name, tensor in tensors.items():
        begin = content.tell()
        torch.save(tensor, content)
        place = MetadataIndex(name, torch.Size([0] * tensor.dim()))
        slices[place] = _StorageInfo("__0_0.distcp", begin, content.tell() - begin)
    entries: Any = {name: entry(tuple(x.shape), x.dtype) for name, x in tensors.items()}
    return Metadata(entries, None, slices, StorageMeta("here", "1")), content.getvalue()


SMALL = ModelConfig(
    num_layers=2, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=1,
    kv_channels=4, vocab_size=16,
)  # fmt: skip
SHAPE = Shape.full(SMALL).with_counts("ffn_hidden_size", (8, 4))
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.alive": torch.ones(4, dtype=torch.bool)}
STATE = {
    "format": FORMAT, "megatron_core": "0.16.1", "step": 3, "consumed_tokens": 96,
    "shape": SHAPE.as_dict(), "adam_step": 3, "skipped": 0, "skipped_samples": 0,
    "watch": {"average": 2.5, "steps": 3, "in_spike": False, "bad_in_row": 0, "rollbacks": 0},
    "pending_steps": 0, "memory": [0.5], "plan_due": False,
    "layout": {"tp": 1, "pp": 1, "dp": 1, "cuda": 0},
}  # fmt: skip


def seal(folder: Path) -> None:
    """List all files in the manifest, as a stranger can, too."""
    names = [file for file in sorted(folder.iterdir()) if file.name != storage.MANIFEST]
    entries = {file.name: storage.describe(file) for file in names}
    (folder / storage.MANIFEST).write_text(json.dumps({"files": entries}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A whole checkpoint of two tensors."""
    folder = tmp_path / "saved"
    folder.mkdir()
    index, content = metadata_of(TENSORS)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    (folder / "__0_0.distcp").write_bytes(content)
    torch.save({}, folder / "common.pt")
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends))
    (folder / "state.json").write_text(json.dumps(STATE))
    (folder / "config.yaml").write_text("model: {num_layers: 2}\n")
    seal(folder)
    storage.verify(folder)
    return folder


def put_index(folder: Path, index: Any) -> None:
    (folder / ".metadata").write_bytes(index if type(index) is bytes else pickle.dumps(index))
    seal(folder)


class Deadly:
    """What an attacker would put into a pickle."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def program(*parts: bytes | tuple[str, str]) -> bytes:
    """A pickle from its instructions; a pair is a global."""
    body = b""
    for part in parts:
        names = [n.encode() for n in part] if isinstance(part, tuple) else []
        body += b"".join(b"\x8c" + bytes([len(n)]) + n for n in names) + b"\x93" if names else part  # type: ignore[operator]
    return b"\x80\x04" + body + b"."


META = "torch.distributed.checkpoint.metadata"
STRANGE_INDICES = {
    "a call": pickle.dumps(Deadly(os.system, ("true",))),
    "a connection": program(
        ("torch.distributed.checkpoint._nested_dict", "flatten_state_dict"), b"}\x85R"
    ),
    "a class by another name": program(("torch.distributed.checkpoint.filesystem", "pickle.loads")),
    "a class's state": program((META, "TensorProperties"), b"}\x8c\x0c__setstate__NsNb"),
    "a class's state, by slots": program(
        (META, "Metadata"), b"N}\x8c\x08__hash__Ns\x86b"
    ),
    "an enumeration's state": program((META, "_MEM_FORMAT_ENCODING"), b"K\x00\x85R}\x8c\x01aNsb"),
    "a function's state": program(("torch.serialization", "_get_layout"), b"N}\x8c\x01aNs\x86b"),
    "an instance of another class": program(
        (META, "StorageMeta"), b")\x81N}\x8c\x09__class__", (META, "Metadata"), b"s\x86b"
    ),
    "a place in the memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    # Of forty pairs each holds the one before twice: the hash of the last takes for ever.
    "a key that is a tree": b"\x80\x04}"
    + b"N\x85"
    + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(40))
    + b"Ns.",
    "instructions of old": b"cos\nsystem\n(S'true'\ntR.",
    "an extension": b"\x80\x02\x82\x01.",
}  # fmt: skip


@pytest.mark.parametrize("what", STRANGE_INDICES)
def test_an_index_that_would_do_something_is_refused(what: str, saved: Path) -> None:
    put_index(saved, STRANGE_INDICES[what])
    assert "is damaged: .metadata: " in refused(lambda: storage.verify(saved))


def change(index: Metadata, what: str) -> None:
    place, held = next(iter(index.storage_data.items()))
    tensor = index.state_dict_metadata["a"]
    chunk = tensor.chunks[0]  # type: ignore[union-attr]
    if what == "bytes":  # torch unpickles them as they are
        index.state_dict_metadata["a"] = BytesStorageMetadata()
    elif what == "a transform":
        index.storage_data[place] = _StorageInfo("__0_0.distcp", 0, 10, ["zstd"])
    elif what == "a file outside":
        held.relative_path = "../saved/__0_0.distcp"
    elif what == "a device":
        held.relative_path = "/dev/zero"
    elif what == "past the end":
        held.offset = 1 << 40
    elif what == "before the beginning":
        held.offset = -1
    elif what == "too little":
        held.length = 3
    elif what == "too large a tensor":
        tensor.size = torch.Size([2, 1 << 40])  # type: ignore[union-attr]
    elif what == "too large a chunk":
        tensor.size = chunk.sizes = torch.Size([2, 1 << 40])  # type: ignore[union-attr]
    elif what == "another shape":
        tensor.size = chunk.sizes = torch.Size([3, 2])  # type: ignore[union-attr]
    elif what == "another dtype":
        tensor.properties.dtype = torch.int32  # type: ignore[union-attr]
    elif what == "a chunk outside":
        chunk.offsets = torch.Size([1, 0])


CHANGES = (
    "bytes", "a transform", "a file outside", "a device", "past the end", "before the beginning",
    "too little", "too large a tensor", "too large a chunk", "another shape", "another dtype",
    "a chunk outside",
)  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_an_index_that_does_not_fit_the_files_is_refused(what: str, saved: Path) -> None:
    index, _ = metadata_of(TENSORS)
    change(index, what)
    put_index(saved, index)
    refused(lambda: storage.verify(saved), storage.DamagedError)


def zipped(content: bytes, method: int) -> bytes:
    """The same zip, compressed in another way."""
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(content)) as old, zipfile.ZipFile(out, "w", method) as new:
        for one in old.infolist():
            new.writestr(one.filename, old.read(one))
    return out.getvalue()


def torch_file(value: Any, folder: Path) -> bytes:
    torch.save(value, folder / "value.pt")
    content = (folder / "value.pt").read_bytes()
    (folder / "value.pt").unlink()
    return content


def test_a_shard_that_is_more_than_a_tensor_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    whole = torch_file(TENSORS["a"], tmp_path)
    strange = {
        "compressed": zipped(whole, zipfile.ZIP_DEFLATED),
        "no tensor": torch_file({"a": TENSORS["a"]}, tmp_path),
        "it would load": torch_file(Deadly(os.system, ("true",)), tmp_path),
        "format": pickle.dumps(Deadly(os.system, ("true",))),
        "another tensor": torch_file(TENSORS["b.alive"], tmp_path),
    }
    for what, content in {"": zipped(whole, zipfile.ZIP_STORED), **strange}.items():
        file.write_bytes(content)
        piece = Piece("a", torch.float32, (2, 3), "shard", 0, len(content))
        if what:
            assert what in refused(lambda: check_pieces(file, [piece]), ForeignError)  # noqa: B023
        else:
            check_pieces(file, [piece])


def test_common_values_are_plain(saved: Path) -> None:
    """megatron-core 0.17.0 unpickles them."""
    torch.save({"a": Deadly(os.system, ("true",))}, saved / "common.pt")
    seal(saved)
    assert "common.pt: it would load" in refused(lambda: storage.verify(saved))
    content = torch_file({}, saved)
    (saved / "common.pt").write_bytes(torch_file({"a": 1}, saved) + content)
    seal(saved)
    assert "common.pt: it is no file of torch's" in refused(lambda: storage.verify(saved))


def test_another_backend_is_refused(saved: Path) -> None:
    (saved / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    seal(saved)
    assert "another format" in refused(lambda: storage.verify(saved))


@pytest.mark.parametrize(
    "name", ["/dev/zero", "../secret", "sub/file", "..", "", "pipe", "link", "loop", "sub", "a\nb"]
)
def test_a_manifest_names_plain_files_of_the_folder(name: str, saved: Path) -> None:
    (saved.parent / "secret").write_text("secret")
    (saved / "sub").mkdir()
    (saved / "sub" / "file").write_text("x")
    os.mkfifo(saved / "pipe")
    (saved / "link").symlink_to(saved.parent / "secret")
    (saved / "loop").symlink_to("loop")
    manifest = json.loads((saved / storage.MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 6, "crc32": "0"}
    (saved / storage.MANIFEST).write_text(json.dumps(manifest))
    refused(lambda: storage.verify(saved), storage.DamagedError)


@pytest.mark.parametrize("name", ["state.json", "manifest.json", ".metadata", "common.pt"])
def test_a_pipe_or_device_in_place_of_a_file_is_refused(name: str, saved: Path) -> None:
    for put in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (saved / name).unlink()
        put(saved / name)
        read = checkpoint.read_state if name == "state.json" else storage.verify
        refused(lambda: read(saved))  # noqa: B023


def test_a_link_into_the_hubs_cache_is_a_file_of_the_folder(saved: Path) -> None:
    snapshot = saved.parent / "snapshots" / "main"
    snapshot.parent.mkdir()
    saved.rename(saved.parent / "blobs")
    snapshot.mkdir()
    for blob in (saved.parent / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(Path("..", "..", "blobs", blob.name))
    storage.verify(snapshot)


LAYER = vars(SHAPE.layers[0])
ILL_SHAPES: list[Any] = [
    None, [], {}, "8", {"hidden_size": 8}, {"hidden_size": 8, "layers": []},
    {"hidden_size": 8, "layers": {"0": LAYER}}, {"hidden_size": 8, "layers": [[8, 1]]},
    *({"hidden_size": size, "layers": [LAYER]} for size in (0, -8, 8.0, "8", None)),
    *({"hidden_size": 8, "layers": [LAYER | {name: value}]}
      for name in LAYER for value in (-1, 1.5, True, "1", [1], 1 << 70)),
    *({"hidden_size": 8, "layers": [LAYER | {name: 0}]} for name in LAYER if name != "number"),
    {"hidden_size": 8, "layers": [LAYER | {"unknown": 1}]}, {"hidden_size": 8, "layers": [{}]},
]  # fmt: skip
ILL_STATES: list[dict[str, Any] | str] = [
    {"consumed_tokens": -128}, {"step": -1}, {"step": 1.5}, {"step": True}, {"step": "3"},
    *({"shape": shape} for shape in ILL_SHAPES), {"memory": [float("nan")]}, {"memory": [[1.0]]},
    {"memory": 0.5}, {"memory": ["0.5"]}, {"memory": [1e400]},
    {"watch": None}, {"watch": {"average": "NaN"}}, {"watch": 3},
    {"watch": {"average": float("nan")}}, {"watch": {"steps": 1 << 70}}, {"plan_due": 1},
    {"layout": []}, {"adam_step": None}, {"unknown": 1}, {"pending_steps": 1e400},
    {"pending_steps": -1}, {"format": [2]}, {"step": 10**400}, "[]", "null", "{",
    "[" * 100_000, "\x00", '{"step": 3}',
]  # fmt: skip


@pytest.mark.parametrize("change", ILL_STATES, ids=lambda x: str(x)[:40])
def test_a_malformed_state_is_refused(change: dict[str, Any] | str, saved: Path) -> None:
    text = change if isinstance(change, str) else json.dumps(STATE | change)
    (saved / "state.json").write_text(text)
    refused(lambda: checkpoint.read_state(saved), CheckpointError)


def index_with(shape: Shape) -> Metadata:
    """What a checkpoint of ``SMALL`` holds that stores ``shape``, as far as it must to be built."""
    sizes = {checkpoint_name(name): size for name, size in whole_shapes(SMALL, shape)}
    full = Shape.full(SMALL)
    sizes |= {f"pruner.alive.{axis}": table_size(axis, full) for axis in AXES}
    return metadata_of({name: torch.zeros(size) for name, size in sizes.items()})[0]


OTHER_SHAPES = {
    "a layer more": Shape(8, (*SHAPE.layers, dataclasses.replace(SHAPE.layers[1], number=2))),
    "channels": SHAPE.with_counts("hidden_size", 16),
    "neurons": SHAPE.with_counts("ffn_hidden_size", 16),
    "groups": SHAPE.with_counts("num_query_groups", 2),
    "another order": Shape(8, SHAPE.layers[::-1]),
    "one layer twice": Shape(8, SHAPE.layers[:1] * 2),
    "a layer far away": Shape(
        8, (SHAPE.layers[0], dataclasses.replace(SHAPE.layers[1], number=1 << 40))
    ),
    "heads": Shape(8, (SHAPE.layers[0], dataclasses.replace(SHAPE.layers[1], heads_per_group=1))),
}


@pytest.mark.parametrize("what", OTHER_SHAPES)
def test_a_shape_is_refused_that_pruning_cannot_make_of_the_model(what: str, saved: Path) -> None:
    """With the tensors of it, so that only the shape is at fault."""
    shape = OTHER_SHAPES[what]
    put_index(saved, index_with(shape))
    (saved / "state.json").write_text(json.dumps(STATE | {"shape": shape.as_dict()}))
    config = configuration.replace(Config(), model=vars(SMALL))
    assert "in state.json" in refused(lambda: checkpoint.read_state(saved, config), CheckpointError)


def test_a_checkpoint_of_an_earlier_format_says_what_to_do(saved: Path) -> None:
    (saved / "state.json").write_text(json.dumps({"format": 2, "step": 3, "widths": [8, 4]}))
    said = refused(lambda: checkpoint.read_state(saved), CheckpointError)
    assert "has checkpoint format 2 and this version reads 3: go on with the version" in said


def test_units_that_live_must_be_stored() -> None:
    alive, full = torch.ones(2, 8, dtype=torch.bool), Shape.full(SMALL)
    stored = torch.cat([torch.arange(8), torch.arange(4)])
    assert "live that it does not store" in misfit("ffn_hidden_size", alive, stored, SHAPE, full)
    alive[1, 4:] = False
    assert misfit("ffn_hidden_size", alive, stored, SHAPE, full) == ""


def save_strange_units(rendezvous: str, config: Config) -> list[str]:
    """Runs whose checkpoint names units that are none of the model's."""
    from megatron_idea.engine.distributed import start_distributed, stop_distributed
    from megatron_idea.train import build, step

    axis, other = "ffn_hidden_size", "hidden_size"
    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        run, state = build(config, groups)
        step(run, state)
        run.log.close()
        pruner, runs = run.pruner, []
        true_alive, true_stored = pruner.alive, pruner.stored
        one, two = true_stored[axis]
        for alive, stored in (
            ({}, {axis: (one, two + 1)}),
            ({}, {axis: (one - 1, two)}),
            ({}, {axis: (one, two // 2)}),
            ({}, {axis: (one, two + (1 << 62))}),
            ({}, {other: (true_stored[other][0] * 2,)}),
            ({axis: true_alive[axis][:, 1:]}, {}),
        ):
            run_dir = f"{config.run_dir}_{len(runs)}"
            pruner.alive, pruner.stored = true_alive | alive, true_stored | stored
            checkpoint.save(replace(config, run_dir=run_dir), run.trainable, pruner, state)
            runs.append(run_dir)
        return runs
    finally:
        stop_distributed()


def resumed_or_said(rendezvous: str, config: Config, runs: list[str]) -> list[str]:
    from megatron_idea.engine.distributed import start_distributed, stop_distributed
    from megatron_idea.train import build

    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    said = []
    try:
        for run_dir in runs:
            with pytest.raises(CheckpointError) as caught:
                build(replace(config, run_dir=run_dir), groups)
            said.append(one_line(caught.value))
        return said
    finally:
        stop_distributed()


def test_units_that_the_model_cannot_have_are_refused(
    tiny: Config, workers: Workers, tmp_path: Path
) -> None:
    (runs,) = workers.run(save_strange_units, 1, tiny)
    (said,) = workers.run(resumed_or_said, 1, tiny, runs)
    assert len(said) == len(runs) == 6
    for run_dir in runs:
        if "stores units of hidden_size" not in said[runs.index(run_dir)]:
            with pytest.raises(CheckpointError, match=r"is damaged: |does not hold") as caught:
                export_checkpoint(Path(run_dir), tmp_path / "out")
            one_line(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {}, {"kv_channels": 8}, {"num_query_groups": 2}, {"vocab_size": 1 << 40},
        {"hidden_size": 1 << 30}, {"num_layers": 1 << 30}, {"num_layers": 1},
        {"ffn_hidden_size": 1 << 40}, {"ffn_hidden_size": 4},
        {"qk_layernorm": True}, {"share_embeddings_and_output_weights": False},
    ],
    ids=str,
)  # fmt: skip
def test_a_model_is_built_only_when_the_tensors_are_its_own(
    given: dict[str, Any], saved: Path
) -> None:
    put_index(saved, index_with(SHAPE))
    config = configuration.replace(Config(), model=vars(SMALL) | given)
    if given:
        refused(lambda: checkpoint.read_state(saved, config), CheckpointError)
    else:
        assert checkpoint.read_state(saved, config).shape == SHAPE


@pytest.mark.parametrize(
    "text",
    [
        "x0: &x0 [1, 1]\n" + "".join(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]\n" for i in range(1, 60)),
        "model: &m {num_layers: *m}\n",
        "model: " + "[" * 5000,
        "run_dir: " + "x" * (1 << 21),
    ],
    ids=["bomb", "circle", "deep", "large"],
)  # fmt: skip
def test_a_configuration_that_does_not_end_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    refused(lambda: configuration.load(tmp_path / "config.yaml"), ConfigError)


# ---------------------------------------------------------------------------------------- datasets


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Prefix of a dataset of 40 documents."""
    lines = [json.dumps({"text": f"document {i}"}) for i in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    tokenize([tmp_path / "text.jsonl"], tmp_path / "set", BYTE, held_out=0)
    return tmp_path / "set_train"


HEAD = 34


@pytest.mark.parametrize(
    ("offset", "kind", "value", "says"),
    [
        (17, "<B", 6, "token type 6"),
        (17, "<B", 99, "token type 99"),
        (18, "<Q", 1 << 62, "truncated"),
        (26, "<Q", 0, "damaged"),
        (HEAD, "<i", -5, "damaged: sequence 0"),
        (HEAD + 40 * 4, "<q", 1 << 40, "damaged: sequence 0"),
        (HEAD + 40 * 4 + 8, "<q", -8, "damaged: sequence 1"),
        (HEAD + 40 * 12, "<q", 7, "damaged: its documents"),
        (HEAD + 40 * 12 + 8 * 20, "<q", -1, "damaged: its documents"),
        (HEAD + 40 * 12 + 8 * 40, "<q", 1 << 40, "damaged: its documents"),
    ],
)
def test_an_index_of_tokens_points_inside_its_file(
    offset: int, kind: str, value: int, says: str, corpus: Path
) -> None:
    file = Path(f"{corpus}.idx")
    content = bytearray(file.read_bytes())
    struct.pack_into(kind, content, offset, value)
    if offset == HEAD:  # what the one lacks the other has: the sum stays
        before = struct.unpack_from("<i", file.read_bytes(), HEAD)[0]
        after = struct.unpack_from("<i", content, HEAD + 4)[0]
        struct.pack_into("<i", content, HEAD + 4, after + before - value)
    file.write_bytes(content)
    assert says in refused(lambda: check_dataset(corpus, BYTE), DataError)


def batches(corpus: Path, cache: Path) -> Batches:
    return Batches(
        [configuration.BlendEntry(str(corpus))], BYTE, split="train", num_samples=4, seed=1,
        cache_dir=cache, seq_length=16, model_vocab_size=257, micro_batch_size=2,
        global_batch_size=2,
    )  # fmt: skip


def test_tokens_beyond_the_vocabulary_do_not_reach_the_model(corpus: Path, tmp_path: Path) -> None:
    tokens = np.fromfile(f"{corpus}.bin", np.uint16)
    tokens[:] = 60_000  # the sidecar says which tokenizer, and is believed
    tokens.tofile(f"{corpus}.bin")
    data = batches(corpus, tmp_path / "cache")
    assert "hold token 60000" in refused(lambda: list(data.step(0)), DataError)


def test_cached_indices_are_arrays(corpus: Path, tmp_path: Path) -> None:
    """megatron-core allows NumPy to unpickle what is none."""
    cache = tmp_path / "cache"
    next(batches(corpus, cache).step(0))
    found = sorted(cache.rglob("*.npy"))
    assert found
    for file in found:
        content = file.read_bytes()
        for strange in (pickle.dumps(Deadly(os.system, ("true",))), zipped_nothing()):
            file.write_bytes(strange)
            assert "is no array" in refused(lambda: batches(corpus, cache), DataError)
        objects = BytesIO()
        np.save(objects, np.array([Deadly(os.system, ("true",))]), allow_pickle=True)
        file.write_bytes(objects.getvalue())
        refused(lambda: batches(corpus, cache), DataError)
        file.write_bytes(content)


def zipped_nothing() -> bytes:
    out = BytesIO()
    zipfile.ZipFile(out, "w").close()
    return out.getvalue()


# ---------------------------------------------------------------------------- Hugging Face folders

HF = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8,
    "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 16, "hidden_act": "silu",
    "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "torch_dtype": "float32", "initializer_range": 0.02,
    "rope_scaling": {"rope_type": "default"}, "layer_types": ["full_attention"] * 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "hf"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(HF))
    model, shape = huggingface.from_hf_config(HF)
    sizes = huggingface.hf_shapes(ModelConfig(**model), shape)
    tensors = {name: torch.zeros(size) for name, size in sizes}
    safetensors.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    read_folder(path)
    return path


def read_folder(path: Path) -> None:
    """All that is read before a model of a folder is built."""
    config, weights = huggingface.check_folder(path)
    model, shape = huggingface.from_hf_config(config)
    _Folder(path, weights).check(ModelConfig(**model), shape)


def index_of(path: Path, places: Any) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_a_model_folder_with_more_than_data_is_refused(folder: Path) -> None:
    for places in (["a"], {"a": "../hf/model.safetensors"}, {"a": 3}, {"a": "/dev/zero"}, None):
        index_of(folder, places)
        refused(lambda: read_folder(folder), ConfigError)
    (folder / "model.safetensors.index.json").unlink()
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        for value in ("somebody/kernel", {"": "somebody/kernel"}):
            for config in ({name: value}, {"text_config": {name: value}}):
                (folder / "config.json").write_text(json.dumps(HF | config))
                assert "code from the Hub" in refused(lambda: read_folder(folder), ConfigError)
    (folder / "config.json").write_text(json.dumps(HF))
    for name, put in (("generation_config.json", os.mkfifo), ("x", links_out), ("y", zero)):
        put(folder / name)
        refused(lambda: read_folder(folder), ConfigError)
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter" in refused(lambda: read_folder(folder), ConfigError)


def links_out(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def test_code_and_pickles_of_a_model_folder_do_not_run(folder: Path) -> None:
    pytest.importorskip("transformers", reason="needs megatron-idea[export]")
    from megatron_idea.evaluation.held_out import load_folder

    load_folder(folder)  # what transformers imports, it has imported
    trace = folder.parent / "ran"
    code = f"open({str(trace)!r}, 'w')\n"
    (folder / "code.py").write_text(code)
    classes = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    own = {"model_type": "strange", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(HF | own))
    refused(lambda: load_folder(folder), ConfigError)
    (folder / "config.json").write_text(json.dumps(HF | {"num_hidden_layers": 10**9}))
    assert "10" in refused(lambda: load_folder(folder), ConfigError)
    (folder / "config.json").write_text(json.dumps(HF | {"hidden_size": 16}))
    refused(lambda: load_folder(folder), ConfigError)
    (folder / "config.json").write_text(json.dumps(HF))
    (folder / "model.safetensors").unlink()
    torch.save({"a": Deadly(open, (str(trace), "w"))}, folder / "pytorch_model.bin")
    assert "safetensors" in refused(lambda: load_folder(folder), ConfigError)
    assert not trace.exists()


# ------------------------------------------------------------------------ records, and the screen


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 12 steps, as it records itself."""
    path = tmp_path / "run"
    path.mkdir()
    config = configuration.from_dict(
        {"run_dir": str(path), "model": {"num_layers": 4}, "schedule": {"total_tokens": 12 * 2048}}
    )
    (path / "config.yaml").write_text(configuration.to_yaml(config))
    events = [
        {"kind": "started", "time": 1.0, "step": 0, "environment": {
            "device": "CPU", "processes": 1, "threads": 1, "versions": {"torch": "2"}}},
        {"kind": "evaluated", "time": 2.0, "step": 3, "tokens": 6144, "val_loss": 5.0, "why": "x"},
        {"kind": "compacted", "time": 2.0, "step": 6, "tokens": 12288, "seconds": 0.1,
         "before": neurons(*[1024] * 4) | {"num_layers": [4]},
         "after": neurons(*[512] * 3) | {"num_layers": [3]}, "moved_units": 3, "moved_layers": 1,
         "peak_bytes": 5},
        {"kind": "layer_removed", "time": 2.0, "step": 6, "tokens": 12288, "layer": 2,
         "losses": {"1": 5.0, "2": 4.5}},
        {"kind": "spike", "time": 3.0, "step": 8, "tokens": 16384, "loss": 9.0, "average": 2.0},
        {"kind": "saved", "time": 3.0, "step": 9, "path": "p", "seconds": 0.1, "waited_s": 0.2},
        {"kind": "signal", "time": 3.0, "step": 12, "name": "SIGTERM"},
    ]  # fmt: skip
    scores = [
        {"step": i, "tokens": i * 2048, "axis": axis,
         "quantiles": [[0.1 * k for k in range(1, 8)]] * rows + [None] * (rows // 3),
         "cut": [0.2] * rows + [None] * (rows // 3),
         "rank_correlation": [0.5] * rows + [None] * (rows // 3)}
        for i in range(3, 8)
        for axis, rows in (("ffn_hidden_size", 3), ("num_layers", 1))
    ]  # fmt: skip
    texts = [{"step": i, "tokens": i * 2048, "prompt": "a", "text": "b"} for i in (3, 6)]
    full = Shape.full(config.model).with_counts("hidden_size", 64)
    before, after = full.by_number(4), full.with_layers((0, 1, 3)).by_number(4)
    steps = [
        record(step, live=counts, stored=counts).as_dict()
        for step in range(1, 13)
        for counts in [after if step > 6 else before]
    ]
    for name, lines in (
        ("metrics", steps), ("events", events), ("scores", scores), ("samples", texts),
    ):  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / f"{name}.jsonl").write_text(text)
    return path


def show(run_dir: Path) -> tuple[str, str]:
    """The report's page, and all that a terminal gets."""
    out = StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    view = View(run_dir)
    view.refresh()
    console.print(view.render(10.0, 100, 60))
    run = read_run(run_dir)
    for table in (
        tables.closing(run), tables.incidents(run), tables.removed_layers(run),
        tables.compared([run]),
    ):  # fmt: skip
        if table:
            console.print(tables.in_terminal(table))
    out.getvalue().encode()
    return page([run]).encode().decode(), out.getvalue()


def append(run_dir: Path, name: str, /, **line: Any) -> None:
    with (run_dir / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


HOSTILE = "\x1b]0;owned\x07\x9b2J\u202e[bold red]<script>alert(1)</script>\r$x_"


def test_what_a_run_recorded_is_shown_as_text(run_dir: Path) -> None:
    append(run_dir, "samples", step=7, tokens=20000, prompt=HOSTILE, text=HOSTILE)
    append(run_dir, "events", kind="signal", time=1.0, step=12, name=HOSTILE)
    append(run_dir, "events", kind=HOSTILE, time=1.0)
    html, screen = show(run_dir)
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(screen.replace("\x1b[0m", ""))
    assert "[bold red]" in screen


ILL_VALUES = ["7", None, True, -1, 1e308, float("nan"), float("inf"), 10**30, [], {}, [[]], ["x"]]


@pytest.mark.parametrize("name", ["metrics", "events", "scores", "samples"])
def test_a_record_of_the_wrong_type_is_left_out(name: str, run_dir: Path) -> None:
    """Each field of the last line as each ill value, all of them in one file."""
    lines = (run_dir / f"{name}.jsonl").read_text().splitlines()
    kinds = {json.loads(line).get("kind"): json.loads(line) for line in lines}
    for last in kinds.values():
        for key in last:
            for value in ILL_VALUES:
                ahead = {"step": 99, "tokens": 10**6} if "tokens" in last else {}
                append(run_dir, name, **(last | ahead | {key: value}))
    show(run_dir)


def test_a_generated_text_does_not_command_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from megatron_idea.records.terminal import say, say_error

    say(HOSTILE)
    say_error(HOSTILE)
    said = capsys.readouterr()
    assert "[bold red]" in said.out and "\x1b]0" not in said.out + said.err
    assert "\x9b" not in said.out + said.err


@pytest.mark.parametrize(
    "value", ["$(touch RAN)", "`touch RAN`", "x[$(touch RAN)]", "'\n\"; touch RAN #"]
)
def test_variables_of_the_launch_script_are_words(value: str, tmp_path: Path) -> None:
    repository = Path(__file__).parents[1]
    ran = tmp_path / "ran"
    value = value.replace("RAN", str(ran))
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/bash\ncat >"{tmp_path}/job.sh"; echo 41\n')
    sbatch.chmod(0o755)
    settings = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CONFIG": "examples/configs/tiny.yaml"}
    script = "examples/launch.sh"

    def call(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = settings | {"MEGATRON_IDEA_VENV": "/nowhere", "LOG_DIR": str(tmp_path)}
        return subprocess.run(
            ["bash", script, f"run_dir={value}"], cwd=repository, env=environment | variables,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    settings["CONFIG"] = next(str(p) for p in sorted((repository / "examples").rglob("*.yaml")))
    for name in ("NODES", "TIME_LIMIT", "JOB_NAME", "PARTITION", "REQUEUE", "SLURM_JOB_ID",
                 "SLURM_RESTART_COUNT", "STOP_BEFORE_S", "EXCLUSIVE", "LAUNCH"):  # fmt: skip
        done = call(CONTAINER="image", **{name: value})
        assert done.returncode == 2 and name in done.stderr, (name, done)
    done = call(CONTAINER=value, CONTAINER_MOUNTS=value)
    assert done.returncode == 0, done
    job = (tmp_path / "job.sh").read_text()
    lines = "\n".join(line for line in job.splitlines() if line.startswith("export"))
    echoed = subprocess.run(
        ["bash", "-c", f'{lines}\nprintf %s "$CONTAINER"'], capture_output=True, text=True
    )
    assert echoed.stdout == value
    assert not ran.exists()


# ------------------------------------------------------------------------------------------- a fuzz


def garbled(content: bytes, rng: random.Random) -> bytes:
    """The same with some bytes changed, left out, doubled or put in."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 6))):
        at, size = rng.randrange(len(out) + 1), rng.randrange(1, 9)
        way = rng.randrange(5)
        if way == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif way == 1:
            del out[at : at + size]
        elif way == 2:
            out[at:at] = rng.randbytes(size)
        elif way == 3:
            out[at:at] = out[rng.randrange(len(out) + 1) :][:size]
        else:
            out[at : at + size] = rng.choice((b"\xff", b"\x00", b"\x7f", b"9")) * size
    return bytes(out)


VALUES = (
    None, True, False, -1, 0, 1, 1.5, -1e308, 1 << 31, 1 << 40, 10**400, float("nan"),
    float("inf"), "", "x", "..", "/dev/zero", "1", "\ud800", "\x1b[2J", [], {}, [[]], [None],
    {"a": 1}, ["x"] * 3, [-1], [1 << 40],
)  # fmt: skip


def changed(content: Any, rng: random.Random) -> Any:
    """A JSON value with some of its parts replaced or left out."""
    out = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        node, here = out, None
        while isinstance(node, (dict, list)) and node and (here is None or rng.random() < 0.7):
            parent = node
            here = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            node = parent[here]
        if here is None:
            return rng.choice(VALUES)
        if rng.random() < 0.15:
            del parent[here]
        else:
            parent[here] = rng.choice(VALUES)
    return out


def fuzz(
    times: int, put: Callable[[random.Random], None], read: Callable[[], Any], *kinds: type
) -> None:
    """Read what ``put`` makes of a file: well, or with one of our errors of one line."""
    rng = random.Random(0)
    ours = kinds or OURS
    failures = 0
    for _ in range(times):
        put(rng)
        try:
            with nothing_runs():
                read()
        except ours as error:
            failures += 1
            one_line(error)
    assert failures > times // 4


def as_bytes(file: Path) -> Callable[[random.Random], None]:
    content = file.read_bytes()
    return lambda rng: file.write_bytes(garbled(content, rng)) and None  # type: ignore[func-returns-value]


def as_json(file: Path) -> Callable[[random.Random], None]:
    content = json.loads(file.read_text())
    return lambda rng: file.write_text(json.dumps(changed(content, rng))) and None  # type: ignore[func-returns-value]


def test_fuzzed_checkpoints(saved: Path) -> None:
    def load_for_real() -> None:
        read_index(saved)  # then it does no harm:
        with contextlib.suppress(Exception):
            _watching.append([])  # it may find its classes
            try:
                pickle.loads((saved / ".metadata").read_bytes())
            finally:
                deeds = _watching.pop()
        assert set(deeds) <= {"pickle.find_class"}

    ours = (ForeignError, files.UnsafeFileError)
    _, pieces = read_index(saved)
    for name, times, read in (
        (".metadata", 600, load_for_real),
        ("__0_0.distcp", 300, lambda: check_pieces(saved / "__0_0.distcp", pieces)),
        ("common.pt", 200, lambda: check_common(saved)),
    ):
        whole = (saved / name).read_bytes()
        fuzz(times, as_bytes(saved / name), read, *ours)
        (saved / name).write_bytes(whole)
    fuzz(300, as_json(saved / "state.json"), lambda: checkpoint.read_state(saved))
    fuzz(150, as_bytes(saved / "state.json"), lambda: checkpoint.read_state(saved))
    fuzz(200, as_json(saved / storage.MANIFEST), lambda: storage.verify(saved))


def test_fuzzed_configurations(tiny: Config, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(configuration.to_yaml(tiny))
    fuzz(50, as_bytes(file), lambda: configuration.load(file), ConfigError)


def test_fuzzed_datasets(corpus: Path) -> None:
    for name, put in ((".idx", as_bytes), (".json", as_json)):
        file = Path(f"{corpus}{name}")
        whole = file.read_bytes()
        fuzz(300, put(file), lambda: check_dataset(corpus, BYTE), DataError)
        file.write_bytes(whole)


def test_fuzzed_model_folders(folder: Path) -> None:
    for name, times, put in (
        ("config.json", 500, as_json), ("config.json", 100, as_bytes),
        ("model.safetensors", 300, as_bytes),
    ):  # fmt: skip
        whole = (folder / name).read_bytes()
        fuzz(times, put(folder / name), lambda: read_folder(folder), ConfigError)
        (folder / name).write_bytes(whole)


def test_fuzzed_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    file = tmp_path / "tokenizer.json"
    train_tokenizer([tmp_path / "a.txt"], 264, file)

    def read() -> None:
        words = load_tokenizer(file)
        words.decode(words.encode("a fox, \u00fc"))
        words.token_bytes()

    fuzz(250, as_json(file), read, DataError)
    fuzz(100, as_bytes(file), read, DataError)


def test_fuzzed_records_are_drawn_without_the_broken_ones(run_dir: Path) -> None:
    rng = random.Random(0)
    names = ("metrics", "events", "scores", "samples")
    whole = {name: (run_dir / f"{name}.jsonl").read_text().splitlines() for name in names}
    show(run_dir)
    for number in range(25):
        for name in names:
            lines = list(whole[name])
            for place in range(len(lines)):
                if rng.random() < 0.4:
                    one = json.dumps(changed(json.loads(lines[place]), rng)).encode()
                    one = garbled(one, rng) if rng.random() < 0.2 else one
                    lines[place] = one.replace(b"\n", b"").decode("latin1")
            (run_dir / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "latin1", "replace")
        try:
            with nothing_runs():
                show(run_dir)
        except ValueError as error:
            assert "has no records" in str(error), number
