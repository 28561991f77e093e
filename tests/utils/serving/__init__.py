"""Tests of utils/serving/."""
