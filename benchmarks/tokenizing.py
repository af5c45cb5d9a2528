"""What ``tokenize`` adds to the tokenizers library on one core.

    python -W ignore benchmarks/tokenizing.py [--rounds 9] [--megabytes 2]

Reading JSON lines, the split by hashes, files and checksums against ``encode_batch`` alone, of the
same documents in memory, by the quickstart's kind of tokenizer: CPU seconds of this one process,
in alternation, without threads of the library. Speeds are relative to the library's: 1 is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tokenizers

from megatron_idea.data.corpus import build_corpus
from megatron_idea.data.documents import Documents
from megatron_idea.data.tokenizer import train_tokenizer
from megatron_idea.data.tokenizing import tokenize

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves a script's folder out

from measure import RESULTS, alternate, keep, ratio

GOALS = {"encode_batch": 0.9, "encode_batch_fast": 0.9}
"""Least speed relative to each way to call the library."""
VOCAB_SIZE = 2048


def measure(folder: Path, size: int, rounds: int) -> dict[str, Any]:
    source = folder / "text.jsonl"
    build_corpus(folder / "all.jsonl")
    texts: list[str] = []
    taken = 0
    with source.open("w") as stream:
        for document in Documents([folder / "all.jsonl"]):
            texts.append(document.text)
            taken += len(document.text.encode())
            stream.write(json.dumps({"text": document.text}) + "\n")
            if taken >= size:
                break
    ours = train_tokenizer([source], VOCAB_SIZE, folder / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: tokenize([source], folder / "set", ours),
        "encode_batch": lambda: theirs.encode_batch(texts, add_special_tokens=False),
        "encode_batch_fast": lambda: theirs.encode_batch_fast(texts, add_special_tokens=False),
    }
    seconds = alternate(calls, rounds, warmup=1)
    found: dict[str, Any] = {"documents": len(texts), "text_bytes": taken}
    for name in ("encode_batch", "encode_batch_fast"):
        found[name] = ratio(seconds[name], seconds["ours"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=float, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), int(1e6 * arguments.megabytes), arguments.rounds)
    for name, goal in GOALS.items():
        value = found[name]["ratio"]
        verdict = "reached" if value >= goal else f"missed by {goal - value:.3f}"
        print(f"{name:<28} {value:6.3f}   goal >= {goal:.2f}   {verdict}")
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    about = {"vocab_size": VOCAB_SIZE, "load_per_core": round(load, 1)}
    keep(RESULTS / "tokenizing-cpu.json", about | {"goals": GOALS, "measured": found})


if __name__ == "__main__":
    main()
