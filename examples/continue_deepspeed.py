"""Go on with an exported model under DeepSpeed ZeRO, with the optimizer state that it had.

    megatron-idea export runs/mine out/mine --optimizer
    torchrun --nproc-per-node 2 examples/continue_deepspeed.py \\
        out/mine runs/mine/config.yaml out/continued --stage 2

In torchrun's place DeepSpeed's own launcher: `deepspeed --num_accelerators 2 --no_local_rank`.
Data, batches, learning rate and the number of tokens are those of the run's configuration, so this
is what the run itself would have done, but for a teacher (`distill`), which is left out. To
fine-tune, begin anew with others:

    ... out/mine runs/mine/config.yaml out/tuned --fresh 'data.train=[{prefix: data/other}]' \\
        schedule.total_tokens=1e6 schedule.lr=1e-5 schedule.min_lr=0

A second call resumes from OUT.zero, on as many ranks. For another number make it universal first,
and add --universal to that call:

    python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state \\
        --input_folder out/continued.zero/step5 --output_folder out/continued.zero/universal
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from deepspeed import utils
from safetensors.torch import load_file

from megatron_idea import config as configuration
from megatron_idea.course import num_steps
from megatron_idea.data.batches import Batches
from megatron_idea.data.of_run import cache_dir
from megatron_idea.data.tokenizer import load_tokenizer
from megatron_idea.schedule import learning_rate


def arguments():
    parser = argparse.ArgumentParser(description="Continue an export under DeepSpeed.")
    parser.add_argument("export", type=Path, help="what megatron-idea export wrote")
    parser.add_argument("config", type=Path, help="the run's configuration")
    parser.add_argument("out", type=Path, help="new Hugging Face folder; OUT.zero has checkpoints")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2, 3), help="of ZeRO")
    parser.add_argument("--fresh", action="store_true", help="no moments, from token 0")
    parser.add_argument("--steps", type=int, help="stop after so many, to be resumed")
    parser.add_argument("--universal", action="store_true", help="OUT.zero is a universal one")
    return parser.parse_intermixed_args()  # overrides after options, too


def start():
    # Unless told otherwise DeepSpeed compiles an op for CPUs, for a minute, that gloo replaces.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()


def micro_batch_size(training):
    """Return the run's, or less where its batch is spread over more ranks."""
    share, rest = divmod(training.global_batch_size, dist.get_world_size())
    if rest:
        raise SystemExit(
            f"a batch of {training.global_batch_size} sequences cannot be spread over "
            f"{dist.get_world_size()} ranks: start a divisor of it"
        )
    return math.gcd(training.micro_batch_size, share)


def open_engine(given, config, state):
    """Return DeepSpeed's engine around the exported model and torch's AdamW."""
    model = transformers.AutoModelForCausalLM.from_pretrained(given.export, dtype="auto")
    model.config.use_cache = False
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[name] for name in group["names"]], "weight_decay": group["weight_decay"]}
        for group in state["groups"]
    ]
    training = config.training
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch_size(training),
        "train_batch_size": training.global_batch_size,
        "gradient_clipping": state["clip_grad"],
        "zero_optimization": {"stage": given.stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "checkpoint": {"load_universal": given.universal},
        "steps_per_print": 10**9,
    }
    adam = torch.optim.AdamW(groups, betas=state["betas"], eps=state["eps"], fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=settings)
    return engine


def load_moments(engine, folder, stage, step):
    """Give ZeRO's partitions the moments, and a bf16 model the fp32 main weights, of the run."""
    zero, adam = engine.optimizer, engine.optimizer.optimizer
    # AdamW makes its state in the first step, too late for us. ZeRO-3 hides from AdamW what it is
    # to update until then; ZeRO-1 and -2 link parameters to a state that must be there.
    flat = [p for group in adam.param_groups for p in group["params"]]
    for part in zero.fp32_partitioned_groups_flat if stage == 3 else flat:
        adam.state[part] = {key: torch.zeros_like(part) for key in ("exp_avg", "exp_avg_sq")}
        adam.state[part]["step"] = torch.tensor(float(step), device=part.device)
    if stage < 3:
        zero._lazy_init_hp_params_optimizer_state()  # no public name in 0.19
    named = dict(engine.module.named_parameters())
    for file in sorted(folder.glob("*.safetensors")):
        for key, value in load_file(file).items():
            kind, _, name = key.partition(".")
            parameter = named[name]
            if stage == 3:  # DeepSpeed's own call for all of it wants a size that the ranks divide
                size = parameter.ds_tensor.numel()
                padded = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
                value = padded[size * dist.get_rank() :][:size].to(parameter.device)
                main, moment = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
            else:
                main, moment = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
            main(parameter, value) if kind == "main" else moment(parameter, value, kind)


def train_step(engine, batches, samples, rates):
    """Take one step, each group at its learning rate; returns the loss of the global batch."""
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    total = torch.zeros((), device=engine.device)
    for batch in batches.step(samples):
        logits = engine(input_ids=batch["tokens"]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())
        engine.backward(loss)  # divides by the number of micro-batches
        engine.step()  # steps after the last of them
        total += loss.detach() / batches.num_microbatches
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def save_folder(engine, given):
    """Write what `megatron-idea evaluate`, `import` and transformers read."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        if dist.get_rank() == 0:
            engine.module.save_pretrained(given.out)
    if dist.get_rank() == 0:
        for file in ("tokenizer*", "chat_template*", "special_tokens_map*", "generation_config*"):
            for path in given.export.glob(file):
                shutil.copy(path, given.out)


def run(given):
    config = configuration.load(given.config, given.overrides)
    settings = given.export / "optimizer/optimizer.json"
    if not settings.is_file():
        raise SystemExit(f"there is no {settings}: megatron-idea export RUN OUT --optimizer")
    state = json.loads(settings.read_text())
    if not given.fresh and state["consumed_tokens"] >= config.schedule.total_tokens:
        raise SystemExit(
            f"{given.export} has consumed all of its {state['consumed_tokens']:,} tokens: raise "
            "schedule.total_tokens, or begin anew with --fresh"
        )
    engine = open_engine(given, config, state)
    if given.fresh:
        state |= {"consumed_tokens": 0, "skipped_samples": 0}
    tokens, skipped = state["consumed_tokens"], state["skipped_samples"]
    checkpoints = Path(f"{given.out}.zero")
    if (checkpoints / "latest").exists():
        tokens = engine.load_checkpoint(checkpoints)[1]["consumed_tokens"]
    elif not given.fresh:
        load_moments(engine, given.export / "optimizer", given.stage, state["step"])
    samples = num_steps(config) * config.training.global_batch_size
    batches = Batches(
        config.data.train, load_tokenizer(config.data.tokenizer), split="train",
        num_samples=samples, seed=config.training.seed, cache_dir=cache_dir(config),
        seq_length=config.training.seq_length, model_vocab_size=config.model.vocab_size,
        micro_batch_size=micro_batch_size(config.training),
        global_batch_size=config.training.global_batch_size,
        dp_rank=dist.get_rank(), dp_size=dist.get_world_size(), device=engine.device,
    )  # fmt: skip
    taken = 0
    while tokens < config.schedule.total_tokens and taken != given.steps:
        begin = (tokens // config.training.seq_length + skipped) % samples
        tokens, taken = tokens + config.batch_tokens, taken + 1
        lr = learning_rate(config.schedule, tokens)
        rates = [lr * group["lr_mult"] for group in state["groups"]]
        loss = train_step(engine, batches, begin, rates)
        if dist.get_rank() == 0:
            print(f"{tokens:,} tokens  loss {loss:.6f}  lr {lr:.3g}", flush=True)
            with Path(f"{given.out}.jsonl").open("a") as log:
                log.write(json.dumps({"consumed_tokens": tokens, "loss": loss}) + "\n")
    step = f"step{tokens // config.batch_tokens}"
    engine.save_checkpoint(checkpoints, step, {"consumed_tokens": tokens})
    save_folder(engine, given)
    dist.barrier()


def main():
    given = arguments()
    start()
    run(given)
    dist.destroy_process_group()  # else gloo may abort when Python ends


if __name__ == "__main__":
    main()
