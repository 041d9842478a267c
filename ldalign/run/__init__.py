"""A run and its folder: settings, stages, methods, comparisons, and what a dry run foretells."""
