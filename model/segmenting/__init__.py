"""The chain of segmenting: SAM's encoder, its mask decoder prompted coarse to fine, and the token
refiner between."""
