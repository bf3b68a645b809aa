"""Small helpers that the rest of the project is built from; they import torch and the standard library only."""
