"""Tests of utils/settings/."""
