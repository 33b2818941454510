"""Sheets of pictures, metrics between pictures, and matplotlib figures."""
