"""Tests of model/reasoning/."""
