"""Asking a finished model about pictures from Python."""
