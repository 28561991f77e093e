"""Tests of dataset/generate/."""
