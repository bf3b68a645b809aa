"""Batched image operations with parameters per image, and the policy tables."""
