"""Layouts and dialects of exporters, names of files."""
