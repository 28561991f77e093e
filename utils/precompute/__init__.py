"""Commands that compute once, before a run, what the run would compute again and again."""
