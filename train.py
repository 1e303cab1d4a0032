"""Train a cell or a grid: the code is in minilora/scripts/train.py, `minilora train` runs the same."""

from minilora.scripts.run import run

if __name__ == "__main__":
    run("train")
