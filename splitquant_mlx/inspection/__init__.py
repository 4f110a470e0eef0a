"""Describe models, estimate conversions and check the machine."""
