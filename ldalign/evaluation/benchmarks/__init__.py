"""Public benchmarks, run by lm-eval on a model of ours."""
