"""The published learning-rate schedule: a linear warm-up by steps, then a cosine by epochs, never both at once.

As alibaba-damo-academy/fvlm d768ec1 trained (pretrain_ct.yaml): in the first epoch the rate rises from
`warmup_start_lr` to the peak over `warmup_steps` and stays there; in epoch e (from 0) of E it is
`min_lr + (peak - min_lr) (1 + cos(pi e / E)) / 2` for the whole epoch. The cosine counts the epoch of the warm-up, so
epoch 0 has the full peak and the last one still lies above `min_lr`.
"""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .arguments import SettingsError


def published_learning_rate(
    step: int,
    *,
    steps_per_epoch: int,
    num_epochs: float,
    peak_lr: float,
    min_lr: float,
    warmup_start_lr: float,
    warmup_steps: int,
) -> float:
    """Learning rate of the optimizer step with this number, counted from 0 over the whole run.

    Past the last epoch, where the published run had ended, it stays at `min_lr`.
    """
    epoch = step // steps_per_epoch
    if epoch == 0:
        rise = peak_lr - warmup_start_lr
        return peak_lr if step >= warmup_steps else warmup_start_lr + rise * step / warmup_steps
    return min_lr + (peak_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(epoch / num_epochs, 1.0)))


def published_schedule(
    optimizer: Optimizer,
    *,
    steps_per_epoch: int,
    num_epochs: float,
    peak_lr: float,
    min_lr: float,
    warmup_start_lr: float,
    warmup_steps: int,
) -> LambdaLR:
    """Scheduler of `published_learning_rate`; where it stands is its step count alone, so that it resumes exactly.

    Args:
        optimizer: Its groups have `peak_lr` as learning rate.
        steps_per_epoch: Optimizer steps, of all processes together.
        num_epochs: Epochs over which the cosine falls.
        peak_lr, min_lr, warmup_start_lr, warmup_steps: See above.

    Raises:
        SettingsError: If the warm-up does not end within the first epoch. The published code would break it off there
            and jump to the cosine.
    """
    if warmup_steps > steps_per_epoch:
        raise SettingsError(
            f"--warmup_steps {warmup_steps} does not end in the first epoch of {steps_per_epoch} steps, where the "
            f"published schedule goes over to its cosine: lower it to at most {steps_per_epoch}."
        )
    rate = partial(
        published_learning_rate,
        steps_per_epoch=steps_per_epoch,
        num_epochs=num_epochs,
        peak_lr=peak_lr,
        min_lr=min_lr,
        warmup_start_lr=warmup_start_lr,
        warmup_steps=warmup_steps,
    )
    return LambdaLR(optimizer, lambda step: rate(step) / peak_lr)
