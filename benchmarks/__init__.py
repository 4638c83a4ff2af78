"""Measured claims: each one command, each against an obvious baseline written here, each checked for equal results."""
