"""Pure rules on NumPy arrays and numbers: no TensorFlow, no Optuna, no files, no storage."""
