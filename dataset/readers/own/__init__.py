"""A user's own data, in the forms in which people have them."""
