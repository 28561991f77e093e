"""Tests of utils/precompute/."""
