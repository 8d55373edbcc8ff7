"""Add-ons of single files."""
