"""Prefect: when, where and how often the pipeline runs. What it is made of, DVC alone says."""
