"""Train the tiny Mamba/attention model that comes with makeready.

The text is the language reference that every Python ships as `pydoc_data.topics`, followed by
Python's LICENSE.txt, so nothing is downloaded and the result may be passed on with Python's notice.
The model is a stock `nemotron_h` of about 1.2 million parameters. It learns its text by heart: good
for demonstrations and tests, and not to be quoted as a language model.

    python tools/train_bundled_model.py --out engines/transformers/tiny_hybrid --seconds 420

Needs torch, transformers 5.23 or later (older ones train several times slower) and tokenizers.
"""

import argparse
import json
import math
import os
import platform
import pydoc_data.topics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedTokenizerFast,
)

END_OF_TOPIC = "<|end|>"
HELD_OUT_SHARE = 0.03
WINDOW = 256
PROMPTS = (
    "A function definition",
    "The import statement",
    "A generator function",
    "If the object is",
    "The for statement is used to",
)


@dataclass(frozen=True)
class Corpus:
    """The training text, and the end of the whole text, which is kept out of training."""

    train: str
    held_out: str
    notice: str


@dataclass(frozen=True)
class Recipe:
    """How to train. Whichever of `steps` and `seconds` comes first ends it; one is infinite."""

    steps: float
    seconds: float
    seed: int
    threads: int
    batch_size: int = 8
    peak_lr: float = 3e-3
    warmup_share: float = 0.03
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    @property
    def flag(self) -> str:
        """The command-line option that ends the training."""
        return f"--steps {self.steps}" if self.steps < math.inf else f"--seconds {self.seconds:g}"

    def progress(self, step: int, elapsed: float) -> float:
        """Return which share of the training is done; 1 or more means all of it."""
        return max(step / self.steps, elapsed / self.seconds)

    def learning_rate(self, progress: float) -> float:
        """Rise linearly to the peak, then follow half a cosine down to nothing."""
        if progress < self.warmup_share:
            return self.peak_lr * (progress + 1e-3) / (self.warmup_share + 1e-3)
        fall = (progress - self.warmup_share) / (1 - self.warmup_share)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * min(fall, 1.0)))


@dataclass(frozen=True)
class Loss:
    """A mean next-token loss, in the two units that people compare."""

    nats_per_token: float
    bits_per_byte: float

    def __str__(self) -> str:
        """Show both units."""
        return f"{self.nats_per_token:.3f} nats/token = {self.bits_per_byte:.3f} bits/byte"


@dataclass(frozen=True)
class Outcome:
    """What the training measured."""

    steps: int
    seconds: float
    train: Loss
    held_out: Loss


def main() -> None:
    """Train, save, read back what was saved, and say how good it is."""
    args = parse_arguments()
    recipe = Recipe(steps=args.steps, seconds=args.seconds, seed=args.seed, threads=args.threads)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)

    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus.train, args.vocabulary)
    train_ids = encode(tokenizer, corpus.train)
    held_out_ids = encode(tokenizer, corpus.held_out)
    print(f"{len(train_ids)} tokens to train on, {len(held_out_ids)} held out", flush=True)

    model = build_model(tokenizer)
    print(f"{model.num_parameters()} parameters", flush=True)
    windows = random_windows(train_ids, line_starts(tokenizer, train_ids), recipe.batch_size)
    steps, seconds = train(model, windows, recipe)

    save_checkpoint(model, tokenizer, args.out)
    saved = load_checkpoint(args.out)
    outcome = Outcome(
        steps=steps,
        seconds=seconds,
        train=measure_loss(saved, tokenizer, train_ids),
        held_out=measure_loss(saved, tokenizer, held_out_ids),
    )
    print(f"trained text: {outcome.train}\nheld-out text: {outcome.held_out}", flush=True)

    samples = {prompt: continue_greedily(saved, tokenizer, prompt, 64) for prompt in PROMPTS}
    for prompt, ids in samples.items():
        verdict = "LOOPS" if has_loop(ids) else "no loop"
        print(f"--- {verdict}: {prompt}|{tokenizer.decode(ids)}", flush=True)

    write_text(args.out / "NOTICE", corpus.notice)
    sample = PROMPTS[0] + tokenizer.decode(samples[PROMPTS[0]])
    write_text(args.out / "README.md", model_card(saved, recipe, outcome, sample))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the model that comes with makeready.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, default=math.inf, help="train for this many steps")
    length.add_argument("--seconds", type=float, default=math.inf, help="or for this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads that torch may use")
    parser.add_argument("--vocabulary", type=int, default=1024, help="number of tokens")
    args = parser.parse_args()
    if min(args.steps, args.seconds) <= 0:
        parser.error(f"the length must be positive, got {min(args.steps, args.seconds):g}")
    return args


def read_corpus() -> Corpus:
    """Read the language reference and the licence from the running Python."""
    licence = (Path(os.__file__).parent / "LICENSE.txt").read_text(encoding="utf-8")
    documents = [*pydoc_data.topics.topics.values(), licence]
    text = "".join(document.strip() + END_OF_TOPIC for document in documents)
    cut = round(len(text) * (1 - HELD_OUT_SHARE))
    notice = (
        "The weights and the tokenizer in this directory were trained on pydoc_data.topics and\n"
        f"LICENSE.txt of Python {platform.python_version()}, and can reproduce passages of them.\n"
        "That text is copyright (c) Python Software Foundation. Its licence follows in full, as\n"
        "shipped with Python.\n\n" + "-" * 80 + "\n\n" + licence
    )
    return Corpus(train=text[:cut], held_out=text[cut:], notice=notice)


def train_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """Learn byte pairs; all 256 bytes are tokens, so that any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TOPIC],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(END_OF_TOPIC), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TOPIC,
        eos_token=END_OF_TOPIC,
        pad_token=END_OF_TOPIC,
        clean_up_tokenization_spaces=False,
        model_max_length=4 * WINDOW,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Turn a text into one row of tokens."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def build_model(tokenizer: PreTrainedTokenizerFast) -> NemotronHForCausalLM:
    """Make an untrained model: four mamba2, two attention and two feed-forward layers."""
    end = tokenizer.eos_token_id
    config = NemotronHConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        layers_block_type=[
            "linear_attention",
            "mlp",
            "linear_attention",
            "full_attention",
            "linear_attention",
            "mlp",
            "linear_attention",
            "full_attention",
        ],
        intermediate_size=320,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=32,
        n_groups=1,
        conv_kernel=4,
        chunk_size=64,
        max_position_embeddings=4 * WINDOW,
        # transformers clamps the time step at `time_step_min` when it reads a prompt and not when
        # it decodes. A minimum that is never reached makes the two agree.
        time_step_min=1e-6,
        # The default upper limit is infinity, which JSON cannot hold; no time step gets near this.
        time_step_limit=(0.0, 1000.0),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = NemotronHForCausalLM(config)
    spread_time_steps(model)
    return model


@torch.no_grad()
def spread_time_steps(model: NemotronHForCausalLM, low: float = 1e-3, high: float = 0.1) -> None:
    """Start each mamba2 head at its own time step, evenly spaced in the logarithm.

    transformers would draw them from `time_step_min` upwards, which is far too small here.
    """
    for layer in model.model.layers:
        if hasattr(layer.mixer, "dt_bias"):
            steps = torch.logspace(math.log10(low), math.log10(high), len(layer.mixer.dt_bias))
            layer.mixer.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))


def train(
    model: NemotronHForCausalLM,
    windows: Iterator[torch.Tensor],
    recipe: Recipe,
    report_every: float = 20.0,
) -> tuple[int, float]:
    """Train in place, print a line now and then; return the steps done and the seconds taken."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.peak_lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    model.train()
    start = last_report = time.perf_counter()
    step, elapsed, average = 0, 0.0, None
    for batch in windows:
        progress = recipe.progress(step, elapsed)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(progress)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        step, now = step + 1, time.perf_counter()
        elapsed = now - start
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if now - last_report >= report_every:
            last_report = now
            done = recipe.progress(step, elapsed)
            print(f"{done:4.0%} step {step}, {elapsed:.0f} s, loss {average:.3f}", flush=True)
    model.eval()
    return step, elapsed


def line_starts(tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> torch.Tensor:
    """Find the tokens that begin a line and have a whole window from there on."""
    ends_line = torch.tensor(["\n" in tokenizer.decode([token]) for token in range(len(tokenizer))])
    return ends_line[ids[:-WINDOW]].nonzero().flatten() + 1


def random_windows(
    ids: torch.Tensor, starts: torch.Tensor, batch_size: int
) -> Iterator[torch.Tensor]:
    """Yield batches of windows for ever.

    A window begins where a line does, so that the model knows how to go on from a short prompt.
    """
    span = torch.arange(WINDOW)
    while True:
        for chosen in starts[torch.randperm(len(starts))].split(batch_size):
            yield ids[chosen[:, None] + span]


@torch.no_grad()
def measure_loss(
    model: NemotronHForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor
) -> Loss:
    """Measure the mean loss over windows side by side; a last, shorter one is left out."""
    windows = ids.unfold(0, WINDOW, WINDOW)
    losses = [model(input_ids=rows, labels=rows).loss * len(rows) for rows in windows.split(16)]
    nats = float(sum(losses)) / len(windows)
    text = tokenizer.decode(windows.flatten(), skip_special_tokens=True)
    bytes_per_token = len(text.encode()) / windows.numel()
    return Loss(nats_per_token=nats, bits_per_byte=nats / math.log(2) / bytes_per_token)


def save_checkpoint(
    model: NemotronHForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path
) -> None:
    """Write weights in bfloat16, configurations and tokenizer, readable by everyone.

    The configuration asks for float32: stored small, run exactly.
    """
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    config = out / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    tokenizer.save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)


def load_checkpoint(path: Path) -> NemotronHForCausalLM:
    """Read a saved model back as a CPU should run it, in float32."""
    return NemotronHForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def continue_greedily(
    model: NemotronHForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, count: int
) -> list[int]:
    """Return the most likely continuation of a prompt, at most `count` tokens."""
    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    row = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0]
    return row[length:].tolist()


def has_loop(ids: list[int], shortest: int = 3) -> bool:
    """Return whether a phrase of `shortest` or more tokens is followed by itself."""
    return any(
        ids[start : start + size] == ids[start + size : start + 2 * size]
        for size in range(shortest, len(ids) // 2 + 1)
        for start in range(len(ids) - 2 * size + 1)
    )


def model_card(model: NemotronHForCausalLM, recipe: Recipe, outcome: Outcome, sample: str) -> str:
    """Describe the checkpoint for a person who opens the directory."""
    config = model.config
    count: Callable[[str], int] = config.layers_block_type.count
    quoted = "\n".join(f"> {line}" for line in sample.splitlines())
    return f"""\
# tiny_hybrid

A small hybrid language model of type `nemotron_h`, for the demonstrations and tests of makeready.
It has learned its text by heart. **It is a demo only**; its losses say nothing about a method.

* {model.num_parameters():,} parameters, stored in bfloat16 and run in float32, as its \
config.json asks.
* {count("linear_attention")} mamba2, {count("full_attention")} attention and {count("mlp")} \
feed-forward layers, width {config.hidden_size}; {config.num_attention_heads} query and \
{config.num_key_value_heads} key/value heads of {config.head_dim}; {config.mamba_num_heads} mamba \
heads of {config.mamba_head_dim}, state {config.ssm_state_size}.
* {config.vocab_size} byte-level BPE tokens; `{END_OF_TOPIC}` ends a topic and stops generation.
* Text: `pydoc_data.topics` and `LICENSE.txt` of Python {platform.python_version()}, under the \
Python Software Foundation License (see NOTICE), trained in windows of {WINDOW} tokens.
* Command: `python tools/train_bundled_model.py --out engines/transformers/tiny_hybrid \
{recipe.flag} --seed {recipe.seed} --threads {recipe.threads}`
* {outcome.steps} steps of {recipe.batch_size} windows in {outcome.seconds:.0f} s on a CPU.
* Loss on the text it was trained on: {outcome.train}.
* Loss on the held-out last {HELD_OUT_SHARE:.0%}, mostly the licence: {outcome.held_out}.

A greedy continuation of "{PROMPTS[0]}":

{quoted}
"""


def write_text(path: Path, text: str) -> None:
    """Write a text file that everyone may read."""
    path.write_text(text, encoding="utf-8")
    path.chmod(0o644)


if __name__ == "__main__":
    main()
