"""Tests of utils/report/."""
