"""Tests of model/inference/."""
