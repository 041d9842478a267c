"""Measuring a policy: held-out rows, rewards, judges, agreement, statistics, public benchmarks."""
