"""Training of fVLM: settings, data, collator, trainer, loss curves and model card. The command is `train_fvlm.py`."""
