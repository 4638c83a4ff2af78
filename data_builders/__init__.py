"""Builders: from a release of CT volumes, organ masks and reports to a processed split that a trainer streams.

One builder a release (`ct_rate`, `folder`; `synthetic` makes a release) over shared parts: `sources` (where a release
lies), `cases` (what a builder finds there), `decompose` (report -> captions), `build` (cases -> shards, in parallel and
resumable), `shards` (the columns on disk), `card`, `previews`. `CTRateBuilder` streams a release through `datasets`.
Geometry and organ vocabulary come from modeling_fvlm; no network is called.
"""

__all__ = ["CTRateBuilder"]


def __getattr__(name: str):
    """`CTRateBuilder` brings `datasets` with it, so it is imported when it is asked for."""
    if name == "CTRateBuilder":
        from .streaming import CTRateBuilder

        return CTRateBuilder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
