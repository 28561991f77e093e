"""Tests of dataset/readers/."""
