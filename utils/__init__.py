"""Around data and model: arguments, the training engine, checkpoints, metrics, evaluation,
pictures."""
