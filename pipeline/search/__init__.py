"""Find the configuration: range test, search space, trials, pruning, study, confirmation."""
