"""Offline training: data, students, objectives, recipes, calibration, evaluation and export.

Never imported by `service`; the two meet only in the bundle (`model_store`).
"""
