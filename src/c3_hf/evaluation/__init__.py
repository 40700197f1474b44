"""Measuring what C3 restores and answers: metrics, tasks, systems, runs and reports."""
