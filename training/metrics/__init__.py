"""Numbers of a stage: metrics.jsonl, trackers, and where seconds and memory go.

It knows no model.
"""
