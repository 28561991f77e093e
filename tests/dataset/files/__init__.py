"""Tests of dataset/files/."""
