"""Builders: from a release of CT volumes, organ masks and reports to a processed split that a trainer streams.

One builder a release (`ct_rate`, `folder`; `synthetic` makes a release) over shared parts: `cases` (what a builder
finds in its source), `decompose` (report -> captions), `build` (cases -> shards, in parallel and resumable), `shards`
(the columns on disk), `card`, `previews`. Geometry and organ vocabulary come from modeling_fvlm; no network is called.
"""
