"""Every command's errors."""
