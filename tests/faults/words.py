"""Queries, predictions, settings and chat."""
