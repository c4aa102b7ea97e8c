"""The report's figures, each as an info function that returns plain data and a draw function."""
