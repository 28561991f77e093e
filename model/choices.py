"""What flags may choose from. Nothing is imported here, so that a command line is read, and a
mistake in it is told, before torch is."""

ATTENTION = ("auto", "eager", "sdpa", "flash_attention_2", "flex_attention")
PRECISIONS = ("fp32", "bf16", "fp16")
# Which of SAM's proposals are kept, and which of these are united into the answer.
RANKINGS = ("area", "quality", "mixed")
RULES = ("iop", "similarity", "similarity+iop", "top5+iop", "verified")
