"""Measuring a model or the masks of another system on an evaluation set."""
