"""`python -m pipeline` is the command `lrtune`."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
