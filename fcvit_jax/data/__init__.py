"""Labelled images: sources of encoded records, exact preprocessing, and fixed-shape batches."""
