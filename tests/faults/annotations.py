"""Drawn shapes, masks and pictures."""
