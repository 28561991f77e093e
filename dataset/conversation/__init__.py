"""Conversations: turns, templates, wordings, in-context exemplars, and their token ids with exact
labels."""
