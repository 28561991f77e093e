"""Tests of model/checkpoints/."""
