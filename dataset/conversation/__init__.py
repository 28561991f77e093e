"""Conversations: turns, templates, wordings, exemplars, and their token ids with exact labels."""
