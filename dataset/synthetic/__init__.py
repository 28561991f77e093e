"""SynthReason: a procedural benchmark for reasoning segmentation that fits a machine without a
GPU."""
