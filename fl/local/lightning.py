"""A Lightning Trainer in a training script: three lines more than without federation.

    from fl import client as flare
    from fl.local.lightning import patch

    flare.init()
    trainer = Trainer(max_epochs=1, ...)
    patch(trainer)
    while flare.is_running():
        trainer.validate(module, datamodule=data)   # the global model's metrics: what the best model is chosen by
        trainer.fit(module, datamodule=data)        # trains the global model and sends the update

`fit` and `validate` load the round's model, once; `fit` answers with what training made of it, for `max_epochs` more
epochs each round. Where the task is an evaluation `validate` answers, and `fit` does nothing. Works with `lightning`
and with `pytorch_lightning`, and with whatever has their methods.
"""

from __future__ import annotations

from typing import Any

from fl import client
from fl.errors import RecipeUnusable
from fl.local.trainer_round import TrainerRound


def patch(trainer: Any) -> None:
    """Have `trainer` take its models from the job and give its updates to it. Raises RecipeUnusable."""
    if not all(hasattr(trainer, name) for name in ("fit", "validate", "fit_loop", "callback_metrics")):
        raise RecipeUnusable(f"a {type(trainer).__name__} is no Lightning Trainer", where="patch")
    client.init()
    round_ = TrainerRound()
    fit, validate, epochs = trainer.fit, trainer.validate, trainer.max_epochs or 1

    def federated_fit(model: Any, *words: Any, **named: Any) -> None:
        def run() -> int:
            before = int(trainer.global_step)
            trainer.fit_loop.max_epochs = int(trainer.current_epoch) + epochs
            fit(model, *words, **named)
            return int(trainer.global_step) - before

        round_.train(model, run, lambda steps: (steps, dict(trainer.callback_metrics)))

    def federated_validate(model: Any, *words: Any, **named: Any) -> Any:
        return round_.evaluate(
            model, lambda: validate(model, *words, **named), lambda _: dict(trainer.callback_metrics), nothing=[]
        )

    trainer.fit, trainer.validate = federated_fit, federated_validate
