"""`python -m utils.compare`: finished runs side by side; what it does is in `record.compare`."""
