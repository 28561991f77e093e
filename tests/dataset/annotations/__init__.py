"""Tests of dataset/annotations."""
