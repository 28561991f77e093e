"""Commands that compute once, before a run, what every epoch and every run would compute again."""
