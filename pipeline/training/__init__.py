"""Train one configuration, fast: engine, optimizers, decay schemes, splits, divergence, overfitting."""
