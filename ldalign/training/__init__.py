"""Training and scoring: one optimizer loop, what the policy and the guide hand it, checkpoints."""
