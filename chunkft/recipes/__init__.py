"""Thin runs on the trainers people know."""
