"""Accuracy, throughput and reports: many schedules in one pass over the data."""
