"""Tests of dataset/conversation/."""
