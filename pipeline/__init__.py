"""lrtune: which learning rate, decay scheme and optimizer a Keras model should be trained with."""

__version__ = "0.1.0"
