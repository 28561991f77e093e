"""Side-by-side measurements. Every number in README and docs comes out of a module here."""
