"""Write what comparisons have shown into README.md, between its two marks.

    python benchmarks/does_it_help.py [--check]

The rows come from `results/compare-*.json`, which `megatron-idea compare` wrote. `--check` ends
with status 1 where README.md says something else.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- from benchmarks/does_it_help.py -->\n", "<!-- to here -->\n"

ROWS = {
    "regime_50": [("idea", "scratch"), ("idea", "scratch_flops")],
    "regime_200": [("idea", "scratch"), ("idea", "scratch_flops")],
    "regime_800": [("idea", "scratch"), ("idea", "scratch_flops")],
    "laptop": [
        ("idea", "scratch"),
        ("idea", "scratch_flops"),
        ("idea", "naive"),
        ("idea", "one_shot"),
        ("idea", "random"),
        ("distilled", "idea"),
    ],
    "methods": [
        ("idea", "scratch"),
        ("idea", "random"),
        ("idea", "magnitude"),
        ("efficient_llm_obs", "idea"),
        ("adapt_pruner", "idea"),
        ("llm_pruner", "random_groups"),
        ("idea_layers", "idea"),
        ("idea_layers", "shortgpt"),
    ],
}
"""Pairs to show of each suite."""

WORDS = {
    "idea": "IDEA Prune",
    "scratch": "training small",
    "scratch_flops": "training small over more tokens",
    "naive": "the naive pipeline (anneal, cut at once, new learning rate)",
    "one_shot": "removing all at once",
    "random": "removing by chance",
    "distilled": "IDEA Prune with its enlarged model as teacher",
    "magnitude": "removing the smallest weights",
    "efficient_llm_obs": "EfficientLLM with its update",
    "adapt_pruner": "Adapt-Pruner",
    "llm_pruner": "LLM-Pruner's scores, on neurons and KV groups",
    "random_groups": "chance, on neurons and KV groups",
    "idea_layers": "IDEA Prune on layers",
    "shortgpt": "ShortGPT's scores, on layers",
}


def results() -> dict[str, dict[str, Any]]:
    """Read the results that there are, by suite."""
    files = {suite: HERE / "results" / f"compare-{suite}.json" for suite in ROWS}
    return {suite: json.loads(file.read_text()) for suite, file in files.items() if file.is_file()}


def table() -> str:
    """Write the table, one row a pair."""
    lines = [
        "| | against | equal | parameters, tokens for each | difference | seeds | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for suite, found in results().items():
        pairs = {frozenset((p["left"], p["right"])): p for p in found["pairs"]}
        for left, right in ROWS[suite]:
            lines.append(row(pairs[frozenset((left, right))], left, right, found))
    return "\n".join(lines) + "\n"


def row(pair: dict[str, Any], left: str, right: str, found: dict[str, Any]) -> str:
    """Write a pair's row, from the point of view of ``left``."""
    turned = pair["left"] != left
    verdict, difference = pair["verdict"], pair["difference"]
    if turned:
        verdict = {"better": "worse", "worse": "better"}.get(verdict, verdict)
    mean = -difference["mean"] if turned else difference["mean"]
    half = (difference["high"] - difference["low"]) / 2
    arm = found["arms"][left]
    edge = any(found["arms"][name]["at_edge"] for name in (left, right))
    size = arm["parameters"][0]
    way = "lower" if mean < 0 else "higher"
    cells = (
        WORDS[left],
        WORDS[right],
        "tokens" if "tokens" in pair["equal"] else pair["equal"],
        f"{size / 1000:.1f}K, {arm['tokens'] / size:.0f}",
        f"{mean:+.4f} ± {half:.4f}",
        f"{pair['agree']} of {pair['of']} {way}",
        f"**{verdict}**{', at an end of the sweep' if edge else ''}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    text = README.read_text("utf-8")
    new, count = re.subn(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}{table()}{END}", text, flags=re.S)
    if count != 1:
        sys.exit(f"README.md has the two marks {count} times, and must have them once")
    if given.check and new != text:
        sys.exit("README.md does not say what benchmarks/results has: run this without --check")
    README.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
