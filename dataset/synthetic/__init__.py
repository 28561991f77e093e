"""SynthReason: a procedural benchmark for reasoning segmentation that needs no GPU."""
