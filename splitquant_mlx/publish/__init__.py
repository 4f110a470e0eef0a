"""Publish a converted checkpoint: its files, measurements, model card and upload to the hub."""
