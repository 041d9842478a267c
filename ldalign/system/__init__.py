"""What every program needs of its machine: errors, files, memory, seeds, ranks, config."""
