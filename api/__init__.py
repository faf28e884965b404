"""The service: upload a checkpoint, get the rewritten model and its report back."""
