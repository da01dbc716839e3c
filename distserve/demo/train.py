"""Train the demo model: `python -m distserve.demo.train` (about 50 minutes on one CPU core, no network).

Promises a Hugging Face model directory (weights in bfloat16, tokenizer, chat template) that is replaced only when the
new one is complete. A run that ends by `--steps` repeats: the same text, tokenizer and batches under the same Python
version, weights up to float rounding. One that ends by `--max-minutes` depends on the machine's speed.

The shipped weights were made with Python 3.11.7, torch 2.13 and transformers 5.23 on one thread of a busy CPU, in
52 minutes and 4.7 million tokens:

1. `--max-minutes 48 --checkpoints STAGE1`, stopped after 25.6 minutes (1,259 steps, loss 1.81; the weights in
   `conversation.toml` were half of today's);
2. `--start-from STAGE1 --rare-weight 0.25 --rate 0.6 --seed 1 --max-minutes 26` (1,042 steps, final loss 0.942).
"""

import argparse
import copy
import itertools
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distserve.demo import model_dir
from distserve.demo.batches import BatchSampler
from distserve.demo.corpus import Corpus, gather
from distserve.demo.tokenizer import render, train_tokenizer

VOCAB_SIZE = 3072
MAX_POSITIONS = 2048
SHORT_ROWS = (8, 256)  # rows and tokens per row of most batches
LONG_ROWS = (1, 2048)  # of every LONG_EVERY-th batch, so that all positions are trained
LONG_EVERY = 16
MUON_RATE = 1e-2  # peak learning rates
ADAMW_RATE = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.02
MAX_GRADIENT_NORM = 1.0
REPORT_SECONDS = 15.0
CHECKPOINT_SECONDS = 300.0
MAX_ANSWER_TOKENS = 200
SAMPLE_QUESTIONS = ("Hello!", "What does str.split do?", "Explain json.dumps", "How do I use os.path.join?")


@dataclass(frozen=True)
class Budget:
    """How long to train: `num_steps` optimiser steps, or `max_seconds` of wall time if that is over first."""

    num_steps: int
    max_seconds: float

    def progress(self, step: int, elapsed: float) -> float:
        """Return the part of the training that is done, 0 to 1, by whichever limit is nearer."""
        return min(1.0, max(step / self.num_steps, elapsed / self.max_seconds))


def rate_factor(step: int, progress: float) -> float:
    """Learning rate over its peak: a linear warm-up over the first steps, half a cosine down to 0 at progress 1."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * progress)) / 2


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a small Llama with random weights: 3.4 million parameters, 8 query heads on 2 KV heads."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def tokenizer_texts(corpus: Corpus, seed: int) -> list[str]:
    """Return what the tokenizer learns its merges from: every answer, some questions, every text."""
    rng = random.Random(seed)
    conversations = (corpus.conversation(rng) for _ in range(2 * len(corpus.entries)))
    return [*(message["content"] for messages in conversations for message in messages), *corpus.texts]


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for embeddings and norms, as Muon's authors advise.

    At this size Muon reaches AdamW's loss in two thirds of the steps, for a tenth more time per step.
    """
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    is_matrix = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in is_matrix]
    muon = torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [muon, adamw]


def train(
    model: LlamaForCausalLM, sampler: BatchSampler, budget: Budget, rate: float, checkpoint: "Checkpoint"
) -> float:
    """Train `model` in place until the budget is used up; return the mean loss of the last 50 steps.

    `rate` scales the peak learning rates.
    """
    parts = optimizers(model)
    peaks = [part.param_groups[0]["lr"] for part in parts]
    model.train()
    started = reported = time.monotonic()
    losses: list[float] = []
    num_tokens = 0
    for step in itertools.count():
        progress = budget.progress(step, time.monotonic() - started)
        if progress >= 1.0:
            break
        for part, peak in zip(parts, peaks, strict=True):
            part.param_groups[0]["lr"] = rate * peak * rate_factor(step, progress)
        ids, labels = sampler.batch(*(LONG_ROWS if step % LONG_EVERY == LONG_EVERY - 1 else SHORT_ROWS))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        for part in parts:
            part.step()
            part.zero_grad()
        losses.append(loss.item())
        num_tokens += ids.numel()
        if time.monotonic() - reported >= REPORT_SECONDS:
            reported = time.monotonic()
            elapsed = reported - started
            left = elapsed * (1 / budget.progress(step + 1, elapsed) - 1)
            print(
                f"step {step + 1}/{budget.num_steps}  loss {mean(losses[-50:]):.3f}  "
                f"{num_tokens / elapsed:.0f} tokens/s  {elapsed / 60:.1f} min, about {left / 60:.1f} min left",
                flush=True,
            )
            checkpoint.save_if_due()
    print(f"{len(losses)} steps, {num_tokens} tokens, {(time.monotonic() - started) / 60:.1f} min", flush=True)
    return mean(losses[-50:])


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean of a non-empty sequence."""
    return sum(values) / len(values)


class Checkpoint:
    """Saves the model to `folder` every few minutes, so that a training cut short leaves a usable one."""

    def __init__(self, folder: Path | None, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        self._folder = folder
        self._model = model
        self._tokenizer = tokenizer
        self._saved = time.monotonic()

    def save_if_due(self) -> None:
        """Save when a folder was given and the last save is long enough ago."""
        if self._folder is not None and time.monotonic() - self._saved >= CHECKPOINT_SECONDS:
            save(self._model, self._tokenizer, self._folder)
            self._saved = time.monotonic()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model directory beside `folder`, then put it in its place; `folder` is never half written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        half = copy.deepcopy(model)
        half.bfloat16()
        half.save_pretrained(new)
        tokenizer.save_pretrained(new)
        if folder.exists():
            folder.replace(old)
        new.replace(folder)


def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """Return the model's greedy answer to one question, its end token shown."""
    prompt = render(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)  # type: ignore[misc]  # its self type fits no model
    return str(tokenizer.decode(output[0, ids.shape[1] :]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distserve.demo.train",
        description="Train distserve's demo model on Python's own documentation, from nothing and without a network.",
        epilog="A first look takes two minutes: --max-minutes 2 --output /some/new/folder",
    )
    parser.add_argument("--output", type=Path, default=model_dir(), help="model directory to replace (%(default)s)")
    parser.add_argument("--steps", type=int, default=5600, help="optimiser steps of 2048 tokens (%(default)s)")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="end (and cool down) by then at the latest")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (%(default)s)")
    parser.add_argument(
        "--rare-weight",
        type=float,
        default=1.0,
        help="how often little-known functions are seen, relative to 3 for popular ones (%(default)s)",
    )
    parser.add_argument("--start-from", type=Path, help="go on from this model directory, with its tokenizer")
    parser.add_argument("--rate", type=float, default=1.0, help="scales the learning rates (%(default)s)")
    parser.add_argument("--checkpoints", type=Path, help="also save a usable model here every five minutes")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.max_minutes <= 0 or options.threads < 1 or options.rate <= 0:
        parser.error("--steps, --max-minutes, --threads and --rate must be positive")
    if options.rare_weight < 0:
        parser.error("--rare-weight must not be negative")

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    corpus = gather(options.rare_weight)
    print(f"{len(corpus.entries)} answers, {len(corpus.texts)} texts from Python {sys.version.split()[0]}", flush=True)
    if options.start_from is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.start_from)
        for origin in ("is_local", "local_files_only"):  # how it was loaded is no property of the tokenizer
            tokenizer.init_kwargs.pop(origin, None)
        model = LlamaForCausalLM.from_pretrained(options.start_from, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(tokenizer_texts(corpus, options.seed), VOCAB_SIZE, MAX_POSITIONS)
        model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} token vocabulary", flush=True)
    budget = Budget(options.steps, options.max_minutes * 60)
    checkpoint = Checkpoint(options.checkpoints, model, tokenizer)
    final_loss = train(model, BatchSampler(corpus, tokenizer, options.seed), budget, options.rate, checkpoint)
    save(model, tokenizer, options.output)
    print(f"final loss {final_loss:.3f}, saved to {options.output}", flush=True)
    model.train(mode=False)
    for question in SAMPLE_QUESTIONS:
        print(f"\n> {question}\n{answer(model, tokenizer, question)}", flush=True)


if __name__ == "__main__":
    main()
