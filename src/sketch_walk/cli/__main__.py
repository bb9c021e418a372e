"""`python -m sketch_walk.cli`."""

from sketch_walk.cli import main

if __name__ == "__main__":
    main()
