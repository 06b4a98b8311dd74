"""What people look at: the report of a run, the comparison of several, the model card."""
