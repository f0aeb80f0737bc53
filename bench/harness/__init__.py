"""Benchmarks of what a Python engine sees of Pillion: `./scripts/bench ttft | lookup | step | copy`.

What lives here: the measuring programs, and the peers that stand beside us in the same run. `report` knows what a
row is and judges it, `machine` says where it was measured, and one module for each NAME measures. They use the
fake engines of tests/chaos, the real vLLM of tests/e2e, and the wheel that is installed beside this Python.
Nothing that is started here outlives the run.
"""
