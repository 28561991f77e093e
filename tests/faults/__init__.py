"""Inputs and accidents of real users, each with what the program does about it.

One module per kind holds the cases (``case.py`` says what one is); ``test_faults.py`` runs them
all, and ``python -m tests.faults`` writes their table into docs/robustness.md."""
