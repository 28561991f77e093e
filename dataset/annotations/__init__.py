"""From what was drawn to pixels: every spelling of a shape, and the masks that they mean, for all
readers alike."""
