"""Test finished runs and grids: the code is in minilora/scripts/evaluate.py, `minilora evaluate` runs the same."""

from minilora.scripts.run import run

if __name__ == "__main__":
    run("evaluate")
