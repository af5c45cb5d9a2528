"""Distillation inside the run: a teacher beside the student, in its layout, and their loss."""
