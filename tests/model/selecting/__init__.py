"""Tests of model/selecting/."""
