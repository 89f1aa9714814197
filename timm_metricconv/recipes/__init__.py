"""Recipes: training, comparison, denoising and publishing. They need the extra `demo`."""
