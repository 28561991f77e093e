"""A model for many visitors at once: who waits, what is kept of whom, and what may be asked for."""
