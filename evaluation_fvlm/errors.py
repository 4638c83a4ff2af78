"""The one error of this room that a user can mend; commands print its message without a traceback."""


class EvaluationError(ValueError):
    """A task, split, model or option that does not fit; the message says what, where, and how to mend it."""
