"""Measurements that belong to the figures in docs/.

python -m benchmarks [SUITE…]    all suites, or those named; --help lists them
python -m benchmarks --page      fill docs/performance.md from the result files
"""
