"""Training: a state, a jitted step and a loop; losses; checkpoints that resume bit for bit.

loss = masked_diffusion()
state, frozen = start(model, optimizer, jax.random.key(0))
state = fit(train_step(loss, optimizer), state, frozen, iter(batches(source, 64, seed=0)), 1000)
"""

from kvjax.train.checkpoints import Checkpoints
from kvjax.train.losses import (
    binary_cross_entropy,
    cross_entropy,
    distillation,
    kl_divergence,
    language_modelling,
    squared_error,
    token_losses,
    weighted_mean,
)
from kvjax.train.masked_diffusion import corrupt, log_likelihood, masked_diffusion, predict
from kvjax.train.parts import combine, labels, leaf_name, partition
from kvjax.train.reconstruction import reconstruction
from kvjax.train.trainer import Loss, TrainState, fit, measure, start, train_step

__all__ = [
    "Checkpoints",
    "Loss",
    "TrainState",
    "binary_cross_entropy",
    "combine",
    "corrupt",
    "cross_entropy",
    "distillation",
    "fit",
    "kl_divergence",
    "labels",
    "language_modelling",
    "leaf_name",
    "log_likelihood",
    "masked_diffusion",
    "measure",
    "partition",
    "predict",
    "reconstruction",
    "squared_error",
    "start",
    "token_losses",
    "train_step",
    "weighted_mean",
]
