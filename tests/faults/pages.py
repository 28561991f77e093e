"""The page and its visitors."""
