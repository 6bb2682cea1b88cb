"""Trains the embedded model from nothing, in one seeded, resumable command.

    python -m tools.train_embedded --work /tmp/embedded --out pipeline/embedded/checkpoint

LLaVA's two stages, after a vision pretraining of our own in place of its pretrained CLIP tower:

- vision pretraining
  1. sight: the vision tower alone tells, at each patch of a shape, which shape and colour it is
     part of (two linear heads, thrown away at the end).
- LLaVA's first stage, which aligns projector and tower
  2. captions: the whole model describes images.
- LLaVA's second stage, instruction tuning; the loss is on answers only
  3. presence: is a colour or a shape there? Comparing is the slow part, and is learned soonest
     without negations, which hide it.
  4. questions: every kind, several an image, packed behind one image prefix (`tools.packing`) or
     as turns of one conversation.

Most images are drawn on the fly, the others are easy-VQA's training images, moved about; 400 of
those are held out for validation. The test split is not read here: see `tools.measure_embedded`.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# Read when torch loads OpenMP: threads that spin while they wait starve each other, and whoever
# shares the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from tools.easy_vqa_data import load_training
from tools.embedded_learner import Learner, loss_of
from tools.embedded_model import build_processor, export
from tools.packing import PackedBatch
from tools.training_batches import Asker, Example, Mix
from tools.validation import sight_accuracy, validate

SAVE_EVERY_S = 180


@dataclass(frozen=True)
class Stage:
    """One stage: its length, what is asked in a batch, and learning rate from peak to end."""

    name: str
    steps: int
    mix: Mix
    peak_rate: float
    end_rate: float
    decay_from: float = 0.5
    warm_up_steps: int = 100

    def rate(self, step: int) -> float:
        """Linear warm-up, a plateau, and a linear fall after `decay_from` of the steps."""
        warm = min(1.0, (step + 1) / self.warm_up_steps)
        fallen = max(0.0, (step / self.steps - self.decay_from) / (1 - self.decay_from))
        return warm * (self.peak_rate + fallen * (self.end_rate - self.peak_rate))


STAGES = (
    Stage("sight", 1500, Mix(images=64, questions=0), peak_rate=1e-3, end_rate=5e-4),
    Stage(
        "captions",
        300,
        Mix(images=32, questions=1, weights={"caption": 1}),
        peak_rate=8e-4,
        end_rate=2e-4,
    ),
    Stage(
        "presence",
        500,
        Mix(
            images=24,
            questions=10,
            weights={"presence": 16, "colour": 1, "shape": 1, "caption": 1},
        ),
        peak_rate=8e-4,
        end_rate=8e-4,
    ),
    Stage(
        "questions",
        1200,
        Mix(
            images=24,
            questions=10,
            weights={"presence": 6, "absence": 6, "colour": 2, "shape": 2, "caption": 1},
            conversations=0.2,
        ),
        peak_rate=8e-4,
        end_rate=1e-5,
    ),
)


class Trainer:
    """Runs the stages; its own checkpoint makes an interrupted run go on where it was."""

    def __init__(
        self,
        options: argparse.Namespace,
        stages: tuple[Stage, ...],
        *,
        save_every_s: float = SAVE_EVERY_S,
    ) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.stages = stages
        self.save_every_s = save_every_s
        self.processor = build_processor()
        self.learner = Learner(self.processor)
        training, self.held_out = load_training()
        self.asker = Asker(self.processor, training)
        self.state_path: Path = options.work / "state.pt"
        self.stage_number = 0
        self.step = 0
        self.started = time.monotonic()
        self.optimizer = self.fresh_optimizer()
        options.work.mkdir(parents=True, exist_ok=True)
        if self.state_path.exists():
            self.resume()

    def fresh_optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.learner.parameters() if p.ndim >= 2]
        others = [p for p in self.learner.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": 0.02},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    def resume(self) -> None:
        state = torch.load(self.state_path, weights_only=True)
        self.learner.load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stage_number, self.step = state["stage"], state["step"]
        self.say(f"resumed at {self.stages[self.stage_number].name} step {self.step}")

    def save(self) -> None:
        state = {
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stage": self.stage_number,
            "step": self.step,
        }
        torch.save(state, self.state_path.with_suffix(".new"))
        os.replace(self.state_path.with_suffix(".new"), self.state_path)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.0f} s] {text}", flush=True)

    def run(self) -> None:
        while self.stage_number < len(self.stages):
            stage = self.stages[self.stage_number]
            self.run_stage(stage)
            self.stage_number, self.step = self.stage_number + 1, 0
            self.optimizer = self.fresh_optimizer()
            if self.stage_number < len(self.stages):
                self.save()
        self.say("done")

    def run_stage(self, stage: Stage) -> None:
        saved = time.monotonic()
        losses: list[float] = []
        with ThreadPoolExecutor(1) as drawer:
            drawn = drawer.submit(self.batch, stage, self.step)
            while self.step < stage.steps:
                examples, batch = drawn.result()
                drawn = drawer.submit(self.batch, stage, self.step + 1)
                for group in self.optimizer.param_groups:
                    group["lr"] = stage.rate(self.step)
                losses.append(self.learn(examples, batch))
                self.step += 1
                if self.step % 50 == 0:
                    self.say(f"{stage.name} {self.step}/{stage.steps} loss {np.mean(losses):.4f}")
                    losses.clear()
                if self.step % 500 == 0 or self.step == stage.steps:
                    self.report(stage)
                if time.monotonic() - saved >= self.save_every_s:
                    self.save()
                    saved = time.monotonic()

    def batch(self, stage: Stage, step: int) -> tuple[list[Example], PackedBatch | None]:
        """The batch of a step: the same in every run with this seed."""
        rng = random.Random(f"{self.options.seed}/{stage.name}/{step}")
        return self.asker.batch(stage.mix, rng)

    def learn(self, examples: list[Example], batch: PackedBatch | None) -> float:
        """One step down the gradient; returns the loss."""
        loss = loss_of(self.learner, examples, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def report(self, stage: Stage) -> None:
        """Validates, and exports the model once it answers."""
        if stage.mix.questions == 0:
            accuracy = sight_accuracy(self.learner, self.held_out)
            self.say(f"{stage.name} {self.step}: validation {accuracy:.4f}")
            return
        shares = validate(self.learner, self.asker, self.held_out)
        listed = " ".join(f"{kind} {share:.4f}" for kind, share in shares.items())
        self.say(f"{stage.name} {self.step}: validation {listed}")
        export(self.learner.llava, self.processor, self.options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the run keeps its state")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    Trainer(options, STAGES).run()


if __name__ == "__main__":
    main()
