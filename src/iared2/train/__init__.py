"""Layer 6: tasks, the trainer, and recipes."""
