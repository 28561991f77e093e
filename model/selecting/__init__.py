"""Selecting among SAM's proposals (LLM-Seg), in place of decoding or behind it."""
