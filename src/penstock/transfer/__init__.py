"""Moves KV between engines, over links: raw memory in, raw memory out. Knows no tensor, no request and no schedule."""
