"""From files to batches: loaders, conversations and collation. Nothing here knows the model."""
