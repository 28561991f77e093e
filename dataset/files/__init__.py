"""Reading and writing files: every error is one line that names the file."""
