"""Benchmarks: commands, run from a clone and never installed; `python -m benchmarks` lists them.

What they measure is for the README's tables. Nothing here is imported by the library, and no test asserts a time.
"""
