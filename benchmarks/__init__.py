"""Measurements that belong to the figures in docs/."""
