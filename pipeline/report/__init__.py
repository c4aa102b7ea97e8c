"""Tell the answer from what the storage holds; nothing here needs TensorFlow."""
