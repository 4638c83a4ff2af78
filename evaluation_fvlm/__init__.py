"""Evaluation of fVLM: zero-shot findings from versioned prompt sets, metrics, plots. See `eval_fvlm.py --help`."""
