"""What a checkpoint's index may hold, looked at before torch unpickles it.

``.metadata`` is a pickle that torch and megatron-core load as it is, and a pickle is a program. So
is what lies in the ``.distcp`` files, and ``common.pt``. Here the same bytes are read by an
interpreter that knows a few instructions and builds stand-ins: what it accepts can, loaded for
real, only make those records. What they say is then compared with the files.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from megatron_idea import files
from megatron_idea.errors import UserError

INDEX = ".metadata"
COMMON = "common.pt"
MOST_INDEX_BYTES = 1 << 30
"""Of 20,000 pieces, which a model of 70 billion parameters at TP 8 has, it takes about 9 MB."""

DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool")
}


class ForeignError(UserError):
    """An index or a tensor that is none of ours; the message says what it holds."""


# ------------------------------------------------------------------------- pickles, but for a few


class _PlainUnpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]  # the one in Python
    """Reads pickles of plain values and of what ``find_class`` gives out.

    Left out are, among others, the instructions that put a value at a place of their choice in the
    memo (Python's own reader would make room for all places before it) and those that make a
    global of something else than two names.
    """

    dispatch: ClassVar[dict[int, Callable[..., Any]]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]]  # type: ignore[attr-defined]
        for code in (
            pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK,
            pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
            pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1,
            pickle.BINUNICODE, pickle.SHORT_BINUNICODE,
            pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE,
            pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS,
            pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS,
            pickle.BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.MEMOIZE,
            pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.NEWOBJ, pickle.REDUCE, pickle.BUILD,
            pickle.BINPERSID,
        )
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        raise ForeignError(f"it would load {f'{module}.{name}'!r:.200}, which no checkpoint needs")

    def persistent_load(self, _pid: Any) -> Any:
        raise ForeignError("it refers to what is stored elsewhere")

    # The hash of tuples that hold each other twice, thirty times over, takes for ever.
    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        for place in range(0, len(items), 2):
            target[_key(items[place])] = items[place + 1]

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def read_all(self) -> Any:
        """The value. Raises: ForeignError whatever is wrong."""
        try:
            return self.load()
        except ForeignError:
            raise
        except KeyError as error:
            raise ForeignError(f"it has pickle instruction {error}, which is not used") from error
        except Exception as error:  # of a damaged pickle: any type
            raise ForeignError(f"it is cut or damaged ({error or type(error).__name__})") from error


def _key(key: Any) -> Any:
    if type(key) is not str and not isinstance(key, _Record):
        raise ForeignError(f"a key is a {type(key).__name__}")
    return key


class _Fixed:
    """What takes no state: a function, a value of an enumeration, a dtype."""

    __slots__ = ("call", "value")

    def __init__(self, value: Any = None, call: Callable[..., Any] | None = None) -> None:
        self.value, self.call = value, call

    def __call__(self, *arguments: Any) -> Any:
        if self.call is None:
            raise ForeignError("it would call what is no function")
        return self.call(*arguments)

    def __setstate__(self, _state: Any) -> None:
        raise ForeignError("it would set the state of what has none")


class _Size(tuple):
    """``torch.Size``."""

    def __setstate__(self, _state: Any) -> None:
        raise ForeignError("it would set the state of what has none")


class _Record:
    """One of torch's dataclasses: its fields, once."""

    # Field -> types that it may have.
    fields: ClassVar[Mapping[str, tuple[type, ...]]] = {}

    def __init__(self) -> None:
        raise ForeignError(f"it would call {type(self).__name__}")

    def __setstate__(self, state: Any) -> None:
        # On the class itself this lacks an argument, which is an error, too.
        fields = type(self).fields
        if vars(self) or type(state) is not dict or not state.keys() <= fields.keys():
            raise ForeignError(f"the fields of {type(self).__name__} are not what torch writes")
        for name, value in state.items():
            if not isinstance(value, fields[name]):
                raise ForeignError(f"{type(self).__name__}.{name} is a {type(value).__name__}")
        vars(self).update(state)


_NONE = type(None)


class Chunk(_Record):
    fields: ClassVar = {"offsets": (_Size,), "sizes": (_Size,)}


class Properties(_Record):
    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5 or not isinstance(state[0], _Fixed):
            raise ForeignError("the properties of a tensor are not what torch writes")
        self.dtype = state[0].value


class Tensor(_Record):
    fields: ClassVar = {"properties": (Properties,), "size": (_Size,), "chunks": (list,)}


class Place(_Record):
    """``MetadataIndex``: a tensor's name, and where in it a chunk begins."""

    fields: ClassVar = {"fqn": (str,), "offset": (_Size, _NONE), "index": (int, _NONE)}


class Slice(_Record):
    """``_StorageInfo``: the bytes of a chunk."""

    # Transforms would be decoders: zstd's expands as far as the stream says.
    fields: ClassVar = {
        "relative_path": (str,), "offset": (int,), "length": (int,),
        "transform_descriptors": (_NONE,),
    }  # fmt: skip


class Meta(_Record):
    fields: ClassVar = {
        "checkpoint_id": (str, _Fixed, _NONE), "save_id": (str, _NONE), "load_id": (str, _NONE),
        "modules": (list,),
    }  # fmt: skip


class Written(_Record):
    """``TensorWriteData``; its counterpart for bytes is not known here."""

    fields: ClassVar = {"chunk": (Chunk,), "properties": (Properties,), "size": (_Size,)}


class Item(_Record):
    """``WriteItem``."""

    fields: ClassVar = {
        "index": (Place,), "type": (_Fixed,), "bytes_io_data": (_NONE,), "tensor_data": (Written,),
    }  # fmt: skip


class Prefix(_Record):
    """``_StoragePrefix``."""

    fields: ClassVar = {"prefix": (str,)}


class Plan(_Record):
    """``SavePlan``, which megatron-core keeps for the next save."""

    fields: ClassVar = {
        "items": (list,), "storage_data": (Prefix, _NONE), "planner_data": (dict, _NONE),
        "usable": (bool,),
    }  # fmt: skip


class Index(_Record):
    """``Metadata``."""

    fields: ClassVar = {
        "state_dict_metadata": (dict,), "planner_data": (dict, _NONE), "storage_data": (dict,),
        "storage_meta": (Meta, _NONE), "version": (str, _NONE), "all_local_plans": (list,),
    }  # fmt: skip


def _size(values: Any) -> _Size:
    if type(values) is not tuple or not all(files.is_whole(value) for value in values):
        raise ForeignError("a size is not made of whole numbers")
    return _Size(values)


def _one_of(*legal: Any) -> _Fixed:
    def choose(value: Any) -> _Fixed:
        if type(value) is not type(legal[0]) or value not in legal:
            raise ForeignError(f"{value!r:.100} is none of {legal}")
        return _Fixed(value)

    return _Fixed(call=choose)


def _path(*parts: Any) -> _Fixed:
    if not all(type(part) is str for part in parts):
        raise ForeignError("a path is not made of names")
    return _Fixed(parts)


_DCP = "torch.distributed.checkpoint"
_KNOWN: dict[tuple[str, str], Any] = {
    (f"{_DCP}.metadata", "Metadata"): Index,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): Tensor,
    (f"{_DCP}.metadata", "TensorProperties"): Properties,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): Chunk,
    (f"{_DCP}.metadata", "MetadataIndex"): Place,
    (f"{_DCP}.metadata", "StorageMeta"): Meta,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _one_of(0, 1, 2),
    (f"{_DCP}.filesystem", "_StorageInfo"): Slice,
    (f"{_DCP}.filesystem", "_StoragePrefix"): Prefix,
    (f"{_DCP}.planner", "SavePlan"): Plan,
    (f"{_DCP}.planner", "WriteItem"): Item,
    (f"{_DCP}.planner", "WriteItemType"): _one_of(1, 2),  # 3 is bytes
    (f"{_DCP}.planner", "TensorWriteData"): Written,
    ("torch", "Size"): _Fixed(call=_size),
    ("torch.serialization", "_get_layout"): _one_of("torch.strided"),
    ("pathlib", "PosixPath"): _Fixed(call=_path),
    ("pathlib._local", "PosixPath"): _Fixed(call=_path),  # Python 3.13
} | {("torch", name): _Fixed(dtype) for name, dtype in DTYPES.items()}


class _IndexUnpickler(_PlainUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            return super().find_class(module, name)
        return _KNOWN[module, name]


# --------------------------------------------------------------------------- what the index says


@dataclass(frozen=True)
class Piece:
    """A chunk of a tensor and the bytes that hold it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


def read_index(folder: Path) -> tuple[dict[str, tuple[int, ...]], list[Piece]]:
    """Read ``.metadata`` and run nothing.

    Returns: the shape of every tensor by its name, and the pieces of all of them, which cover them
        exactly.
    Raises: ForeignError, and UnsafeFileError, when torch must not load it.
    """
    content = files.read_bytes(files.inside(folder, INDEX), MOST_INDEX_BYTES)
    index = _IndexUnpickler(io.BytesIO(content)).read_all()
    if not isinstance(index, Index):
        raise ForeignError("it is no index of tensors")
    try:
        slices = {(place.fqn, place.offset): one for place, one in index.storage_data.items()}
        shapes = {name: tuple(tensor.size) for name, tensor in index.state_dict_metadata.items()}
        pieces = [
            piece
            for name, tensor in index.state_dict_metadata.items()
            for piece in _pieces(name, tensor, slices)
        ]
    except (AttributeError, TypeError) as error:  # a record that another one stands for
        raise ForeignError(f"its records are not what torch writes ({error})") from error
    return shapes, pieces


def _pieces(name: Any, tensor: Any, slices: Mapping[Any, Any]) -> Iterator[Piece]:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise ForeignError("an entry is no tensor")
    dtype, size = tensor.properties.dtype, tensor.size
    if dtype not in DTYPES.values():
        raise ForeignError(f"{name!r:.100} has no dtype")
    covered = 0
    for chunk in tensor.chunks:
        ends = [a + b for a, b in zip(chunk.offsets, chunk.sizes, strict=False)]
        if not len(chunk.offsets) == len(chunk.sizes) == len(size) or any(
            end > whole for end, whole in zip(ends, size, strict=True)
        ):
            raise ForeignError(f"a chunk of {name!r:.100} lies outside of the tensor")
        held = slices.get((name, chunk.offsets))
        if not isinstance(held, Slice):
            raise ForeignError(f"a chunk of {name!r:.100} is stored nowhere")
        needed = math.prod(chunk.sizes) * dtype.itemsize
        if not (files.is_whole(held.offset) and files.is_whole(held.length, least=needed)):
            raise ForeignError(f"{needed} bytes of {name!r:.100} cannot lie in {held.length}")
        covered += math.prod(chunk.sizes)
        yield Piece(name, dtype, tuple(chunk.sizes), held.relative_path, held.offset, held.length)
    if covered != math.prod(size):
        raise ForeignError(f"the chunks of {name!r:.100} do not make up the tensor")


# ---------------------------------------------------------------------------- what the files hold


def check_pieces(file: Path, pieces: list[Piece]) -> None:
    """Make sure that ``file`` holds its ``pieces``: each a tensor of that dtype and shape, stored
    as it is (torch would inflate a compressed one to any size).

    Raises: ForeignError.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        for piece in pieces:
            if piece.offset + piece.length > size:
                raise ForeignError(f"{piece.name!r:.100} would lie past the end of the file")
            found = _Head(_View(stream, piece.offset, piece.length)).tensor()
            if found != (piece.dtype, piece.shape):
                raise ForeignError(f"{piece.name!r:.100} is another tensor in it than in the index")


def check_common(folder: Path) -> None:
    """Make sure that ``common.pt``, which megatron-core 0.17.0 unpickles as it is, holds plain
    values.

    Raises: ForeignError, UnsafeFileError.
    """
    content = files.read_bytes(files.inside(folder, COMMON), most=1 << 20)
    if content.count(b"PK\x05\x06") != 1:  # two tables of contents: which one counts?
        raise ForeignError("it is no file of torch's")
    _Head(io.BytesIO(content)).plain()


class _Head:
    """What ``torch.save`` wrote, without the numbers: a zip whose entries are stored."""

    def __init__(self, stream: IO[bytes]) -> None:
        try:
            self._archive = zipfile.ZipFile(stream)
            entries = self._archive.infolist()
        except Exception as error:  # of a damaged zip: several types
            raise ForeignError(f"what it holds is not of torch's format ({error})") from error
        if any(one.compress_type or one.file_size != one.compress_size for one in entries):
            raise ForeignError("what it holds is compressed")
        self._sizes = {one.filename: one.file_size for one in entries}
        self._root = entries[0].filename.partition("/")[0] if entries else ""
        if len(self._sizes) != len(entries):
            raise ForeignError("two of its entries have one name")

    def plain(self) -> Any:
        return _PlainUnpickler(self._program()).read_all()

    def tensor(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape. Raises: ForeignError when it is no plain tensor."""
        found = _TensorUnpickler(self._program()).read_all()
        if not isinstance(found, _Found):
            raise ForeignError("what it holds is no tensor")
        dtype, key, count = found.storage
        if self._sizes.get(f"{self._root}/data/{key}") != count * dtype.itemsize:
            raise ForeignError("what it holds has another size than it says")
        return dtype, found.shape

    def _program(self) -> IO[bytes]:
        name = f"{self._root}/data.pkl"
        if self._sizes.get(name, 1 << 20) > 1 << 16:
            raise ForeignError("what it holds is not of torch's format")
        try:
            return io.BytesIO(self._archive.read(name))
        except Exception as error:  # of a damaged zip: several types
            raise ForeignError(f"what it holds is damaged ({error})") from error


_STORAGES = {
    "FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class _Found(_Fixed):
    """A tensor: its storage (dtype, key, elements) and its shape."""

    __slots__ = ("shape", "storage")

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any, *_rest: Any) -> None:
        super().__init__()
        numbers = (offset, *shape, *stride)
        if type(storage) is not tuple or not all(map(files.is_whole, numbers)):
            raise ForeignError("a tensor is not what torch writes")
        self.storage, self.shape = storage, tuple(shape)


class _TensorUnpickler(_PlainUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Fixed(call=_Found)
        if (module, name) == ("collections", "OrderedDict"):  # of no hooks
            return _Fixed(call=_Fixed)
        if module == "torch" and name in _STORAGES:
            return _Fixed(_STORAGES[name])
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str, int]:
        word, kind, key, _device, count = pid
        if word != "storage" or type(key) is not str or not files.is_whole(count):
            raise ForeignError("a storage is not what torch writes")
        return kind.value, key, count


class _View(io.RawIOBase):
    """A part of a file as a file, for zipfile."""

    def __init__(self, stream: IO[bytes], begin: int, length: int) -> None:
        self._stream, self._begin, self._length, self._at = stream, begin, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        size = left if size is None or size < 0 else min(size, left)
        self._stream.seek(self._begin + self._at)
        content = self._stream.read(size)
        self._at += len(content)
        return content
