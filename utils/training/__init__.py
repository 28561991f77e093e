"""Training under DeepSpeed: the loop, what it saves, and how a run goes on."""
