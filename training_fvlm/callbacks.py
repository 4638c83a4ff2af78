"""Callbacks of the command: the loss curves are drawn whenever a checkpoint is written."""

from transformers import TrainerCallback

from .curves import draw_if_logged


class CurveCallback(TrainerCallback):
    """Draws `loss_curves.png` at every save, so that a run can be looked at while it goes on."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            draw_if_logged(args.output_dir)
