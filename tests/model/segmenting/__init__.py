"""Tests of model/segmenting/."""
