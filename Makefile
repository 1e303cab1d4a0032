.PHONY: test fast lint parity bench

test:
	pytest

fast:
	pytest -m fast

lint:
	ruff check .

parity:
	python tests/parity.py

bench:
	python -m benchmarks cell
