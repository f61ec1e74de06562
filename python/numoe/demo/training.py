"""Training the byte model: one recipe is one run, every batch a function of (seed, step), checkpoints exact."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from numoe import checkpoint, metrics, optim
from numoe.demo.data import Batch, Corpus, Ints, training_batch
from numoe.demo.model import ByteModel, ModelConfig, Pass, cross_entropy, predict


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run; equal recipes give equal bits."""

    label: str
    model: ModelConfig
    steps: int
    seed: int
    batch: int = 1024  # bytes to predict per step
    lr: float = 3e-2  # the best of 2e-2, 3e-2, 5e-2 for the dense layer, the rival
    bias_rate: float = 0.0  # of loss-free balancing, per step

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """Build the recipe that `to_dict` described."""
        return cls(**{**data, "model": ModelConfig(**data["model"])})


class Trainer:
    """A model, its optimiser, and the number of the next batch."""

    def __init__(self, corpus: Corpus, recipe: Recipe) -> None:
        self.corpus, self.recipe = corpus, recipe
        self.model = ByteModel(recipe.model, recipe.seed)
        warmup = min(50, recipe.steps // 10)
        self.optimizer = optim.AdamW(
            self.model.params,
            recipe.lr,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            schedule=optim.cosine(recipe.steps, warmup_steps=warmup, final=0.05),
            no_decay=("norm_*", "embedding"),
        )
        self.seconds = 0.0

    @property
    def step_count(self) -> int:
        """Steps made so far, which is also the number of the next batch."""
        return self.optimizer.step_count

    def step(self) -> tuple[float, Pass]:
        """Train on one batch; return its mean loss in bits (before the change) and the forward pass."""
        started = time.perf_counter()
        recipe = self.recipe
        batch = training_batch(self.corpus, recipe.seed, self.step_count, recipe.batch, recipe.model.context)
        done = self.model.forward(batch.contexts)
        nats, dlogits = cross_entropy(done.logits, batch.targets)
        grads = self.model.backward(dlogits, done)
        optim.clip_gradients(grads, 1.0)
        self.optimizer.step(grads)
        if recipe.bias_rate:
            self.model.moe.update_choice_bias(done.moe, recipe.bias_rate)
        self.seconds += time.perf_counter() - started
        return float(nats.mean(dtype=np.float64) / np.log(2.0)), done

    # ---------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Parameters and buffers of the model and the optimiser's state, by dotted names."""
        model = optim.flatten({"model": {**self.model.params, "moe": self.model.moe.state_dict()}})
        return model | {f"optimizer.{name}": a for name, a in self.optimizer.state_dict().items()}

    def save(self, path: Path) -> None:
        """Write state and recipe to one safetensors file: whole or not at all."""
        checkpoint.save(path, self.state_dict(), config=self.recipe.to_dict())

    @classmethod
    def load(cls, path: Path, corpus: Corpus) -> Trainer:
        """Continue the run that `save` wrote: same weights, same optimiser state, same next batch."""
        state, config = checkpoint.load(path)
        trainer = cls(corpus, Recipe.from_dict(config))
        part = "optimizer."
        model, own = (
            {name: array for name, array in arrays.items() if not name.startswith(part)}
            for arrays in (state, trainer.state_dict())
        )
        checkpoint.copy_state(model, own, strict=True)
        trainer.optimizer.load_state_dict(
            {name.removeprefix(part): array for name, array in state.items() if name.startswith(part)}
        )
        return trainer


@dataclass(frozen=True)
class Result:
    """What a finished run measured."""

    recipe: Recipe
    trainer: Trainer
    losses: list[float]  # bits per byte of every training batch
    shares: npt.NDArray[np.float64]  # (steps, E), load shares of every training batch
    bits: npt.NDArray[np.float64]  # of every held-out target, (T,)
    chosen: Ints  # experts of every held-out target, (T, K)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.trainer.model.moe.config.router.num_experts

    @property
    def tokens_per_second(self) -> float:
        """Training speed; data, NumPy parts and optimiser included."""
        return self.recipe.steps * self.recipe.batch / max(self.trainer.seconds, 1e-9)

    def load(self) -> Ints:
        """Choices of each expert on the held-out text, (E,)."""
        return metrics.expert_load(self.chosen, self.num_experts)


def train(
    corpus: Corpus,
    recipe: Recipe,
    held_out: Batch,
    progress: Callable[[float], None],
    *,
    save_at: int | None = None,
    path: Path | None = None,
) -> Result:
    """Train to the end, then measure on `held_out`; `progress` hears the bits of every batch."""
    trainer = Trainer(corpus, recipe)
    losses, shares = [], []
    while trainer.step_count < recipe.steps:
        if path is not None and trainer.step_count == save_at:
            trainer.save(path)
        bits, done = trainer.step()
        losses.append(bits)
        shares.append(metrics.load_fraction(done.moe.routing.indices, recipe.model.moe["num_experts"]))
        progress(bits)
    measured, chosen = predict(trainer.model, held_out)
    return Result(recipe, trainer, losses, np.array(shares), measured, chosen)


def sample(model: ByteModel, prompt: bytes, length: int, rng: np.random.Generator, temperature: float = 0.6) -> bytes:
    """Write `length` bytes after `prompt`, each drawn from softmax(logits / temperature)."""
    text = bytearray(prompt)
    width = model.config.context
    for _ in range(length):
        context = np.frombuffer(bytes(text[-width:]).rjust(width, b"\0"), np.uint8)[None]
        logits = model.forward(context).logits[0].astype(np.float64) / temperature
        probability = np.exp(logits - logits.max())
        text.append(int(rng.choice(256, p=probability / probability.sum())))
    return bytes(text[len(prompt) :])
