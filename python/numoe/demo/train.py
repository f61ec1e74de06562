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
from numoe.demo.data import Batch, Corpus, training_batch
from numoe.demo.model import ByteModel, ModelConfig, Pass, cross_entropy, held_out_bits


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run; equal recipes give equal bits."""

    label: str
    model: ModelConfig
    steps: int
    seed: int
    batch: int = 1024  # bytes to predict per step
    lr: float = 2e-2
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
            for layer, out in zip(self.model.layers, done.moe, strict=True):
                layer.update_choice_bias(out, recipe.bias_rate)
        self.seconds += time.perf_counter() - started
        return float(nats.mean(dtype=np.float64) / np.log(2.0)), done

    # ---------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Parameters and buffers of the model and the optimiser's state, by dotted names."""
        layers = {f"moe_{i}": layer.state_dict() for i, layer in enumerate(self.model.layers)}
        model = optim.flatten({"model": {**self.model.params, **layers}})
        return model | {f"optimizer.{name}": a for name, a in self.optimizer.state_dict().items()}

    def save(self, path: Path) -> None:
        """Write state and recipe to one safetensors file: whole or not at all."""
        checkpoint.save(path, self.state_dict(), config=self.recipe.to_dict())

    @classmethod
    def load(cls, path: Path, corpus: Corpus) -> Trainer:
        """Continue the run that `save` wrote: same weights, same optimiser state, same next batch."""
        state, config = checkpoint.load(path)
        trainer = cls(corpus, Recipe.from_dict(config))
        own = trainer.state_dict()
        part = "optimizer."
        model = {name: array for name, array in state.items() if not name.startswith(part)}
        moments = {n: a.reshape(own[n].shape) for n, a in state.items() if n.startswith(part) and n in own}
        checkpoint.copy_state(model, {n: a for n, a in own.items() if not n.startswith(part)}, strict=True)
        trainer.optimizer.load_state_dict({name[len(part) :]: array for name, array in moments.items()})
        return trainer


@dataclass(frozen=True)
class Result:
    """What a finished run measured."""

    recipe: Recipe
    trainer: Trainer
    held_out: npt.NDArray[np.float64]  # bits of every held-out target
    load: npt.NDArray[np.float32]  # (kinds, layers, E), choices on held-out text
    train_bits: list[float]  # per step
    shares: npt.NDArray[np.float64]  # (steps, E), load shares of the first MoE layer

    @property
    def tokens_per_second(self) -> float:
        """Training speed, data and optimiser included."""
        return self.recipe.steps * self.recipe.batch / max(self.trainer.seconds, 1e-9)

    def balance(self) -> dict[str, float]:
        """Balance of the first MoE layer on held-out text."""
        return metrics.load_summary(self.load.sum(axis=0)[0])


Progress = Callable[[float, float], None]


def run(
    corpus: Corpus,
    recipe: Recipe,
    batch: Batch,
    progress: Progress,
    *,
    checkpoint_at: int | None = None,
    path: Path | None = None,
) -> Result:
    """Train to the end, then measure on `batch`; `progress` hears (bits, effective experts) after every step."""
    trainer = Trainer(corpus, recipe)
    experts = trainer.model.layers[0].config.router.num_experts
    bits, shares = [], []
    while trainer.step_count < recipe.steps:
        if path is not None and trainer.step_count == checkpoint_at:
            trainer.save(path)
        loss, done = trainer.step()
        share = metrics.load_fraction(done.moe[0].routing.indices, experts)
        bits.append(loss)
        shares.append(share)
        progress(loss, float(np.exp(-(share * np.log(np.maximum(share, 1e-300))).sum())))
    held_out, load = held_out_bits(trainer.model, batch)
    return Result(recipe, trainer, held_out, load, bits, np.array(shares))


def sample(model: ByteModel, prompt: bytes, length: int, rng: np.random.Generator, temperature: float) -> bytes:
    """`length` bytes after `prompt`, each drawn from softmax(logits / temperature)."""
    text = bytearray(prompt)
    width = model.config.context
    for _ in range(length):
        context = np.frombuffer(bytes(text[-width:]).rjust(width, b"\0"), np.uint8)[None]
        logits = model.forward(context).logits[0].astype(np.float64) / temperature
        probability = np.exp(logits - logits.max())
        text.append(int(rng.choice(256, p=probability / probability.sum())))
    return bytes(text[len(prompt) :])
