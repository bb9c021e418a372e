"""Promised import path; see `sketch_walk.common.core`."""
