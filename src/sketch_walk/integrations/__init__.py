"""Bridges to model libraries; nothing here is imported with `sketch_walk` itself."""
