"""``python -m numoe demo``: a small byte-level language model with an MoE layer, trained on text every Python has.

It measures, in 28 s on two cores with AVX-512 and 78 s with AVX2: prediction against byte-pair tables and a dense layer
that does the same work; which expert serves which kind of text; collapse without balancing and its cure; a sample; and
a checkpoint from which training continues with identical numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
from tqdm import tqdm

from numoe import info
from numoe.demo import pictures, report
from numoe.demo.data import Batch, Corpus, NoTextError, held_out_batch, load_corpus, ngram_bits
from numoe.demo.model import ModelConfig
from numoe.demo.training import Recipe, Result, Trainer, sample, train
from numoe.optim import flatten

STEPS = 1500
EXPERTS = {"num_experts": 16, "top_k": 2, "d_ff": 128}
DENSE = {"num_experts": 1, "top_k": 1, "d_ff": 256}  # one expert as wide as the two that a byte visits
BIAS_RATE = 0.01
PROMPTS = {"prose": "The ", "code": "    def ", "tables": "    '\\u04", "names": "GREEK SMALL LETTER "}
HELD_OUT_PER_KIND = 8192
WIDTH = 100  # of the report, in characters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the demo."""
    parser.add_argument("--steps", type=_positive, default=STEPS, help=f"training steps of 1,024 bytes ({STEPS})")
    parser.add_argument("--out", type=Path, default=Path("numoe-demo"), help="folder for the results (numoe-demo)")
    parser.add_argument("--seed", type=_natural, default=0, help="of weights, batches and the sample (0)")


def _natural(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number; got {text!r}") from None
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a number >= 0; got {number}")
    return number


def _positive(text: str) -> int:
    if _natural(text) == 0:
        raise argparse.ArgumentTypeError("expected a number >= 1; got 0")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` and run."""
    parser = argparse.ArgumentParser(prog="python -m numoe demo", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


@dataclass(frozen=True)
class _Setting:
    """What all parts of the demo share."""

    corpus: Corpus
    held_out: Batch
    steps: int
    seed: int
    out: Path

    def recipe(self, label: str, moe: dict[str, Any], **changes: Any) -> Recipe:
        options = {"steps": self.steps, "seed": self.seed} | changes
        return Recipe(label=label, model=ModelConfig(moe=moe), **options)

    def train(self, recipe: Recipe, **options: Any) -> Result:
        with tqdm(total=recipe.steps, desc=f"  {recipe.label}", unit="step", leave=False, disable=None) as bar:

            def progress(bits: float) -> None:
                bar.set_postfix_str(f"{bits:.2f} bits per byte", refresh=False)
                bar.update()

            return train(self.corpus, recipe, self.held_out, progress, **options)


def run(args: argparse.Namespace) -> int:
    """Run the whole demo; return 0 if the checkpoint continued with identical numbers."""
    started = time.perf_counter()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode still gets its tables
    out: Path = args.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        corpus = load_corpus()
    except OSError as error:
        print(f"--out {out}: the folder cannot be made: {error.strerror}.", file=sys.stderr)
        return 2
    except NoTextError as error:
        print(error, file=sys.stderr)
        return 2
    held_out = held_out_batch(corpus, HELD_OUT_PER_KIND, ModelConfig(moe={}).context)
    setting = _Setting(corpus, held_out, args.steps, args.seed, out)
    with _one_blas_thread():
        return _run_parts(setting, started)


def _one_blas_thread() -> contextlib.AbstractContextManager[Any]:
    """Keep NumPy's products, which are small here, on one thread.

    Two thread pools that spin on the same cores wait for each other: a step is 20 % slower with both on an idle
    machine, and several times slower on a busy one.
    """
    limits: contextlib.AbstractContextManager[Any] = threadpoolctl.threadpool_limits(1, user_api="blas")
    return limits


def _run_parts(setting: _Setting, started: float) -> int:
    corpus, out = setting.corpus, setting.out
    print(_headline(setting.seed))
    print(f"\nText of this Python, in bytes; no paragraph occurs twice\n{report.text_table(corpus)}", flush=True)
    runs, ngrams = _predict(setting)
    _specialists(setting, runs["moe"])
    runs |= _balance(setting)
    _sample(setting, runs["moe"])
    identical = _continue(setting, runs["moe"])
    numbers = report.numbers(corpus.kinds, setting.held_out, ngrams, runs) | {"checkpoint_identical": identical}
    (out / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"\nAll of it took {time.perf_counter() - started:.0f} s.  Written to {out}:")
    print("  specialists.png  balance.png  checkpoint.safetensors  results.json")
    return 0 if identical else 1


def _headline(seed: int) -> str:
    facts = info.collect()
    return (
        "numoe demo: a byte-level language model with a Mixture-of-Experts layer\n"
        f"Python {facts['python']} · NumPy {facts['numpy']} · {facts['target']} kernels · "
        f"{facts['threads']} threads · seed {seed}"
    )


def _title(number: int, text: str) -> None:
    print(f"\n{number}  {text}", flush=True)


def _say(sentence: str) -> None:
    print(textwrap.fill(sentence, WIDTH))


def _save_at(steps: int) -> int:
    """Choose the step before which the checkpoint is written, so that some steps are left to compare."""
    return steps - max(1, min(20, steps // 5))


def _predict(setting: _Setting) -> tuple[dict[str, Result], dict[str, Any]]:
    kinds = setting.corpus.kinds
    _title(1, f"Predicting the next byte: {setting.steps:,} steps of 1,024 bytes, same batches for both models")
    dense = setting.train(setting.recipe("dense layer", DENSE))
    moe = setting.train(
        setting.recipe("16 experts, 2 per byte", {**EXPERTS, "choice_bias": True}, bias_rate=BIAS_RATE),
        save_at=_save_at(setting.steps),
        path=setting.out / "checkpoint.safetensors",
    )
    ngrams = ngram_bits(setting.corpus, setting.held_out)
    print(report.prediction_table(setting.held_out, kinds, ngrams, [dense, moe]))
    _say(report.prediction_sentence(ngrams, dense, moe))
    return {"dense": dense, "moe": moe}, ngrams


def _specialists(setting: _Setting, moe: Result) -> None:
    kinds = setting.corpus.kinds
    _title(2, "Who does what: where the held-out bytes of each kind are sent")
    print(report.specialist_table(moe, setting.held_out, kinds))
    shares = report.kind_shares(moe, setting.held_out, len(kinds))
    _say(report.specialist_sentence(shares, kinds))
    order = report.specialist_order(shares)
    pictures.draw_specialists(setting.out / "specialists.png", shares[:, order], kinds, order.tolist())


def _balance(setting: _Setting) -> dict[str, Result]:
    steps = min(setting.steps, max(20, setting.steps // 6))
    _title(3, f"Balance: the same model and batches, {steps:,} steps, with and without balancing")
    runs = {
        "unbalanced": setting.train(setting.recipe("none", EXPERTS, steps=steps)),
        "balance_loss": setting.train(
            setting.recipe("loss (megatron, 0.02)", {**EXPERTS, "aux_losses": {"megatron": 0.02}}, steps=steps)
        ),
        "choice_bias": setting.train(
            setting.recipe(
                f"choice bias ({BIAS_RATE} per step)",
                {**EXPERTS, "choice_bias": True},
                steps=steps,
                bias_rate=BIAS_RATE,
            )
        ),
    }
    none, *cures = runs.values()
    print(report.balance_table([none, *cures]))
    _say(report.balance_sentence(none, cures))
    histories = [np.exp(-(r.shares * np.log(np.maximum(r.shares, 1e-300))).sum(axis=1)) for r in runs.values()]
    loads = [r.load() / r.load().sum() for r in runs.values()]
    pictures.draw_balance(setting.out / "balance.png", [r.recipe.label for r in runs.values()], histories, loads)
    return runs


def _sample(setting: _Setting, moe: Result) -> None:
    _title(4, "What it writes: prompt | continuation")
    rng = np.random.default_rng([setting.seed, 4])
    for kind in setting.corpus.kinds:
        text = sample(moe.trainer.model, PROMPTS[kind].encode(), 180, rng).decode(errors="replace")
        lines = [line for line in f"{PROMPTS[kind]}|{text}".splitlines() if line.strip()]
        for i, line in enumerate(lines[:5]):
            print(f"  {kind if i == 0 else '':6}  {line[:WIDTH]}".rstrip())


def _continue(setting: _Setting, moe: Result) -> bool:
    path = setting.out / "checkpoint.safetensors"
    _title(5, "A checkpoint: saved during the run of part 1, loaded, continued")
    trainer = Trainer.load(path, setting.corpus)
    start = trainer.step_count
    losses = [trainer.step()[0] for _ in range(setting.steps - start)]
    same_losses = losses == moe.losses[start:]
    mine, theirs = trainer.state_dict(), moe.trainer.state_dict()
    same_state = all(mine[name].tobytes() == theirs[name].tobytes() for name in theirs)
    count = len(flatten(moe.trainer.model.params))
    print(
        f"  {path.name}, {path.stat().st_size / 1e6:.1f} MB, written before step {start + 1}: weights, optimiser, "
        f"position in the data\n"
        f"  {len(losses)} more steps: losses {'identical' if same_losses else 'DIFFERENT'} bit for bit; "
        f"{count} parameters and their optimiser state {'identical' if same_state else 'DIFFERENT'} bit for bit"
    )
    return same_losses and same_state
