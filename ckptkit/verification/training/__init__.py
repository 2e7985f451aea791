"""Levels that run backwards: gradients, and steps of training."""
