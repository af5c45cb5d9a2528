"""A GGUF file is the exported model: equal tensors, equal ids, and the logits of transformers."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf import read, trained
from test_export import TEXTS, imported_widths, uneven_model
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine
from torch import Tensor
from typer.testing import CliRunner

from megatron_idea import cli
from megatron_idea.config import ConfigError
from megatron_idea.data.tokenizer import PADDING, SPECIAL, load_tokenizer, train_tokenizer
from megatron_idea.huggingface.export import byte_tokenizer_json, export_checkpoint
from megatron_idea.huggingface.gguf import _LLAMA_3, _QWEN_2, in_pairs, read_vocabulary
from megatron_idea.testing import Workers, assert_close, assert_equal

gguf = pytest.importorskip("gguf", reason="needs megatron-idea[gguf]")
transformers = pytest.importorskip("transformers", reason="needs megatron-idea[export]")

runner = CliRunner()
IDS = torch.from_numpy(np.random.default_rng(0).integers(262, size=(3, 8)))


class File:
    """A GGUF file as the package reads it: metadata, and tensors in fp32."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.said = {name: field.contents() for name, field in reader.fields.items()}
        self.kinds = {one.name: one.tensor_type.name for one in reader.tensors}
        self.tensors = {
            one.name: torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type).copy())
            for one in reader.tensors
        }
        self.architecture = self.said["general.architecture"]

    def size(self, name: str, layer: int = 0) -> Any:
        value = self.said[f"{self.architecture}.{name}"]
        return value[layer] if isinstance(value, list) else value

    def logits(self, ids: Tensor) -> Tensor:
        """The forward pass that llama.cpp has for llama, deci and qwen3, from this file alone."""
        epsilon = self.size("attention.layer_norm_rms_epsilon")
        channels = self.size("attention.key_length")

        def norm(x: Tensor, name: str) -> Tensor:
            return F.rms_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], epsilon)

        def linear(x: Tensor, name: str) -> Tensor:
            return F.linear(x, self.tensors[f"{name}.weight"])

        x = F.embedding(ids, self.tensors["token_embd.weight"])
        for layer in range(self.size("block_count")):
            heads = self.size("attention.head_count", layer)
            groups = self.size("attention.head_count_kv", layer)
            block, seen = f"blk.{layer}", norm(x, f"blk.{layer}.attn_norm")
            of_heads = {}
            for part, count in (("q", heads), ("k", groups), ("v", groups)):
                rows = linear(seen, f"{block}.attn_{part}").unflatten(-1, (count, channels))
                if self.architecture == "qwen3" and part != "v":
                    rows = norm(rows, f"{block}.attn_{part}_norm")
                rows = rows.transpose(1, 2).repeat_interleave(heads // count, dim=1)
                of_heads[part] = rows if part == "v" else self._rotated(rows)
            attended = F.scaled_dot_product_attention(
                of_heads["q"], of_heads["k"], of_heads["v"], is_causal=True
            )
            x = x + linear(attended.transpose(1, 2).flatten(2), f"{block}.attn_output")
            seen = norm(x, f"{block}.ffn_norm")
            wide = F.silu(linear(seen, f"{block}.ffn_gate")) * linear(seen, f"{block}.ffn_up")
            x = x + linear(wide, f"{block}.ffn_down")
        x = norm(x, "output_norm")
        return linear(x, "output" if "output.weight" in self.tensors else "token_embd")

    def _rotated(self, x: Tensor) -> Tensor:
        """RoPE: qwen3 turns a head's halves against each other, the others neighbours."""
        half = x.shape[-1] // 2
        angles = torch.outer(
            torch.arange(x.shape[-2], dtype=torch.float32),
            self.size("rope.freq_base") ** (-torch.arange(half) / half),
        )
        cos, sin = angles.cos(), angles.sin()
        if self.architecture == "qwen3":
            a, b = x[..., :half], x[..., half:]
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def of_folder(folder: Path) -> dict[str, Tensor]:
    """A Hugging Face folder's tensors by their GGUF names and, but for qwen3, in its order."""
    hf = json.loads((folder / "config.json").read_text())
    layers = hf["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, layers)
    found = {}
    for name, tensor in read(folder).items():
        if hf["model_type"] != "qwen3" and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = in_pairs(tensor, hf["head_dim"])
        found[names.get_name(name, try_suffixes=(".weight",))] = tensor.float()
    return found


def stock_logits(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits


KINDS = {
    "llama": {
        "qk_layernorm": False, "share_embeddings_and_output_weights": False, "hidden_size": 32,
        "kv_channels": 8, "num_query_groups": 2, "rotary_base": 500, "layernorm_epsilon": 1e-3,
    },
    "qwen3": {"hidden_size": 32, "kv_channels": 6, "num_query_groups": 2},
}  # fmt: skip
UNEVEN = {"scope": "global", "alignment": 1, "compact": True, "compaction_block": 2}


@pytest.fixture(scope="module", params=KINDS)
def run(request: Any, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in its prune phase whose layers differ in width; a tokenizer of 269 ids of 271."""
    folder = tmp_path_factory.mktemp(request.param)
    _, live = trained(
        workers, folder / "run", 1, 12, prune=UNEVEN,
        model=KINDS[request.param] | {"vocab_size": 271},
    )  # fmt: skip
    assert live[0] != live[1]
    train_tokenizer([Path(__file__)], 269, folder / "bpe.json")
    return folder / "run"


def exported(run: Path, out: Path, **options: Any) -> Path:
    tokenizer = str(run.parent / "bpe.json")
    export_checkpoint(run, out, tokenizer=tokenizer, **options)
    return out


def test_every_tensor_is_the_folders_and_its_logits_are_those_of_transformers(
    run: Path, tmp_path: Path
) -> None:
    folder = exported(run, tmp_path / "folder")
    file = File(exported(run, tmp_path / "file.gguf", format="gguf"))
    assert file.architecture == run.parent.name[:5]
    wanted = of_folder(folder)
    assert file.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_equal(file.tensors[name], tensor, name)
    assert set(file.kinds.values()) == {"F32"}
    assert_close(file.logits(IDS), stock_logits(folder), "logits", 1e-5)
    assert not [rest for rest in tmp_path.iterdir() if "partial" in rest.name]


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "q8_0"])
def test_smaller_formats_round_matrices_and_nothing_else(
    dtype: str, run: Path, tmp_path: Path
) -> None:
    folder = exported(run, tmp_path / "folder")
    file = File(exported(run, tmp_path / "file.gguf", format="gguf", dtype=dtype))
    for name, tensor in of_folder(folder).items():
        found = file.tensors[name]
        if tensor.dim() == 1:
            assert_equal(found, tensor.bfloat16().float() if dtype == "bf16" else tensor, name)
            assert file.kinds[name] == "F32"
        elif dtype == "bf16":
            assert_equal(found, tensor.bfloat16().float(), name)
        elif dtype == "fp16" or tensor.shape[-1] % 32:
            assert_equal(found, tensor.half().float(), name)
            assert file.kinds[name] == "F16"
        else:  # half a step of the block's scale, which is rounded to fp16 itself
            blocks = tensor.unflatten(-1, (-1, 32))
            step = blocks.abs().amax(-1, keepdim=True) / 127
            assert ((found.unflatten(-1, (-1, 32)) - blocks).abs() <= 0.57 * step).all(), name
            assert file.kinds[name] == "Q8_0"
    wanted = stock_logits(folder)
    difference = (file.logits(IDS) - wanted).norm() / wanted.norm()
    assert difference < {"fp16": 5e-3, "bf16": 5e-2, "q8_0": 1e-1}[dtype]


def test_metadata_is_complete(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "folder")
    hf = json.loads((folder / "config.json").read_text())
    file = File(exported(run, tmp_path / "file.gguf", format="gguf", dtype="q8_0"))
    for name, wanted in {
        "context_length": hf["max_position_embeddings"], "embedding_length": hf["hidden_size"],
        "block_count": 2, "feed_forward_length": hf["intermediate_size"],
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.key_length": hf["head_dim"], "attention.value_length": hf["head_dim"],
        "rope.dimension_count": hf["head_dim"], "rope.freq_base": hf["rope_theta"],
        "attention.layer_norm_rms_epsilon": pytest.approx(hf["rms_norm_eps"]),
        "vocab_size": 271,
    }.items():  # fmt: skip
        assert file.size(name) == wanted, name
    said = {name: value for name, value in file.said.items() if name.startswith("tokenizer.")}
    words = load_tokenizer(run.parent / "bpe.json")
    vocab = json.loads((run.parent / "bpe.json").read_text())["model"]
    tokens = said.pop("tokenizer.ggml.tokens")
    assert tokens[:269] == sorted(vocab["vocab"], key=vocab["vocab"].get)
    assert tokens[269:] == ["[PAD269]", "[PAD270]"]
    types = [gguf.TokenType(each).name for each in said.pop("tokenizer.ggml.token_type")]
    assert types[: len(SPECIAL)] == ["CONTROL"] * len(SPECIAL) and types[269:] == ["UNUSED"] * 2
    assert types.count("NORMAL") == 261
    merges = [" ".join(pair) for pair in vocab["merges"]]
    assert said.pop("tokenizer.ggml.merges") == merges and len(merges) == 5
    assert said == {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": words.eod, "tokenizer.ggml.eos_token_id": words.eod,
        "tokenizer.ggml.padding_token_id": SPECIAL.index(PADDING),
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }  # fmt: skip
    assert (
        file.said["general.name"] == "run" and "step 12" in file.said["general.description"].lower()
    )
    assert (file.said["general.file_type"], file.said["general.quantization_version"]) == (7, 2)


def test_the_compact_layout_is_a_deci_with_a_width_for_each_layer(
    workers: Workers, tmp_path: Path
) -> None:
    """And without QK norm or heads that fill the hidden size, the padded one is a Llama."""
    model = {"qk_layernorm": False, "kv_channels": 6}
    _, live = trained(workers, tmp_path / "run", 1, 12, model=model, prune=UNEVEN)
    padded, compact, folder = (tmp_path / name for name in ("padded.gguf", "compact.gguf", "hf"))
    export_checkpoint(tmp_path / "run", padded, format="gguf")
    export_checkpoint(tmp_path / "run", compact, format="gguf", layout="compact")
    export_checkpoint(tmp_path / "run", folder)
    small, large = File(compact), File(padded)
    assert small.said["deci.feed_forward_length"] == live and small.architecture == "deci"
    assert large.architecture == "llama" and large.size("feed_forward_length") == max(live)
    wanted = stock_logits(folder)
    assert_close(small.logits(IDS), wanted, "logits", 1e-5)
    assert_close(large.logits(IDS), wanted, "logits", 1e-5)
    with pytest.raises(ConfigError, match="have no QK norm"):
        trained(workers, tmp_path / "norms", 1, 2)
        export_checkpoint(tmp_path / "norms", tmp_path / "n.gguf", format="gguf", layout="compact")
    assert not (tmp_path / "n.gguf").exists()


def test_a_bf16_run_gives_its_weights_or_main_weights(workers: Workers, tmp_path: Path) -> None:
    trained(workers, tmp_path / "run", 1, 4, training={"precision": "bf16"})
    for dtype, hf in (("", "bf16"), ("fp16", "fp32")):
        export_checkpoint(tmp_path / "run", tmp_path / f"{hf}.gguf", format="gguf", dtype=dtype)
        export_checkpoint(tmp_path / "run", tmp_path / hf, dtype=hf)
        file = File(tmp_path / f"{hf}.gguf")
        for name, tensor in of_folder(tmp_path / hf).items():
            rounded = tensor.half().float() if dtype and tensor.dim() > 1 else tensor
            assert_equal(file.tensors[name], rounded, name)
        assert set(file.kinds.values()) == {"F32", "F16" if dtype else "BF16"}


def test_the_command_writes_a_file_or_says_why_not(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*options: str, out: str = "file.gguf") -> Any:
        words = ["export", str(run), str(tmp_path / out), "--format", "gguf", *options]
        return runner.invoke(cli.app, [*words, "--tokenizer", str(run.parent / "bpe.json")])

    def refused(message: str, *options: str, **where: str) -> None:
        result = export(*options, **where)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.stderr
        assert [each.name for each in tmp_path.iterdir()] == before

    before: list[str] = []
    refused("ends in .gguf", out="file")
    refused("legal values of --format gguf: fp32, fp16, bf16, q8_0", "--dtype", "q4_0")
    refused("it is one file", "--max-shard-gb", "1")
    refused("writes Hugging Face folders", "--draft-of", str(tmp_path / "large"))
    done = export("--dtype", "q8_0")
    assert done.exit_code == 0 and f"GGUF ({run.parent.name[:5]}, q8_0) of" in done.stdout
    assert "are fp16: their rows are not whole blocks of 32" in " ".join(done.stdout.split())
    before = ["file.gguf"]
    refused("exists already; name a file that does not")
    found = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    refused("pip install 'megatron-idea[gguf]'", out="other.gguf")


def test_a_number_beyond_fp16_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_idea.huggingface import export

    monkeypatch.setattr(export, "cut", lambda weight, *_: weight * 1e9)
    with pytest.raises(ConfigError, match=r"embed_tokens.weight has a weight .* F16 ends at 65504"):
        exported(run, tmp_path / "file.gguf", format="gguf", dtype="fp16")
    assert not list(tmp_path.iterdir())


def byte_level(pre: Any, **model: Any) -> Engine:
    letters = json.loads(byte_tokenizer_json())["model"]["vocab"]
    merges = [("t", "h"), ("th", "e")]
    vocab = letters | {"th": 256, "the": 257}
    engine = Engine(models.BPE(vocab=vocab, merges=merges, **model))
    engine.pre_tokenizer = pre
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return engine


def splitting(*steps: Any) -> Any:
    return pre_tokenizers.Sequence(list(steps))


def by(rule: str) -> Any:
    return pre_tokenizers.Split(Regex(rule), "isolated")


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PRE = {
    "gpt-2": (WORDS, False),
    "smollm": (splitting(pre_tokenizers.Digits(individual_digits=True), WORDS), False),
    "llama-bpe": (splitting(by(_LLAMA_3), BYTES), True),
    "dbrx": (splitting(by(_LLAMA_3), BYTES), False),
    "qwen2": (splitting(by(_QWEN_2), BYTES), False),
}


@pytest.mark.parametrize("name", PRE)
def test_known_ways_to_split_text_have_llama_cpps_name(name: str) -> None:
    pre, ignore_merges = PRE[name]
    engine = byte_level(pre, ignore_merges=ignore_merges)
    engine.add_tokens([AddedToken("[PAD261]", normalized=False)])
    engine.normalizer = normalizers.NFC()
    found = read_vocabulary(engine.to_str(), 262)
    assert (found.pre, found.merges) == (name, ["t h", "th e"])
    assert found.tokens[256:] == ["th", "the", "<|endoftext|>", "[PAD261]", "[PAD260]", "[PAD261]_"]
    assert found.types[257:] == ["NORMAL", "CONTROL", "USER_DEFINED", "UNUSED", "UNUSED"]
    assert "normal form C" in found.notes[0]
    engine.normalizer = None
    assert read_vocabulary(engine.to_str(), 262).notes == []


def test_the_byte_tokenizer_gets_a_merge_that_no_text_asks_for() -> None:
    found = read_vocabulary(byte_tokenizer_json(), 257)
    assert found.merges == ["ÿ ÿ"] and found.pre == "gpt-2" and "ÿÿ" not in found.tokens
    assert b"\xff" not in "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000)))).encode()


def test_a_tokenizer_that_gguf_cannot_say_is_refused_with_the_reason() -> None:
    def refused(engine: Engine, says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            read_vocabulary(engine.to_str(), 300)

    refused(byte_level(WORDS, byte_fallback=True), "it is BPE with byte fallback")
    refused(Engine(models.WordLevel({"a": 0}, unk_token="a")), "it is WordLevel")
    refused(byte_level(BYTES), "splits text in none of the ways")
    refused(byte_level(splitting(by("a+"), BYTES)), "splits text in none of the ways")
    refused(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "splits text in none")
    refused(byte_level(WORDS, ignore_merges=True), "splits text in none of the ways")
    refused(byte_level(WORDS, dropout=0.1), "its model has dropout 0.1")
    engine = byte_level(WORDS)
    engine.normalizer = normalizers.Lowercase()
    refused(engine, "it changes text first, by Lowercase. --format huggingface keeps")
    engine = byte_level(WORDS)
    engine.add_tokens([AddedToken("<mask>", lstrip=True)])
    refused(engine, "tokens that swallow blanks")


def test_the_chat_template_goes_along_and_so_does_the_token_that_ends_a_turn(
    run: Path, tmp_path: Path
) -> None:
    engine = byte_level(WORDS)
    engine.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    chat = tmp_path / "chat"
    chat.mkdir()
    engine.save(str(chat / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    several = [{"name": "rag", "template": "x"}, {"name": "default", "template": template}]
    for number, said in enumerate((template, several, None, 7)):
        settings = {"eos_token": "<|im_end|>", "chat_template": said}
        (chat / "tokenizer_config.json").write_text(json.dumps(settings))
        out = tmp_path / f"{number}.gguf"
        export_checkpoint(run, out, format="gguf", tokenizer=str(chat))
        found = File(out).said
        assert found.get("tokenizer.chat_template") == (template if number < 2 else None)
        assert found["tokenizer.ggml.eos_token_id"] == 258
        assert found["tokenizer.ggml.eot_token_id"] == 259
    (chat / "chat_template.jinja").write_text("{{ messages }}")
    export_checkpoint(run, tmp_path / "file.gguf", format="gguf", tokenizer=str(chat))
    assert File(tmp_path / "file.gguf").said["tokenizer.chat_template"] == "{{ messages }}"
    for content, says in ((b"x" * (1 << 20) + b"x", "larger than"), (b"\xff", "cannot be read")):
        (chat / "chat_template.jinja").write_bytes(content)
        with pytest.raises(ConfigError, match=says):
            export_checkpoint(run, tmp_path / "no.gguf", format="gguf", tokenizer=str(chat))
    assert not (tmp_path / "no.gguf").exists()


LLAMA_CPP_PYTHON = os.environ.get("LLAMA_CPP_PYTHON")
READ_GGUF = """
import json, sys, numpy, llama_cpp
path, out, texts, ids = sys.argv[1:]
fp32 = 0  # of the cache; llama.cpp's own choice is fp16
model = llama_cpp.Llama(path, n_ctx=64, logits_all=True, verbose=False, type_k=fp32, type_v=fp32)
said = [model.tokenize(t.encode(), add_bos=True, special=False) for t in json.loads(texts)]
back = [model.detokenize(each).decode() for each in said]
model.eval(json.loads(ids))
numpy.savez(out, ids=json.dumps([said, back]), logits=model.scores[: len(json.loads(ids))])
"""


def llama_cpp(path: Path, texts: list[str], ids: list[int]) -> tuple[Any, Tensor]:
    """What llama.cpp makes of texts, and its logits of ``ids``."""
    if not LLAMA_CPP_PYTHON:
        pytest.skip("set LLAMA_CPP_PYTHON to a python that has llama_cpp")
    out = path.with_suffix(".npz")
    safe = os.environ | {"PYTHONSAFEPATH": "1"}
    command = [LLAMA_CPP_PYTHON, "-c", READ_GGUF, path, out, json.dumps(texts), json.dumps(ids)]
    subprocess.run(command, env=safe, check=True, capture_output=True)
    found = np.load(out)
    return json.loads(str(found["ids"])), torch.from_numpy(found["logits"])


@pytest.mark.parametrize("case", ["llama padded", "qwen3 padded", "llama compact"])
def test_llama_cpp_says_what_transformers_says(case: str, tmp_path: Path) -> None:
    """The compact layers are of 512 and 384 neurons, which the converter could not write."""
    kind, layout = case.split()
    expected = uneven_model(kind, tmp_path, 384, hidden_size=64, head_dim=32)
    assert imported_widths(tmp_path) == (512, 384)
    words = load_tokenizer(tmp_path / "hf")
    ids = IDS.reshape(-1).tolist()
    with torch.no_grad():
        wanted = expected(torch.tensor([ids])).logits[0]
    for dtype, most in (("fp32", 1e-4), ("fp16", 1e-2), ("bf16", 1e-1), ("q8_0", 2e-1)):
        out = tmp_path / f"{dtype}.gguf"
        export_checkpoint(tmp_path / "run", out, format="gguf", layout=layout, dtype=dtype)
        (said, back), logits = llama_cpp(out, TEXTS, ids)
        assert said == [words.encode(text) for text in TEXTS] and back == TEXTS
        print(
            f"{case} {dtype}: {float((logits - wanted).abs().max()):.2g}, {wanted.abs().max():.2g}"
        )
        assert_close(logits, wanted, f"logits of {dtype}", most)


@pytest.mark.parametrize("name", [*PRE, "byte"])
def test_llama_cpp_splits_text_as_the_tokenizer_does(
    name: str, workers: Workers, tmp_path: Path
) -> None:
    if not LLAMA_CPP_PYTHON:
        pytest.skip("set LLAMA_CPP_PYTHON to a python that has llama_cpp")
    text = (Path(__file__).read_text() + Path(cli.__file__).read_text()).replace("the", "thE 12345")
    engine = Engine.from_str(byte_tokenizer_json())
    if name != "byte":
        from tokenizers import trainers

        pre, ignore_merges = PRE[name]
        engine = Engine(models.BPE(ignore_merges=ignore_merges))
        engine.pre_tokenizer, engine.decoder = pre, decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        engine.train_from_iterator(
            [text],
            trainers.BpeTrainer(
                vocab_size=1000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet,
                show_progress=False,
            ),
        )  # fmt: skip
    engine.save(str(tmp_path / "tokenizer.json"))
    words = load_tokenizer(tmp_path / "tokenizer.json")
    model = {"vocab_size": 1000, "kv_channels": 8}
    trained(workers, tmp_path / "run", 1, 1, model=model)
    export_checkpoint(
        tmp_path / "run", tmp_path / "file.gguf", format="gguf",
        tokenizer=str(tmp_path / "tokenizer.json"),
    )  # fmt: skip
    texts = [
        *TEXTS,
        "12345 1234x \uff11\uff12 don't I'LL\r\n\r\n  \t x  ",
        "<|endoftext|> ☃",
        text[:4000],
    ]
    (said, back), _ = llama_cpp(tmp_path / "file.gguf", texts, [1, 2])
    for given, ids, again in zip(texts, said, back, strict=True):
        assert ids == words.encode(given), given
        assert again == given
