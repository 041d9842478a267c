"""Sampling: the engine with its paged cache, its decoders, and answers that survive a stop."""
