"""Benchmark metrics, their uncertainty and their pictures. Plain functions of samples and predictions."""
