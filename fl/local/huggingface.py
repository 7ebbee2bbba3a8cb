"""A Hugging Face Trainer in a training script.

    from fl import client as flare
    from fl.local.huggingface import patch

    flare.init()
    trainer = Trainer(model=network, args=arguments, train_dataset=..., eval_dataset=...)
    patch(trainer)
    while flare.is_running():
        trainer.evaluate()   # the global model's metrics: what the best model is chosen by
        trainer.train()      # trains the global model and sends the update

Both load the round's model, once; `train` trains from it with a fresh optimizer and answers. Where the task is an
evaluation `evaluate` answers, and `train` does nothing.
"""

from __future__ import annotations

from typing import Any

from fl import client
from fl.errors import RecipeUnusable
from fl.local.trainer_round import TrainerRound


def patch(trainer: Any) -> None:
    """Have `trainer` take its models from the job and give its updates to it. Raises RecipeUnusable."""
    if not all(hasattr(trainer, name) for name in ("train", "evaluate", "model", "optimizer", "state")):
        raise RecipeUnusable(f"a {type(trainer).__name__} is no Hugging Face Trainer", where="patch")
    client.init()
    round_ = TrainerRound()
    train, evaluate = trainer.train, trainer.evaluate

    def federated_train(*words: Any, **named: Any) -> Any:
        def run() -> Any:
            trainer.optimizer = trainer.lr_scheduler = None  # the last round's belong to another model
            return train(*words, **named)

        return round_.train(trainer.model, run, lambda done: (int(trainer.state.global_step), done.metrics))

    def federated_evaluate(*words: Any, **named: Any) -> Any:
        return round_.evaluate(trainer.model, lambda: evaluate(*words, **named), lambda found: found, nothing={})

    trainer.train, trainer.evaluate = federated_train, federated_evaluate
