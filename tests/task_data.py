"""Made-up questions of the tasks that people run most, where a machine with a network keeps them.

``datasets`` itself writes the files that it would write after a download from the hub, so that the
harness's own task definitions find them in ``HF_HOME`` without one.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

Splits = dict[str, list[dict[str, Any]]]

SHOTS = 5


def sentence(rng: random.Random, words: int) -> str:
    letters = ["".join(rng.choices("abcdeéilnoprst", k=rng.randint(1, 6))) for _ in range(words)]
    return " ".join(letters)


def subjects() -> list[str]:
    """Of MMLU: 57."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    return sorted(file.stem.removeprefix("mmlu_") for file in folder.glob("mmlu_*.yaml"))


def mmlu(rng: random.Random, subject: str) -> Splits:
    """One to three questions, and five with which to show how it is done."""

    def question() -> dict[str, Any]:
        choices = [sentence(rng, 1) for _ in "ABCD"]
        answer = rng.randrange(4)
        return {"question": sentence(rng, 3), "subject": subject, "choices": choices,
                "answer": answer}  # fmt: skip

    count = rng.randint(1, 3)
    return {"test": [question() for _ in range(count)], "dev": [question() for _ in range(SHOTS)]}


def arc_easy(rng: random.Random) -> dict[str, Any]:
    text = [sentence(rng, rng.randint(1, 3)) for _ in range(4)]
    return {"id": "x", "question": sentence(rng, 4), "choices": {"text": text, "label": [*"ABCD"]},
            "answerKey": rng.choice("ABCD")}  # fmt: skip


def hellaswag(rng: random.Random) -> dict[str, Any]:
    endings = [sentence(rng, rng.randint(2, 4)) for _ in "ABCD"]
    label = str(rng.randrange(4))
    return {"activity_label": sentence(rng, 1), "ctx_a": sentence(rng, 3) + ".",
            "ctx_b": sentence(rng, 2), "endings": endings, "label": label}  # fmt: skip


def piqa(rng: random.Random) -> dict[str, Any]:
    return {"goal": sentence(rng, 3), "sol1": sentence(rng, 2), "sol2": sentence(rng, 3),
            "label": rng.randrange(2)}  # fmt: skip


def winogrande(rng: random.Random) -> dict[str, Any]:
    return {"sentence": f"{sentence(rng, 2)} _ {sentence(rng, 3)}.", "option1": sentence(rng, 1),
            "option2": sentence(rng, 1), "answer": rng.choice("12")}  # fmt: skip


def build(home: Path) -> dict[str, list[dict[str, Any]]]:
    """Fill the cache; returns the questions of each task, and the examples of ``mmlu_X`` as
    ``mmlu_X/dev``."""
    import datasets

    datasets.disable_progress_bars()
    rng = random.Random(0)
    asked: dict[str, list[dict[str, Any]]] = {}
    for subject in subjects():
        splits = mmlu(rng, subject)
        put(home, "cais/mmlu", subject, splits)
        asked |= {f"mmlu_{subject}": splits["test"], f"mmlu_{subject}/dev": splits["dev"]}
    for task, question, repository, name, split in (
        ("arc_easy", arc_easy, "allenai/ai2_arc", "ARC-Easy", "test"),
        ("hellaswag", hellaswag, "Rowan/hellaswag", "default", "validation"),
        ("piqa", piqa, "baber/piqa", "default", "validation"),
        ("winogrande", winogrande, "allenai/winogrande", "winogrande_xl", "validation"),
    ):
        asked[task] = [question(rng) for _ in range(12)]
        put(home, repository, name, {split: asked[task]} | {"train": asked[task][:1]})
    return asked


def put(home: Path, repository: str, name: str, splits: Splits) -> None:
    """One configuration of a dataset of the hub, as ``datasets`` keeps it after a download."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    scratch, cache = home / "scratch", home / "datasets"
    scratch.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(str(scratch / f"{split}.parquet"))
    builder = Parquet(
        cache_dir=str(scratch / "prepared"),
        dataset_name=repository.partition("/")[2],
        config_name=name,
        hash="0" * 40,  # the commit
        data_files={split: [str(scratch / f"{split}.parquet")] for split in splits},
    )
    builder.download_and_prepare()
    version, commit = Path(builder.cache_dir).parts[-2:]
    target = cache / repository.replace("/", "___") / name / version
    target.mkdir(parents=True)
    Path(builder.cache_dir).rename(target / commit)
