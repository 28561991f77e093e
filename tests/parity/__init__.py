"""Parity with recorded runs of the published LISA and CoReS code: ``python -m tests.parity
CASE_DIR``."""
