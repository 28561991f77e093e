"""Caches and records."""
