"""The tests mirror the sources: tests/test_<topic>.py."""
