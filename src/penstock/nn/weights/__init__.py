"""Checkpoints on disk: headers, routes, streaming into parameters. Knows no model family."""
