"""How fast, how lean, and beside whom: `python -m benchmarks.run`, `python -m benchmarks.versus_lerobot`."""
