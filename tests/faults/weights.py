"""Checkpoints of language models and segmenters."""
